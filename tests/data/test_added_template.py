"""A chat template is added by one entry, from outside the package, and data are made, read and answered with it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.chat_templates import (
    DEFAULT_TEMPLATE,
    ROLE_MARKERS,
    TEMPLATES,
    ChatTemplate,
    name_of_digest,
    template_digest,
)
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.chat_template import encode_conversations, encode_prompt
from lumina_ds.data.conversation import Conversation, Turn
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from preprocess.encode import EncodeOptions
from preprocess.prepare import prepare_training_data

# No BOS, two tokens before a system turn, nothing after a user's, two after an answer.
TOY = ChatTemplate(
    before={"system": ("<|end|>", "<|system|>"), "user": ("<|user|>",), "assistant": ("<|assistant|>",)},
    after={"system": ("<|end|>",), "user": (), "assistant": ("<|end|>", "<|end|>")},
    bos=False,
)
END, SYSTEM, USER, ASSISTANT = 2, 3, 4, 5  # where `lumina tokenizer train` puts them
CHATS = [
    [
        ("system", "be brief"),
        ("user", "what is 1 plus 2?"),
        ("assistant", "3."),
        ("user", "and 4?"),
        ("assistant", "7."),
    ],
    [("user", "say <|end|>"), ("assistant", "no"), ("assistant", "or yes")],
    *([("user", f"what is {number} plus 1?"), ("assistant", f"{number + 1}.")] for number in range(18)),
]


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEMPLATES, "toy", TOY)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    documents = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
    # The first answer of the first conversation is switched off.
    documents[0]["messages"][2]["weight"] = 0  # type: ignore[assignment]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def own(chats: Path, lumina: Callable[..., None]) -> Tokenizer:
    path = chats.with_name("tokenizer.model")
    lumina("tokenizer", "train", chats, "--vocab-size", 300, "--out", path)
    return Tokenizer.load(path)


@pytest.fixture
def make_shards(chats: Path, own: Tokenizer, tmp_path: Path, lumina: Callable[..., None]) -> Callable[..., ShardFolder]:
    """Preprocess the chats with a template, by the verb."""

    def make(name: str, *options: object) -> ShardFolder:
        words = ["--tokenizer", own.path, "--seq-length", 128, "--out", tmp_path / name, *options]
        lumina("preprocess", chats, *words, "--chat-template", name)
        return ShardFolder.open(tmp_path / name)

    return make


def by_hand(tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and mask of every chat, with the toy's tokens written out."""
    before, after = {"system": [END, SYSTEM], "user": [USER], "assistant": [ASSISTANT]}, {"user": [], "system": [END]}
    for number, chat in enumerate(CHATS):
        ids, mask = [], []
        for place, (role, text) in enumerate(chat):
            (content,) = tokenizer.encode_batch([text])
            ends = after.get(role, [END, END])
            ids += [*before[role], *content, *ends]
            is_label = role == "assistant" and (number, place) != (0, 2)
            mask += [0] * len(before[role]) + [int(is_label)] * (len(content) + len(ends))
        yield ids, mask


def documents(folder: ShardFolder) -> list[tuple[list[int], list[int]]]:
    count = folder.manifest.totals.conversations
    return [tuple(column.tolist() for column in folder.document(number)) for number in range(count)]  # type: ignore[misc]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_shards_are_those_worked_out_by_hand(
    added: None, own: Tokenizer, make_shards: Callable[..., ShardFolder], num_workers: int
) -> None:
    assert [own.end_id, *own.role_ids.values()] == [END, SYSTEM, USER, ASSISTANT]
    folder = make_shards("toy", "--workers", num_workers)
    assert documents(folder) == list(by_hand(own))
    assert folder.manifest.template.version == "toy"
    assert pickle.loads(pickle.dumps(EncodeOptions(template=TOY))).template == TOY, "for workers of other processes"


def test_a_prompt_is_a_strict_prefix_of_the_training_ids(added: None, own: Tokenizer) -> None:
    turns = [Turn(role, text) for role, text in CHATS[0]]  # type: ignore[arg-type]
    ((ids, mask),) = encode_conversations([Conversation(tuple(turns))], own, TOY)
    for count in (2, 4):
        prompt = encode_prompt(turns[:count], own, TOY)
        assert prompt == ids[: len(prompt)] and prompt[-1] == ASSISTANT
        assert len(prompt) < len(ids) and mask[len(prompt) - 1] == 0 and mask[len(prompt)] == 1


def test_shards_are_refused_by_a_configuration_that_wants_the_other(
    added: None, make_shards: Callable[..., ShardFolder], tmp_path: Path
) -> None:
    for made, wanted in (("toy", DEFAULT_TEMPLATE), (DEFAULT_TEMPLATE, "toy")):
        data = {"shards": str(make_shards(made).path), "seq_length": 128}
        config = RunConfig.model_validate({"data": {**data, "chat_template": wanted}})
        with pytest.raises(DataError, match=f"chat template {made}, not {wanted}; set --chat-template {made}"):
            prepare_training_data(config, tmp_path / "cache")
        config.data.chat_template = made
        assert prepare_training_data(config, tmp_path / "cache").shards == Path(data["shards"])


def test_digests(added: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of lumina-chat-1 stands in shards and checkpoints of before there was a table."""
    first = "cda867b0cd692c301624b3aae34c0e92cccc4afebfdcd2bbabe9d5e24b2855a6"
    assert template_digest(DEFAULT_TEMPLATE) == first and name_of_digest(first) == DEFAULT_TEMPLATE
    toy = template_digest("toy")
    assert name_of_digest(toy) == "toy" and name_of_digest("0" * 64) is None
    found = {first, toy}
    ends = {"system": ("<|end|>",), "user": ("<|end|>",), "assistant": ("<|end|>",)}
    changes: list[dict[str, Any]] = [
        {"bos": True}, {"after": ends}, {"after": {**TOY.after, "user": ("<|end|>",)}},
        {"before": {role: (marker,) for role, marker in ROLE_MARKERS.items()}},
    ]  # fmt: skip
    for change in changes:
        fields = {"before": TOY.before, "after": TOY.after, "bos": TOY.bos} | change
        monkeypatch.setitem(TEMPLATES, "toy", ChatTemplate(**fields))
        found.add(template_digest("toy"))
    assert len(found) == 2 + len(changes)


@pytest.mark.parametrize(("before", "after", "message"), [
    ({"user": ("<|assistant|>",)}, {}, r"the last token before a content is <\|user\|>"),
    ({"user": ()}, {}, r"the last token before a content is <\|user\|>"),
    ({}, {"user": ("<|eot|>",)}, r"the others are <\|end\|>"),
    ({}, {"assistant": ()}, "no reply would end"),
    ({"tool": ("<|user|>",)}, {}, "give each of system, user, assistant"),
])  # fmt: skip
def test_an_entry_that_would_mislead_is_refused(before: dict[str, Any], after: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate({**TOY.before, **before}, {**TOY.after, **after})


@pytest.mark.parametrize("verb", ["preprocess", "validate", "train"])
def test_an_unknown_name_is_refused(verb: str, chats: Path, own: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    files = (
        ["--config", "debug", "--train-data", str(chats)]
        if verb == "train"
        else [str(chats), "--tokenizer", str(own.path)]
    )
    out = ["--out", "nowhere", "--seq-length", "64"] if verb == "preprocess" else []
    assert run_command(cli, [verb, *files, *out, "--chat-template", "lumina-chat-2"]) == 2
    assert DEFAULT_TEMPLATE in capsys.readouterr().err


def test_validation_counts_with_it(
    added: None, chats: Path, own: Tokenizer, lumina: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    lumina("validate", chats, "--tokenizer", own.path, "--chat-template", "toy", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["inputs"][0]["tokens"] == sum(len(ids) for ids, _ in by_hand(own))
