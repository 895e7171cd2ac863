"""Models' own chat templates: ids against transformers, masks against what each format says, and certificates."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from template_cases import CASES, Case, write_tokenizer

from lumina_ds.data.chat_template import encode_conversations, encode_prompt, stop_ids
from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.templates.certificate import ENDS, FORGERY, PREFIX, RENDERS, WHOLE, Certificate, certify
from lumina_ds.data.templates.find import certified_template, find_template, read_template, stored_text, tokenizer_for
from lumina_ds.data.templates.jinja_template import JinjaTemplate, Row, TemplateWriter, Unproven
from lumina_ds.data.templates.samples import WEATHER, exchange, samples
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.data.turns import Conversation, Turn
from lumina_ds.errors import DataError

ANSWERS = ("Fine, thanks.", "Sunny\nand warm.")
CHAT = [*exchange("How are you?", ANSWERS[0]), *exchange("And the weather?", ANSWERS[1])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("templates")
    for name, case in CASES.items():
        write_tokenizer(case, root / name)
    return root


@pytest.fixture(scope="module")
def certificates(folders: Path) -> dict[str, Certificate]:
    return {name: _certify(folders / name) for name in CASES}


def _certify(folder: Path, template: str = "auto") -> Certificate:
    tokenizer = Tokenizer.load(folder / "tokenizer.json").without_markers()
    found = find_template(template, tokenizer).template
    assert isinstance(found, JinjaTemplate)
    return certify(found, tokenizer)


def _writer(folder: Path, found: Certificate) -> TemplateWriter:
    return found.template.with_tokenizer(Tokenizer.load(folder / "tokenizer.json").without_markers())


def _labels(row: Row, folder: Path) -> list[str]:
    """The text of each run of labels, special tokens included."""
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [library.decode(row.ids[span.begin : span.end], skip_special_tokens=False) for span in row.spans]


def _rows(writer: TemplateWriter) -> Iterator[tuple[Any, Row]]:
    for sample in samples():
        try:
            yield sample, writer.row(sample.messages, sample.trained, sample.tools)
        except RejectedLine:
            continue


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(
    name: str, folders: Path, certificates: dict[str, Certificate], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folders / name)
    writer = _writer(folders / name, certificates[name])
    rows = list(_rows(writer))
    assert len(rows) > 25
    for sample, row in rows:
        expected = theirs.apply_chat_template(sample.messages, tools=sample.tools, return_dict=False)
        added = [writer.encoder.control_names["<|user|>"]] if CASES[name].ends_with_next else []
        assert row.ids == [*expected, *added], sample.messages
        asked = sample.messages[:-1]
        prompt = theirs.apply_chat_template(asked, tools=sample.tools, add_generation_prompt=True, return_dict=False)
        assert writer.prompt(asked, sample.tools) == prompt == row.ids[: len(prompt)] and len(prompt) < len(row.ids)


@pytest.mark.parametrize("name", CASES)
def test_what_is_found_of_it(name: str, certificates: dict[str, Certificate]) -> None:
    found, case = certificates[name], CASES[name]
    assert found.holds, found.counterexamples
    template = found.template
    assert (template.stops[0], template.rewrites, template.ends_with_next) == (
        case.ends,
        case.rewrites,
        case.ends_with_next,
    )
    assert (("system turns", 0) in [(kind, 0) for kind, _ in found.refused]) is not case.takes_system


# Between the prompt of a generation and the content, and after the content, of the last reply.
AROUND = {
    "qwen-3": ("<think>\n\n</think>\n\n", "<|im_end|>"),
    "glm-4.5": ("\n<think></think>\n", "<|user|>"),
    "gpt-oss": ("<|channel|>final<|message|>", "<|return|>"),
    "llama-2": (" ", " </s>"),
    "mistral-v1": (" ", "</s>"),
}


@pytest.mark.parametrize("name", CASES)
def test_labels_are_the_replies_and_their_ends(name: str, folders: Path, certificates: dict[str, Certificate]) -> None:
    writer, case = _writer(folders / name, certificates[name]), CASES[name]
    row = writer.row(CHAT, [False, True, False, True])
    before, after = AROUND.get(name, ("", case.ends))
    expected = [f"{before}{answer}{after}" for answer in ANSWERS][-1 if case.rewrites else 0 :]
    assert _labels(row, folders / name) == expected
    if not case.rewrites:
        assert _labels(writer.row(CHAT, [False, True, False, False]), folders / name) == expected[:1]
    with pytest.raises(RejectedLine, match="no assistant turn is to be trained"):
        writer.row(CHAT, [False] * 4)


@pytest.mark.parametrize("name", CASES)
def test_text_never_becomes_a_special_token(name: str, folders: Path, certificates: dict[str, Certificate]) -> None:
    writer, case = _writer(folders / name, certificates[name]), CASES[name]
    spelled = f"say {' and '.join(case.special)}{case.special[0]} now"
    ids = writer.row(exchange(spelled, spelled), [False, True]).ids
    plain = writer.row(exchange("say now", "say now"), [False, True]).ids
    special = writer.encoder.control_ids
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    text = Tokenizer.load(folders / name / "tokenizer.json").decode(ids)
    assert text.count(spelled) == 2


@pytest.mark.parametrize("name", ["mistral-v7", "qwen-2.5"])
def test_calls_of_tools_are_labels(name: str, folders: Path, certificates: dict[str, Certificate]) -> None:
    writer, end = _writer(folders / name, certificates[name]), CASES[name].ends
    (sample, *_) = [sample for sample in samples() if sample.tools]
    call, answer = _labels(writer.row(sample.messages, sample.trained, [WEATHER]), folders / name)
    assert "get_weather" in call and '"Łódź"' in call and call.endswith(end) and answer == f"Sunny.{end}"


PARTS = (
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "a",
        "the ",
        "What",
        "é",
        "日本",
        "\U0001f642",
        "'",
        '"',
        "{",
        "}",
        "<",
        ">",
        "|",
        "[",
        "]",
    ),
    *(
        "INST",
        "1",
        "333",
        ".",
        "\u2028",
        "\r\n",
        "<tool_call>",
        "user",
        "assistant",
        "{{",
        "}}",
        "{%",
        "<|",
        "|>",
        "im_",
        "\ufdd0",
    ),
)


@pytest.mark.parametrize("name", CASES)
def test_random_texts(
    name: str, folders: Path, certificates: dict[str, Certificate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal ids where nothing spells a special token, the same special tokens where something does."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folders / name)
    writer, special = _writer(folders / name, certificates[name]), CASES[name].special
    generator = random.Random(name)
    num_equal = num_spelled = 0
    for _ in range(40):
        texts = ["".join(generator.choices(PARTS, k=generator.randint(1, 12))) for _ in range(4)]
        if generator.random() < 0.5:
            texts[generator.randrange(4)] += generator.choice(special) + "x"
        messages = [*exchange(*texts[:2]), *exchange(*texts[2:])]
        try:
            row = writer.row(messages, [False, True, False, True])
        except RejectedLine as refused:
            assert "merge with the beginning of the reply" in refused.reason, messages
            continue
        ids = row.ids[:-1] if CASES[name].ends_with_next else row.ids
        for span in row.spans:
            assert row.ids[: span.begin] == writer.prompt(messages[: span.turn])
            assert row.ids[span.end - 1] in writer.stop_ids
        if any(token in text for token in special for text in texts):
            num_spelled += 1
            plain = writer.row([*exchange("a", "b"), *exchange("a", "b")], [False, True, False, True]).ids
            control = writer.encoder.control_ids
            assert [i for i in row.ids if i in control] == [i for i in plain if i in control], messages
        else:
            num_equal += 1
            assert ids == theirs.apply_chat_template(messages, return_dict=False), messages
    assert num_equal > 5 and num_spelled > 5


def test_reasoning_is_no_label_where_it_shall_not_be(folders: Path, certificates: dict[str, Certificate]) -> None:
    writer = _writer(folders / "qwen-3", certificates["qwen-3"])
    messages = exchange("Why?", "Because.", "Let me think.")
    assert _labels(writer.row(messages, [False, True]), folders / "qwen-3") == [
        "<think>\nLet me think.\n</think>\n\nBecause.<|im_end|>"
    ]
    without = writer.row(messages, [False, True], None, False)
    assert _labels(without, folders / "qwen-3") == ["Because.<|im_end|>"]
    assert without.ids == writer.row(messages, [False, True]).ids


def test_reasoning_of_earlier_exchanges_is_left_out(folders: Path, certificates: dict[str, Certificate]) -> None:
    """--train-reasoning last, under a template that would show it."""
    source = CASES["qwen-3"].source.replace("loop.index0 > ns.last and ", "")
    tokenizer = Tokenizer.load(folders / "qwen-3" / "tokenizer.json").without_markers()
    template = certify(JinjaTemplate("own", source), tokenizer).template
    turns = tuple(
        Turn(message["role"], message["content"], message.get("reasoning_content", ""))
        for message in [*exchange("a", "b", "first"), *exchange("c", "d", "second")]
    )
    for setting, found in (("yes", ["first", "second"]), ("last", ["second"])):
        ((ids, _),) = encode_conversations([Conversation(turns)], tokenizer, template, setting)  # type: ignore[arg-type]
        assert [word for word in ("first", "second") if word in tokenizer.decode(ids)] == found


def test_a_plain_text_stands_between_begin_and_end(folders: Path, certificates: dict[str, Certificate]) -> None:
    tokenizer = Tokenizer.load(folders / "llama-3.1" / "tokenizer.json").without_markers()
    text = Conversation((Turn("text", "Once <|eot_id|> upon"),))
    ((ids, mask),) = encode_conversations([text], tokenizer, certificates["llama-3.1"].template)
    assert ids[-1] == tokenizer.special_tokens["<|eot_id|>"] and mask == [0, *[1] * (len(ids) - 1)]
    assert tokenizer.decode(ids) == "Once <|eot_id|> upon" and ids.count(ids[-1]) == 1


def _broken(case: Case, folder: Path, source: str, **changes: Any) -> Certificate:
    write_tokenizer(case, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | changes | {"chat_template": source}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return _certify(folder)


LINES = "{% for m in messages %}"
BROKEN: dict[str, tuple[str, str]] = {
    "no end": (LINES + "{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", ENDS),
    "no token at all": (LINES + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", ENDS),
    "prompt with another header": (CASES["chatml"].source.replace("assistant\n' }}", "assistant:' }}"), PREFIX),
    "cut contents": (CASES["chatml"].source.replace("message['content']", "message['content'][:20]"), WHOLE),
    "refuses all": ("{{ raise_exception('never') }}", RENDERS),
    "drops the reply": (LINES + "{% if m.role == 'user' %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}"
                        "{% endfor %}", RENDERS),
    "by chance": ("{{ ['a', 'b'] | random }}" + CASES["chatml"].source, RENDERS),
    "white space within": (CASES["chatml"].source.replace("message['content']", "message['content'].split() | join(' ')"), WHOLE),
    "replies twice": (CASES["chatml"].source.replace("message['content']", "message['content'] + message['content']"), WHOLE),
    "questions twice": (CASES["chatml"].source.replace(
        "message['content']", "message['content'] * (2 if message.role == 'user' else 1)"), WHOLE),
    "header left to the reply": (LINES + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
                                 PREFIX),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_would_mislead_has_no_certificate(name: str, tmp_path: Path) -> None:
    source, condition = BROKEN[name]
    found = _broken(CASES["chatml"], tmp_path, source)
    assert not found.holds and condition in {one.condition for one in found.counterexamples}
    with pytest.raises(DataError, match="has no certificate"):
        found.certified("tokenizer.json")


def test_a_prompt_whose_last_token_merges_with_the_reply(tmp_path: Path) -> None:
    """Qwen3-Thinking's prompt ends with a line end, and a reply without reasoning begins with two."""
    source = CASES["qwen-3"].source.replace("assistant\n' }}{%- endif %}", "assistant\n<think>\n' }}{%- endif %}")
    found = _broken(CASES["qwen-3"], tmp_path, source)
    assert {one.condition for one in found.counterexamples} == {PREFIX}


def test_replies_that_merge_with_the_header_are_refused(folders: Path, certificates: dict[str, Certificate]) -> None:
    writer = _writer(folders / "chatml", certificates["chatml"])
    with pytest.raises(Unproven, match="merge with the beginning of the reply"):
        writer.row(exchange("hi", "\nhello"), [False, True])
    assert len(writer.row(exchange("hi", " hello"), [False, True]).spans) == 1


def test_what_a_template_drops_is_refused(folders: Path, certificates: dict[str, Certificate]) -> None:
    writer = _writer(folders / "chatml", certificates["chatml"])
    with pytest.raises(Unproven, match="drops reasoning_content of turn 2"):
        writer.row(exchange("hi", "hello", "thinking"), [False, True])
    with pytest.raises(Unproven, match="drops the definition of the tool 'get_weather'"):
        writer.row(exchange("hi", "hello"), [False, True], [WEATHER])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "line 1"),
        ("{{ x", "line 1"),
        ("a\n{% endif %}", "line 2"),
        ("{{ 1 | nothing }}", "line 1"),
        ("{% break %}", ".*outside loop"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, ".*nested blocks"),
        ("{% macro m(a, a) %}{% endmacro %}", ".*duplicate"),
    ],
)
def test_what_is_no_template(source: str, message: str, tmp_path: Path) -> None:
    path = write_tokenizer(CASES["chatml"], tmp_path)
    (tmp_path / "bad.jinja").write_text(source)
    with pytest.raises(DataError, match=f"bad.jinja(, | cannot be compiled: ){message}"):
        find_template(str(tmp_path / "bad.jinja"), Tokenizer.load(path))


@pytest.mark.parametrize(
    ("source", "message"), [("{{ 'a' * 2000000 }}", "writes 2,000"), ("{{ 'x' | center(9000000000) }}", "does not end")]
)
def test_a_template_without_end_is_refused(source: str, message: str, tmp_path: Path) -> None:
    path = write_tokenizer(CASES["chatml"], tmp_path)
    (tmp_path / "bad.jinja").write_text(source)
    with pytest.raises(DataError, match=message):
        find_template(str(tmp_path / "bad.jinja"), Tokenizer.load(path))


def test_the_template_in_an_older_file_of_transformers(tmp_path: Path) -> None:
    path = write_tokenizer(CASES["chatml"], tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CASES["chatml"].source}))
    found = find_template("auto", Tokenizer.load(path)).template
    assert isinstance(found, JinjaTemplate) and found.source == CASES["chatml"].source


@pytest.mark.parametrize(
    ("settings", "is_same"),
    [
        ({}, False),
        ({"legacy": False}, False),
        ({"legacy": True}, True),
        ({"legacy": True, "add_prefix_space": False}, False),
    ],
)
def test_a_sentencepiece_model_with_a_space_before_every_text(
    settings: dict[str, bool], is_same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers puts that space before each text between special tokens only where the folder says legacy."""
    import sentencepiece

    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = ["hello there [INST] what is two [/INST]", "fine thanks and you", "sunny and warm"] * 20
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, model_type="bpe", vocab_size=320, byte_fallback=True,
            hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    source = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
    source += "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "chat_template": source}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(CHAT, return_dict=False)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.model")
    if not is_same:
        with pytest.raises(
            DataError, match=r"puts a space before every text, .* name a tokenizer\.json, which AutoTokenizer"
        ):
            certified_template("auto", tokenizer)
        theirs.save_pretrained(tmp_path)
        tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    template = certified_template("auto", tokenizer).template
    reader = tokenizer_for(tokenizer, template)
    assert (
        encode_conversations([Conversation(tuple(Turn(m["role"], m["content"]) for m in CHAT))], reader, template)[0][0]
        == expected
    )


def _with_entry(entry: object, folder: Path) -> Tokenizer:
    path = write_tokenizer(CASES["chatml"], folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": entry}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(path)


NAMED = {"name": "default", "template": CASES["chatml"].source}
ODD = ["", " ", 5, True, [], {}, {"default": 1}, [["default", "x"]], ["x"], [None], [{"name": "default"}], [{"template": "x"}],
       [{"name": "default", "template": ""}], [{"name": ["a"], "template": "x"}], [NAMED, NAMED]]  # fmt: skip


@pytest.mark.parametrize("entry", ODD, ids=repr)
def test_an_entry_that_is_no_template(entry: object, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"tokenizer_config\.json: chat_template is .*; write the template into .*jinja, or"
    ):
        find_template("auto", _with_entry(entry, tmp_path))
    (tmp_path / "chat_template.jinja").write_text(CASES["qwen-2.5"].source)
    found = find_template("auto", Tokenizer.load(tmp_path / "tokenizer.json")).template
    assert isinstance(found, JinjaTemplate) and found.source == CASES["qwen-2.5"].source
    (tmp_path / "chat_template.jinja").write_text("\n")
    with pytest.raises(DataError, match=r"chat_template\.jinja is empty"):
        find_template("auto", Tokenizer.load(tmp_path / "tokenizer.json"))


def test_no_entry_is_no_template(tmp_path: Path) -> None:
    assert find_template("auto", _with_entry(None, tmp_path)).name == "lumina-chat-1"


OTHERS = [NAMED, {"name": "tool_use", "template": CASES["qwen-2.5"].source}, {"name": "rag", "template": "{{ 1 }}"}]


@pytest.mark.parametrize("form", ["list", "object", "files"])
def test_of_several_templates_the_taken_one_is_said(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers takes tool_use for conversations with tools: they are refused under the other, and never silently."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    by_name = {one["name"]: one["template"] for one in OTHERS}
    tokenizer = _with_entry({"list": OTHERS, "object": by_name, "files": None}[form], tmp_path)
    if form == "files":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "chat_template.jinja").write_text(by_name.pop("default"))
        for name, source in by_name.items():
            (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(source)
    for _ in range(2):
        named = certified_template("auto", tokenizer)
    assert sum("of several chat templates" in line for line in caplog.messages) == 1
    assert "tool_use" in caplog.text and "rag" in caplog.text and "--chat-template FILE.jinja" in caplog.text
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    writer = named.template.with_tokenizer(tokenizer.without_markers())  # type: ignore[union-attr]
    assert writer.row(CHAT, [False, True, False, True]).ids == theirs.apply_chat_template(CHAT, return_dict=False)
    for refuses in (
        lambda: writer.row(CHAT, [False, True, False, True], [WEATHER]),
        lambda: writer.prompt(CHAT, [WEATHER]),
    ):
        with pytest.raises(RejectedLine, match=r"another chat template, .*tool_use.*--chat-template FILE\.jinja"):
            refuses()
    (tmp_path / "chat_template.json").write_text(stored_text(named.template))  # type: ignore[arg-type]
    assert read_template(tmp_path) == named.template
    (tmp_path / "tool.jinja").write_text(CASES["qwen-2.5"].source)
    tools = certified_template(str(tmp_path / "tool.jinja"), tokenizer).template
    expected = theirs.apply_chat_template(CHAT, tools=[WEATHER], return_dict=False)
    assert (
        tools.with_tokenizer(tokenizer.without_markers()).row(CHAT, [False, True, False, True], [WEATHER]).ids
        == expected
    )  # type: ignore[union-attr]


def test_a_list_without_default_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"tokenizer_config\.json \(tool_use\), .* no chat template of the name default"
    ):
        find_template("auto", _with_entry(OTHERS[1:], tmp_path))


@pytest.mark.parametrize(("source", "message"), [("{{ 'a' * 2000000 }}", "writes 2,000"), ("{% break %}", "cannot be compiled"),
    ("{{ 'x' | center(9000000000) }}", "does not end")])  # fmt: skip
def test_a_stored_template_is_tried_too(source: str, message: str, tmp_path: Path) -> None:
    """A folder of shards or of a run may come from anywhere."""
    named = certified_template("auto", _with_entry(CASES["chatml"].source, tmp_path))
    text = json.loads(stored_text(named.template))  # type: ignore[arg-type]
    (tmp_path / "chat_template.json").write_text(json.dumps(text | {"source": source}))
    with pytest.raises(DataError, match=f"chat_template.json.* {message}"):
        read_template(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{% set _ = messages.append(1) %}",
        "{{ cycler.__init__ }}",
    ],
)
def test_the_sandbox_holds(source: str, tmp_path: Path) -> None:
    found = _broken(CASES["chatml"], tmp_path, source + CASES["chatml"].source)
    rendered = "<class" in str([one.reason for one in found.counterexamples])
    assert not rendered and (found.holds or {one.condition for one in found.counterexamples} <= {RENDERS})


def test_generation_tags_and_what_transformers_gives(tmp_path: Path) -> None:
    """break and continue, tojson without escaping, and the tag that marks an assistant's text."""
    source = (
        "{% for m in messages %}{% if m.role == 'nobody' %}{% break %}{% endif %}{% if m.role == 'assistant' %}"
        "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% continue %}{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    found = _broken(CASES["chatml"], tmp_path, source)
    assert found.holds and found.template.stops == ("<|im_end|>",)


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3", "mistral", "gemma"])
def test_named_templates_are_proven_for_their_tokenizers(name: str, folders: Path) -> None:
    case = {"chatml": "chatml", "qwen3": "qwen-3", "llama3": "llama-3.1", "mistral": "mistral-v7", "gemma": "gemma-2"}[
        name
    ]
    found = _certify(folders / case, name)
    assert found.holds and found.template.stops == (CASES[case].ends,)
    assert FORGERY not in {one.condition for one in found.counterexamples}


def test_shards_hold_the_rows_and_the_certificate(
    folders: Path, certificates: dict[str, Certificate], tmp_path: Path, lumina: Callable[..., None]
) -> None:
    from lumina_ds.data.shards.folder import ShardFolder

    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": CHAT, "n": number}) + "\n" for number in range(5)))
    words = ["--tokenizer", folders / "qwen-2.5" / "tokenizer.json", "--seq-length", 256, "--chat-template", "auto"]
    for workers in (1, 2):
        lumina("preprocess", chats, *words, "--out", tmp_path / f"out{workers}", "--workers", workers)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / f"out{workers}").iterdir()} for workers in (1, 2)]
    assert contents[0] == contents[1]
    folder = ShardFolder.open(tmp_path / "out1")
    row = _writer(folders / "qwen-2.5", certificates["qwen-2.5"]).row(CHAT, [False, True, False, True])
    ids, mask = folder.document(0)
    assert ids.tolist() == row.ids and mask.tolist() == row.mask
    assert folder.manifest.template.certificate == certificates["qwen-2.5"].digest
    assert folder.template is not None and folder.template.template.source == CASES["qwen-2.5"].source  # type: ignore[union-attr]
    assert folder.tokenizer().vocab_size == folder.manifest.tokenizer.vocab_size


def test_our_own_template_as_jinja_gives_our_own_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """On a SentencePiece model: what stands between special tokens is encoded by itself, as by our own template."""
    source = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    (tmp_path / "own.jinja").write_text(source)
    named = certified_template(str(tmp_path / "own.jinja"), tokenizer)
    reader = tokenizer_for(tokenizer, named.template)
    texts = ["hello  there <|end|> \u2581x\n", " fine\n日本 <s>", "and <|user|>", "bye"]
    turns = tuple(Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts))
    chats = [Conversation(turns), Conversation(turns, (False, False, False, True))]
    assert encode_conversations(chats, reader, named.template) == encode_conversations(chats, tokenizer)
    assert encode_prompt(turns[:3], reader, named.template) == encode_prompt(turns[:3], tokenizer)
    assert stop_ids(reader, named.template) == {tokenizer.end_id}
