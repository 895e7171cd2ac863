"""What a chat template may compute for one conversation: a count, and no clock, ends what would not end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from template_cases import CASES, write_tokenizer

from lumina_ds.cli.main import cli, run_command
from lumina_ds.data.templates.render import TemplateRefusal, TemplateWithoutEnd, render
from lumina_ds.data.templates.samples import exchange

CHAT = [*exchange("hello a b c", "x y z " * 50), *exchange("and more", "yes")]
GROW = "{% set ns = namespace(s='x') %}{% for i in range(60) %}"
NEST = "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
WITHOUT_END = {
    "power of the messages": "{% for i in range(messages|length ** 8) %}{% for j in range(60000) %}{% endfor %}{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that take nothing": "{% for i in range(99999) if i < 0 %}{% endfor %}" * 11,
    "items of a filter": "{% for i in range(99999) %}{{ range(99999) | map('abs') | sum }}{% endfor %}",
    "search of a filter": "{% for i in range(99999) %}{{ -1 in (range(99999) | map('abs')) }}{% endfor %}",
    "search of a list": "{% set l = range(9999) | list %}{% for i in l %}{{ -1 in l }}{% endfor %}",
    "plus": GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "tilde": GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a block": GROW + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    "output": "{% set s = 'x' * 9999999 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "lists": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "times": "{{ 'x' * 10**10 }}",
    "a list times": "{{ messages * 9999999999 }}",
    "numbers": "{% set ns = namespace(s=3) %}{% for i in range(60) %}{% set ns.s = ns.s * ns.s %}{% endfor %}",
    "exponent": "{{ 9 ** 999999999 }}",
    "printf": "{% set n = 1 %}{{ '%9999999999d' % n }}",
    "printf of a width": "{% set n = 9999999999 %}{{ '%*d' % (n, 1) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "format of a width": "{{ '{:>{w}}'.format(1, w='9999999999') }}",
    "many fields": "{% set s = 'x' * 1000000 %}{{ ('{0}' * 100000).format(s) }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "center": "{{ 'x' | center(9999999999) }}",
    "indent": "{{ ('x\n' * 100000) | indent('y' * 100000) }}",
    "expandtabs": "{{ ('\t' * 1000000).expandtabs(99999) }}",
    "replace": "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
    "replace nothing": "{{ ('x' * 1000000) | replace('', 'y' * 1000000) }}",
    "join": "{{ ('x' * 1000000).join(range(9999) | map('string')) }}",
    "translate": "{{ ('x' * 1000000).translate({120: 'y' * 1000000}) }}",
    "batch": "{{ [1] | batch(9999999999, 1) | list }}",
    "slices": "{% set s = 'x' * 9999999 %}{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "comparisons": "{% set s = 'x' * 9999999 %}{% set t = s ~ '' %}{% for i in range(99999) %}{{ s is eq t }}{% endfor %}",
    "tojson": "{{ [[1] * 10000] | tojson(indent=9999999) }}",
    "round": "{{ 1.5 | round(999999999, 'ceil') }}",
    "rfind": "{{ ('a' * 2000000).rfind('b' + 'a' * 1000000) }}",
    "urlize": "{{ ('a@a.' * 1000000) | urlize }}",
    "nested lists": NEST + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s | tojson }}",
}


@pytest.mark.parametrize("name", WITHOUT_END)
def test_what_would_not_end_is_ended(name: str) -> None:
    with pytest.raises(TemplateWithoutEnd):
        render(WITHOUT_END[name], {}, CHAT)


def test_a_macro_that_calls_itself_twice_is_ended() -> None:
    twice = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    with pytest.raises(TemplateWithoutEnd, match="units of work"):
        render(twice, {}, CHAT)
    with pytest.raises(TemplateRefusal, match="calls itself too deeply"):
        render("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", {}, CHAT)


def test_long_conversations_have_room() -> None:
    """A megabyte in a thousand turns, each of which is searched, split and stripped."""
    chat = [message for number in range(500) for message in exchange(f"{number} " * 250, "word " * 250)]
    source = (
        "{% for m in messages %}{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}"
        "{{ '<|' + m.role + '|>' + (m.content | trim).strip() }}{% endif %}"
        "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '\\n' }}{% endif %}{% endfor %}"
    )
    text = render(source, {}, chat)
    assert text.count("<|user|>") == 500 and text == "".join(f"<|{m['role']}|>{m['content'].strip()}\n" for m in chat)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages[::-1] %}{{ loop.length }}{{ loop.revindex }}{{ m.role[0] }} {% endfor %}", "44a 43u 42a 41u "),
        ("{% for k, v in {'a': 1, 'b': [2, 3]}.items() %}{{ k }}{{ v }}{% endfor %}", "a1b[2, 3]"),
        ("{{ messages | map(attribute='role') | unique | join(',') }}", "user,assistant"),
        ("{% for r, g in messages | groupby('role') %}{{ r }}{{ g | length }}{% endfor %}", "assistant2user2"),
        ("{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        ("{{ '%s-%05d' % ('a', 7) }}{{ '{:>4}|{}'.format('b', 1) }}{{ 2 ** 8 }}{{ 7 % 4 }}{{ [1] + [2] }}", "a-00007   b|125631, 2]"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ missing }}{{ 'a' in missing }}", "2False"),
        ("{{ {'a': [1, {'b': 'é'}]} | tojson(indent=1) }}", '{\n "a": [\n  1,\n  {\n   "b": "é"\n  }\n ]\n}'),
    ],
)  # fmt: skip
def test_what_ends_is_as_it_was(source: str, expected: str) -> None:
    assert render(source, {}, CHAT).replace("[1, 2]", "1, 2]") == expected


def test_a_line_for_which_the_template_does_not_end_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = write_tokenizer(CASES["chatml"], tmp_path / "model")
    trap = "{% for m in messages if m.content == 'boom' %}" + WITHOUT_END["loops in loops"] + "{% endfor %}"
    (tmp_path / "own.jinja").write_text(trap + CASES["chatml"].source)
    chats = tmp_path / "chats.jsonl"
    lines = [{"messages": exchange(question, "yes")} for question in ("hi", "boom")]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [str(chats), "--tokenizer", str(tokenizer), "--chat-template", str(tmp_path / "own.jinja")]
    for verb in (["validate"], ["preprocess", "--out", str(tmp_path / "out"), "--seq-length", "64", "--workers", "1"]):
        assert run_command(cli, [*verb, *words]) == 3
        error = capsys.readouterr().err
        assert "chats.jsonl, line 2: chat template own.jinja does not end within 100," in error
        assert "mend the template, or choose another with --chat-template" in error and "Traceback" not in error
    check = ["template", "check", words[-1], "--tokenizer", str(tokenizer), "--data", str(chats)]
    assert run_command(cli, check) == 3 and "does not end within" in capsys.readouterr().err
