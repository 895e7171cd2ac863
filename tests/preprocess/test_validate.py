"""`lumina validate`: each rule on lines made for it, counts that reconcile, losses by hand, output and exit codes."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lumina_ds.cli.main import cli, run_command
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from preprocess.validation.console import print_findings
from preprocess.validation.findings import Findings
from preprocess.validation.rules import WARNINGS, conversation_faults
from preprocess.validation.validate import _row_faults, validate_files

Command = Callable[..., tuple[int, str, str]]
GOOD = [("user", "a question"), ("assistant", "an answer")]


@pytest.fixture
def lumina(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> tuple[int, str, str]:
        code = run_command(cli, [str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def line(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


def faults_of(*turns: tuple[str, str]) -> list[str]:
    from lumina_ds.data.conversation import parse_conversation

    return [fault.rule for fault in conversation_faults(parse_conversation(line(*turns).encode()).turns)]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Nine lines: four refused, three of the same conversation, two with one warning each; and a blank line."""
    lines = [
        line(*GOOD),
        "not json",
        "",
        line(("user", "only user")),
        line(*GOOD),
        line(("assistant", "I start"), ("user", "x"), ("assistant", "y")),
        "[1]",
        line(*GOOD),
        line(("user", "cafÃ©"), ("assistant", "y")),
        '{"messages": [{"role": "user", "content": "cut',
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("turns", "rules"),
    [
        (GOOD, []),
        ([("system", "s"), *GOOD], []),
        ([*GOOD, ("system", "s"), *GOOD], ["system turn not first"]),
        ([("system", "s"), ("system", "t"), *GOOD], ["system turn not first"]),
        ([("user", "x"), *GOOD], ["repeated role"]),
        ([*GOOD, ("assistant", "x")], ["repeated role"]),
        ([("assistant", "x"), *GOOD], ["starts with assistant"]),
        ([("system", "s"), ("assistant", "x")], ["starts with assistant"]),
        ([*GOOD, ("user", "x")], ["does not end with assistant"]),
        ([("user", " \n\t"), ("assistant", "y")], ["blank content"]),
        ([("user", "two\nlines\tand a tab\r\n"), ("assistant", "y")], []),
        ([("user", "\x00"), ("assistant", "\x1b[31m")], ["control character"]),
        ([("user", "a\x85b"), ("assistant", "y")], ["control character"]),
        ([("user", "a \ufffd b"), ("assistant", "y")], ["replacement character"]),
        ([("user", "say <|im_end|>"), ("assistant", "y")], ["control-token text"]),
        ([("user", "[INST] x"), ("assistant", "</s>")], ["control-token text"]),
        ([("user", "if a < b: x[0] | <b>html</b>"), ("assistant", "y")], []),
    ],
)
def test_rules(turns: list[tuple[str, str]], rules: list[str]) -> None:
    assert faults_of(*turns) == rules


@pytest.mark.parametrize(
    "text", ["café", "it\u2019s “so” \u2013 20 °C", "日本語", "Привет", "हिन्दी", "👩 ok", "ไทย", "ｦｱ。"]
)
@pytest.mark.parametrize("wrong", ["cp1252", "latin-1"])
def test_mojibake_is_found(text: str, wrong: str) -> None:
    try:
        damaged = text.encode().decode(wrong)
    except UnicodeDecodeError:
        damaged = text.encode().decode("latin-1")
    assert "mojibake" in faults_of(("user", damaged), ("assistant", "y"))
    assert faults_of(("user", text), ("assistant", "y")) == []


@pytest.mark.parametrize(
    "text",
    [
        "groß“, sagte er",
        "CAFÉ…",
        "SÃO PAULO",
        "À «bientôt»",
        "à\u00a0» demain",
        "beauté\u00a0»",
        "é”…",
        "âme",
        "Ñandú",
        "Øre…",
        "Їжак “так”",
    ],
)
def test_accents_beside_signs_are_no_mojibake(text: str) -> None:
    assert faults_of(("user", text), ("assistant", "y")) == []


def test_counts_reconcile(mixed: Path) -> None:
    findings = validate_files([str(mixed)])
    assert (findings.lines, findings.conversations, findings.num_errors) == (9, 5, 4)
    assert {name: entry.count for name, entry in findings.rules.items()} == {
        "invalid JSON": 2,
        "no assistant turn": 1,
        "not an object": 1,
        "starts with assistant": 1,
        "mojibake": 1,
        "duplicate conversation": 2,
    }
    errors = [entry.count for entry in findings.rules.values() if entry.level == "error"]
    assert sum(errors) == findings.num_errors and findings.num_warnings == 4
    assert dict(findings.turns_by_role) == {"user": 5, "assistant": 6}
    # three times "a question" and "an answer", then 7 + 1 + 1 and 5 + 1
    assert findings.characters.sum == 3 * (10 + 9) + 9 + 6
    assert findings.assistant_share == (3 * 9 + 8 + 1) / 72
    assert (findings.turns.minimum, findings.turns.maximum) == (2, 3)


def test_examples_name_line_reason_and_text(mixed: Path) -> None:
    findings = validate_files([str(mixed)], num_examples=1)
    shown = {name: [tuple(example) for example in entry.examples] for name, entry in findings.rules.items()}
    assert shown["invalid JSON"] == [
        ("mixed.jsonl", 2, "invalid JSON: Expecting value at character 0", "not json"),
    ]
    assert shown["duplicate conversation"] == [
        ("mixed.jsonl", 5, "same as mixed.jsonl line 1; stands 3 times", "user: a question  assistant: an answer")
    ]
    assert shown["mojibake"] == [("mixed.jsonl", 9, "'Ã©' in turn 1 (user)", "cafÃ©")]


def test_blocks_do_not_matter(chats: Path, mixed: Path, tokenizer: Tokenizer) -> None:
    from preprocess.validation.findings import to_json

    whole, pieces = (
        to_json(validate_files([str(chats), str(mixed)], tokenizer.path, 64, block_bytes=size))
        for size in (8 << 20, 700)
    )
    assert whole == pieces


def test_token_figures_are_those_of_the_shards(
    chats: Path, tokenizer: Tokenizer, lumina: Command, tmp_path: Path
) -> None:
    options = ("--tokenizer", tokenizer.path, "--seq-length", 40)
    assert lumina("preprocess", chats, *options, "--out", tmp_path / "out")[0] == 0
    stats = json.loads(lumina("data", "stats", tmp_path / "out", "--json")[1])
    code, text, _ = lumina("validate", chats, *options, "--json")
    found = json.loads(text)
    assert code == 0 and found["errors"] == 0
    assert found["tokens"]["sum"] == stats["tokens"] and found["trained_tokens"] == stats["trained_tokens"]
    assert found["tokens"]["max"] == stats["longest_tokens"] and found["tokens"]["min"] == stats["shortest_tokens"]
    rules = {rule["rule"]: rule["count"] for rule in found["rules"]}
    dropped = rules.get("no trained token in its row", 0)
    assert dropped == stats["dropped_overlong"]
    assert found["overlong"]["conversations"] == rules["longer than a row"] == stats["truncated_overlong"] + dropped


END = 9


@pytest.mark.parametrize(
    ("ids", "mask", "seq_length", "rules"),
    [
        ([1, 4, 9, 5, 7, 9], [0, 0, 0, 0, 1, 1], None, []),
        ([1, 4, 9, 5, 7, 9], [0, 0, 0, 0, 1, 1], 6, []),
        ([1, 4, 9, 5, 7, 9], [0, 0, 0, 0, 1, 1], 5, ["longer than a row", "no trained end of turn"]),
        ([1, 4, 9, 5, 7, 9], [0, 0, 0, 0, 1, 1], 4, ["longer than a row", "no trained token in its row"]),
        ([1, 5, 7, 9, 4, 7, 9], [0, 0, 1, 1, 0, 0, 0], 5, ["longer than a row"]),
        ([1, 5, 7, 9], [0, 0, 1, 0], None, ["no trained end of turn"]),
    ],
)
def test_what_a_row_keeps(ids: list[int], mask: list[int], seq_length: int | None, rules: list[str]) -> None:
    assert [rule for rule, _ in _row_faults(np.array(ids), np.array(mask, np.uint8), END, seq_length)] == rules


def test_loss_of_a_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Conversations of 2 + 2 + n tokens beside BOS; the loss is what lies beyond the row."""
    path = tmp_path / "lengths.jsonl"
    path.write_text("\n".join(line(("user", "x"), ("assistant", "fox " * n)) for n in (1, 100, 700)))
    findings = validate_files([str(path)], tokenizer.path, 64)
    assert findings.tokens is not None and findings.row_loss is not None
    lengths = [findings.tokens.minimum, findings.tokens.percentile(50), findings.tokens.maximum]
    assert findings.tokens.sum == sum(lengths) and lengths[0] < 64 < lengths[1] < 512 < lengths[2] < 2048
    assert (findings.row_loss.conversations, findings.row_loss.tokens) == (2, lengths[1] + lengths[2] - 2 * 64)
    assert [(row.seq_length, row.conversations, row.tokens) for row in findings.row_losses()][:2] == [
        (512, 1, lengths[2] - 512),
        (1024, int(lengths[2] > 1024), max(0, lengths[2] - 1024)),
    ]


def test_compressed_globs_and_standard_input(mixed: Path, lumina: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = json.loads(lumina("validate", mixed, "--json")[1])
    packed = mixed.with_name("mixed.jsonl.gz")
    packed.write_bytes(gzip.compress(mixed.read_bytes()))
    code, text, _ = lumina("validate", mixed.parent / "*.gz", "--json")
    assert code == 3 and json.loads(text)["tokens"] is None
    assert json.loads(text.replace("jsonl.gz", "jsonl")) == plain
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(mixed.read_bytes()))))
    assert (
        json.loads(lumina("validate", "-", "--json")[1].replace('"-', '"mixed.jsonl'))["lines"] == plain["lines"] == 9
    )


def test_exit_codes(mixed: Path, chats: Path, lumina: Command, tmp_path: Path) -> None:
    code, out, error = lumina("validate", mixed)
    assert code == 3 and "Rules broken" in out
    assert error == "error: 4 of 9 lines cannot be used: invalid JSON, no assistant turn, not an object\n"
    assert lumina("validate", chats)[0] == 0
    warned = tmp_path / "warned.jsonl"
    warned.write_text(line(("assistant", "I start")))
    assert lumina("validate", warned)[0] == 0
    assert lumina("validate", warned, "--strict")[::2] == (3, "error: 1 warning, and --strict allows none\n")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{chats}", "--seq-length", "64"], 2, "--seq-length counts tokens, so it needs --tokenizer"),
        (["{empty}"], 3, "empty.jsonl holds no line to validate"),
        (["none.jsonl"], 3, "no such file: none.jsonl"),
        (["{chats}", "--tokenizer", "{chats}"], 3, "is not a SentencePiece model"),
        (["{chats}", "--report", "{empty}/x.html"], 4, "cannot write"),
    ],
)
def test_errors(words: list[str], code: int, message: str, chats: Path, tmp_path: Path, lumina: Command) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    filled = [word.format(chats=chats, empty=tmp_path / "empty.jsonl") for word in words]
    got, _, error = lumina("validate", *filled)
    assert got == code and message in error and error.count("\n") == 1


def test_turns_that_are_trained(lumina: Command, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(line(*GOOD))
    assert lumina("validate", path, "--train-turns", "last")[0] == 0
    code, _, error = lumina("validate", path, "--train-turns", "marked")
    assert (code, error) == (3, "error: 1 of 1 line cannot be used: no turn to train\n")


def printed(findings: Findings, width: int) -> list[str]:
    stream = io.StringIO()
    print_findings(findings, Console(file=stream, width=width, highlight=False, force_terminal=True, color_system=None))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_fits(width: int, mixed: Path, chats: Path, tokenizer: Tokenizer) -> None:
    from rich.cells import cell_len

    wide = mixed.with_name("wide.jsonl")
    wide.write_text(line(("user", "日本語の" * 40 + "\x00\x1b[2J\u202e"), ("user", "👩‍👩‍👧" * 60), ("assistant", "y")))
    findings = validate_files([str(path) for path in (mixed, chats, wide)], tokenizer.path, 64)
    lines = printed(findings, width)
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    assert "\x1b[2J" not in text and "\u202e" not in text and "␀" in text
    assert all(name in text for name in findings.rules)
    histogram = [entry for entry in lines if "█" in entry]
    assert len(histogram) > 10 and max(map(cell_len, histogram)) == width


def test_every_warning_says_what_it_means() -> None:
    from preprocess.validation import rules

    names = {value for name, value in vars(rules).items() if name.isupper() and isinstance(value, str)}
    assert {name for name in names if not name.startswith("[")} == set(WARNINGS)


def test_no_input_is_named_in_an_error() -> None:
    with pytest.raises(DataError, match="no such file"):
        validate_files(["nothing*.jsonl"])


WEATHER = {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}, "required": ["city"]}}
BROKEN = {"name": "broken", "parameters": {"type": "thing"}}
FAR = {"name": "far", "parameters": {"$ref": "https://example.com/schema.json"}}


@pytest.mark.parametrize(
    ("name", "arguments", "rule", "says"),
    [
        ("weather", {"city": "Ulm"}, None, ""),
        (
            "weather",
            {"city": 3},
            "arguments against the schema",
            "turn 2 calls weather: city: 3 is not of type 'string'",
        ),
        ("weather", "{}", "arguments against the schema", "turn 2 calls weather: 'city' is a required property"),
        ("wether", {}, "call of an undefined tool", "turn 2 calls wether; defined: weather, broken, far"),
        ("broken", {}, "invalid schema of a tool", "broken: 'thing' is not valid"),
        ("far", {}, "arguments against the schema", "its schema cannot be followed"),
    ],
)
def test_calls_are_held_to_the_definitions(
    name: str, arguments: object, rule: str | None, says: str, tmp_path: Path
) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": name, "arguments": arguments}]}
    document = {"tools": [WEATHER, BROKEN, FAR], "messages": [{"role": "user", "content": "Warm?"}, call]}
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps(document) + "\n")
    found = validate_files([str(path)]).rules
    assert list(found) == ([rule] if rule else [])
    assert not rule or (says in found[rule].examples[0].reason and found[rule].examples[0].line == 1)


def test_a_tag_in_an_assistants_text_is_a_warning() -> None:
    assert faults_of(("user", "<think>"), ("assistant", "<think>hm</think> yes")) == ["tool or reasoning tag in text"]


def test_other_tools_make_no_duplicates_and_texts_have_no_roles(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    lines = [chat, {**chat, "tools": [WEATHER]}, {"text": "a text"}, {**chat, "tools": [BROKEN]}]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    found = validate_files([str(path)])
    assert not found.rules and found.conversations == 4
    assert dict(found.notes) == {"documents of plain text: every token is a label": 1}
