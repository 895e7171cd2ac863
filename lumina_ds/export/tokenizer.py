"""The tokenizer's files of an exported folder, checked id by id against the tokenizer that made the training data."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from lumina_ds.data.chat_template import encode_conversations, encode_prompt
from lumina_ds.data.tokenizer.sentencepiece_file import read_model_file
from lumina_ds.data.tokenizer.tokenizer import END_MARKER, MARKERS, ROLE_MARKERS, Tokenizer
from lumina_ds.data.turns import Conversation, ToolCall, Turn, canonical_json, to_messages
from lumina_ds.errors import DataError, MachineError
from lumina_ds.export.chat_template import GUARD, jinja_chat_template
from lumina_ds.export.fast_tokenizer import as_text, fast_tokenizer_document

# Scripts with and without spaces, accents apart from their letters, code, numbers, white space of every kind.
SAMPLE = (
    "The quick brown fox doesn't jump over 12,345.67 lazy dogs.",
    "Zażółć gęślą jaźń. Größe, œuvre, naïve, mañana, İstanbul, Đà Nẵng.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "私は東京に住んでいます。カタカナとひらがな。你好,世界!我们今天去哪里? 안녕하세요, 반갑습니다.",
    "مرحبا بالعالم ١٢٣ שלום עולם नमस्ते दुनिया สวัสดีชาวโลก வணக்கம்",
    "e\u0301 a\u0308 \u212b \ufb01 \u00bd \uff21\uff22 \u200d\u200b\u00a0\u3000\ufeff|",
    "\U0001f600\U0001f469\u200d\U0001f52c\U0001f1f5\U0001f1f1 \U00020bb7 \ue000 \U0010ffff",
    "def f(x):\n\treturn {'a': x ** 2}  # why?\r\n\r\n    if x:\n        pass\n",
    " leading", "trailing ", "  two  ", "   ", "\n\n", "\t", "a\0b", "<0x41>", "x" * 300, "ab" * 150,
)  # fmt: skip
RUNS_OF = " -=_.*#~aA0\n你é"
LONGEST_RUN = 40
NUM_RANDOM_TEXTS = 2000
MAX_PIECES = 24


def write_tokenizer(tokenizer: Tokenizer, out: Path, context: int, with_fast: bool = True) -> None:
    """Write tokenizer.model, where that is the source, and with_fast tokenizer.json and tokenizer_config.json.

    context: tokens of the model's window. Raises DataError where the fast tokenizer would give other ids than ours.
    """
    if tokenizer.file_name == "tokenizer.model":
        shutil.copyfile(tokenizer.path, out / "tokenizer.model")
    if not with_fast:
        if tokenizer.file_name != "tokenizer.model":
            shutil.copyfile(tokenizer.path, out / "tokenizer.json")
        return
    document = fast_tokenizer_document(tokenizer)
    template = jinja_chat_template(_guarded(document), tokenizer.bos_id is not None)
    check_same_ids(tokenizer, document, template)
    (out / "tokenizer.json").write_text(as_text(document), encoding="utf-8")
    config = _tokenizer_config(tokenizer, document, template, context)
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    names = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token") if key in config}
    (out / "special_tokens_map.json").write_text(json.dumps(names, indent=1), encoding="utf-8")


def check_same_ids(tokenizer: Tokenizer, document: dict[str, Any], template: str) -> None:
    """Raise DataError at the first conversation whose rendered text gives other ids than our chat template."""
    try:
        import tokenizers
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MachineError(
            f"a fast tokenizer needs the package {error.name}; pip install 'lumina-ds[hf]', or --no-fast-tokenizer"
        ) from None
    try:
        fast = tokenizers.Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the library raises plain Exception for every fault of the file
        raise DataError(f"{tokenizer.path} cannot be written as tokenizer.json ({error}); {_REMEDY}") from error
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = canonical_json  # as transformers has it
    render = environment.from_string(template).render
    bos = "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id)
    conversations = list(_conversations(tokenizer, document))
    expected = [ids for ids, _ in encode_conversations(conversations, tokenizer)]
    rendered = []
    for one in conversations:
        messages, tools = to_messages(one)
        rendered.append(render(messages=messages, tools=tools, bos_token=bos))
    prompt = conversations[0].turns[:1]
    expected.append(encode_prompt(prompt, tokenizer))
    rendered.append(render(messages=to_messages(Conversation(prompt))[0], bos_token=bos, add_generation_prompt=True))
    found = fast.encode_batch(rendered, add_special_tokens=False)
    for text, ours, theirs in zip(rendered, expected, found, strict=True):
        if ours != theirs.ids:
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs.ids, strict=False)) if a != b), 0)
            raise DataError(
                f"a fast tokenizer made from {tokenizer.path} gives other ids than training saw, from token {place} of "
                f"{text[:60]!r}: {theirs.ids[place : place + 4]} instead of {ours[place : place + 4]}; {_REMEDY}"
            )


_REMEDY = "--no-fast-tokenizer exports without one"


def special_names(document: dict[str, Any]) -> list[str]:
    """Names of the tokens that text must not become, longest first."""
    names = [token["content"] for token in document["added_tokens"] if token["special"]]
    return sorted(names, key=lambda name: (-len(name), name))


def _guarded(document: dict[str, Any]) -> list[str]:
    return [name for name in special_names(document) if len(name) > 1]


def _conversations(tokenizer: Tokenizer, document: dict[str, Any]) -> list[Conversation]:
    """One turn of every kind about each text of the sample."""
    names = special_names(document)
    texts = [*SAMPLE, *(f"a{name}b {name}{name}" for name in names), *names]
    texts += [character * length for character in RUNS_OF for length in range(1, LONGEST_RUN)]
    texts += _random_texts(tokenizer)
    # A tokenizer.json has no way to tell the symbol from the space that it stands for; docs/hugging-face.md says so.
    texts = [text for text in texts if text and "\u2581" not in text and GUARD not in text]
    roles = list(ROLE_MARKERS)
    plain = [
        Conversation((Turn(roles[i % 3], text), Turn("assistant", texts[i - 1])))  # type: ignore[arg-type]
        for i, text in enumerate(texts)
    ]
    few = [*SAMPLE, *(f"a{name}b {name}{name}" for name in names)]
    return [*plain, *(_with_tools(text) for text in texts if text in few)]


def _random_texts(tokenizer: Tokenizer) -> list[str]:
    """Pieces of the vocabulary in random order: merges that meet in ways no real text may show."""
    generator = random.Random(0)
    ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.role_ids.values() and i != tokenizer.end_id]
    runs = (generator.choices(ids, k=generator.randint(1, MAX_PIECES)) for _ in range(NUM_RANDOM_TEXTS))
    return [tokenizer.decode(run).replace("\ufffd", "") for run in runs]


def _with_tools(text: str) -> Conversation:
    """A definition, reasoning, two calls and their results about one text."""
    calls = tuple(ToolCall("f", canonical_json({text: text}), call_id) for call_id in ("a", "b"))
    results = (Turn("tool", text, tool_call_id="a"), Turn("tool", "", tool_call_id="b"))
    turns = (Turn("user", text), Turn("assistant", text, text, calls), *results, Turn("assistant", "", "", calls[:1]))
    return Conversation(turns, tools=(canonical_json({"type": "function", "function": {"name": text}}),) * 2)


def _tokenizer_config(tokenizer: Tokenizer, document: dict[str, Any], template: str, context: int) -> dict[str, Any]:
    unknown = document["model"].get("unk_token")
    if document["model"].get("unk_id") is not None:
        unknown = document["model"]["vocab"][document["model"]["unk_id"]][0]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_MARKER,
        "pad_token": END_MARKER,
        "extra_special_tokens": [marker for marker in MARKERS if marker != END_MARKER],
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in document["added_tokens"]
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": template,
    }
    if unknown is not None:
        config["unk_token"] = unknown
    if tokenizer.bos_id is not None:
        config |= {"bos_token": tokenizer.piece(tokenizer.bos_id), "add_bos_token": True, "add_eos_token": False}
    if tokenizer.file_name == "tokenizer.model":
        # llama.cpp puts a space before every text unless its converter finds this, in a Llama or Mixtral folder.
        config["add_prefix_space"] = read_model_file(tokenizer.path.read_bytes()).adds_dummy_prefix
    return config
