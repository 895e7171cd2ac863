"""The kinds of lines: what each means, that equal conversations give equal shards, and a kind added from outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.data.conversation import Conversation, Turn, parse_conversation
from lumina_ds.data.formats import FORMATS, DataFormat, pair
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.strict_json import RejectedLine

TURNS = (Turn("user", "a\n b"), Turn("assistant", " c"))
CHAT = [{"role": "user", "content": "a\n b"}, {"role": "assistant", "content": " c"}]
# The same conversation, in every kind.
SAME: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": "a\n b"}, {"from": "gpt", "value": " c"}]},
    "alpaca": {"instruction": "a", "input": " b", "output": " c", "history": None},
    "prompt-completion": {"prompt": "a\n b", "completion": " c"},
    "instruction-response": {"instruction": "a\n b", "response": " c"},
    "oasst": {
        "prompt": {
            "role": "prompter",
            "text": "a\n b",
            "replies": [
                {"role": "assistant", "text": "x", "rank": 1},
                {"role": "assistant", "text": " c", "rank": 0, "replies": [{"role": "prompter", "text": "more"}]},
            ],
        }
    },
    "preference": {"prompt": "a\n b", "chosen": " c", "rejected": "x"},
}


def parsed(document: dict[str, Any]) -> Conversation:
    return parse_conversation(json.dumps(document).encode())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_an_example_that_is_read(name: str) -> None:
    form = FORMATS[name]
    read = parsed(form.example)
    role = "text" if name == "text" else "assistant"
    assert read.turns[-1] == Turn(role, "Hi, how are you?") and read.trained[-1] and not read.other_keys
    assert parse_conversation(json.dumps(form.example).encode(), format_name=name) == read
    assert form.keys <= form.example.keys() and set(form.example) <= form.keys | form.optional


def test_equal_conversations_are_equal_in_every_format() -> None:
    assert SAME.keys() == FORMATS.keys() - {"text"}
    for document in SAME.values():
        read, more = parsed(document), parsed({**document, "system": "s", "id": 3})
        assert (read.turns, read.trained, read.other_keys) == (TURNS, (False, True), ())
        assert (more.turns, more.other_keys) == ((Turn("system", "s"), *TURNS), ("id",))


@pytest.mark.parametrize(
    ("document", "turns"),
    [
        ({"instruction": "a", "output": "b"}, "ab"),
        ({"instruction": "", "input": "a", "output": "b"}, "ab"),
        ({"instruction": "c", "output": "d", "history": [["a", "b"]]}, "abcd"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, None),
        ({"messages": None, "prompt": "a", "completion": "b"}, "ab"),
        ({"messages": [], "conversations": None, "instruction": "a", "response": "b"}, "ab"),
    ],
)
def test_what_may_be_left_out_or_added(document: dict[str, Any], turns: str | None) -> None:
    roles = ("user", "assistant") * 2
    expected = TURNS if turns is None else tuple(map(Turn, roles, turns))
    assert parsed(document) == Conversation(expected)


def test_messages_of_a_line_win_and_the_rest_is_named() -> None:
    read = parsed({"messages": CHAT, "prompt": "x", "completion": "y"})
    assert read.turns == TURNS and sorted(read.other_keys) == ["completion", "prompt"]


def test_flags_in_lists_of_messages_are_obeyed() -> None:
    off = {"role": "assistant", "content": "bad", "weight": 0}
    read = parsed({"prompt": [*CHAT[:1], off, *CHAT[:1]], "completion": CHAT[1:]})
    assert read.trained == (False, False, False, True)


@pytest.mark.parametrize(
    ("document", "rule", "reason"),
    [
        ({"instruction": "a", "output": "b", "response": "c"}, "two formats", "alpaca and of instruction-response"),
        ({"instruction": "", "output": "b"}, "empty content", "'instruction' and 'input' are empty"),
        ({"instruction": "a", "output": ""}, "empty content", "'output' is empty"),
        ({"instruction": 1, "output": "b"}, "wrong type", "'instruction' is a number"),
        ({"instruction": "a", "output": "b", "history": {}}, None, ""),
        ({"instruction": "a", "output": "b", "history": "x"}, "wrong type", "'history' is a string"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "wrong type", "entry 1 of 'history'"),
        ({"prompt": "a", "completion": [CHAT[1]]}, "wrong type", "'completion' is a list"),
        ({"prompt": "a", "completion": "b", "tools": [1]}, "tool definition", "entry 1 of 'tools'"),
        ({"prompt": "a"}, "missing key", "lumina data formats"),
        ({"chosen": "b", "rejected": "c"}, "preference without a prompt", "give the prompt"),
        ({"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}, "two formats", "with --format"),
        ({"text": "a", "role": "user"}, "missing key", "no key 'messages'"),
        ({"text": ["a"]}, "wrong type", "'text' is a list"),
        ({"text": ""}, "empty content", "'text' is empty"),
        ({"text": "a", "system": "b"}, "unsupported system", "has no turns"),
        ({"text": "a", "tools": [{"name": "f"}]}, "unsupported tools", "has no turns"),
        ({"text": "a", "train": False}, "unsupported train", "so not all is to be trained"),
        ({"prompt": {"role": "x", "text": "a"}}, "unknown role", "depth 1 of the tree"),
        ({"prompt": {"role": "prompter", "text": 1}}, "wrong type", "no string under 'text'"),
        ({"prompt": {"role": "prompter", "text": "a", "replies": 1}}, "wrong type", "'replies' at depth 1"),
        ({"prompt": {"role": "prompter", "text": "a", "replies": [1]}}, "wrong type", "at depth 2"),
        ({"prompt": {"role": "prompter", "text": "a"}}, "no assistant turn", "best path of the tree"),
    ],
)
def test_refusals(document: dict[str, Any], rule: str | None, reason: str) -> None:
    if rule is None:
        assert parsed(document).turns
        return
    with pytest.raises(RejectedLine) as refused:
        parsed(document)
    assert refused.value.rule == rule and reason in refused.value.reason


def preprocess(lines: list[dict[str, Any]], folder: Path, tokenizer: Path) -> ShardFolder:
    folder.mkdir()
    source = folder / "lines.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        "preprocess",
        source,
        "--tokenizer",
        tokenizer,
        "--seq-length",
        64,
        "--workers",
        1,
        "--out",
        folder / "out",
    ]
    assert run_command(cli, [str(word) for word in words]) == 0
    return ShardFolder.open(folder / "out")


def test_equal_conversations_give_equal_shards(tmp_path: Path, corpus: Any) -> None:
    shards = {
        name: preprocess([document] * 20, tmp_path / name, corpus.tokenizer).path / "shard-00000.arrow"
        for name, document in SAME.items()
    }
    assert len({path.read_bytes() for path in shards.values()}) == 1


def test_lines_far_shorter_than_messages_between_others(tmp_path: Path, corpus: Any) -> None:
    """The reader's arrays are sized for lists of messages, and the compiled scanner goes on behind such a line."""
    short = {"instruction": "a", "output": "b", "history": [["c", "d"]] * 200}
    made = preprocess([short, SAME["messages"]] * 30, tmp_path / "mixed", corpus.tokenizer)
    long_, plain = ([len(made.document(row)[0]) for row in range(first, 60, 2)] for first in (0, 1))
    assert len(set(long_)) == len(set(plain)) == 1 and long_[0] > 400 and made.manifest.totals.conversations == 60


def test_a_format_from_outside_is_one_entry(
    tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = DataFormat(
        "a question and an answer", {"q": "Hello", "a": "Hi"}, frozenset({"q", "a"}), messages=pair("q", "a")
    )
    monkeypatch.setitem(FORMATS, "questions", questions)
    toy = preprocess([{"q": "a\n b", "a": " c"}] * 20, tmp_path / "toy", corpus.tokenizer)
    plain = preprocess([SAME["messages"]] * 20, tmp_path / "plain", corpus.tokenizer)
    assert (toy.path / "shard-00000.arrow").read_bytes() == (plain.path / "shard-00000.arrow").read_bytes()
    capsys.readouterr()
    assert run_command(cli, ["data", "formats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["questions"]["example"] == {"q": "Hello", "a": "Hi"}
    assert run_command(cli, ["data", "formats"]) == 0
    assert 'questions: a question and an answer\n  {"q": "Hello", "a": "Hi"}' in capsys.readouterr().out


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def parts(**keys):
    return {"messages": [U, {"role": "assistant", "content": [{"type": "text", "text": "x", **keys}]}]}


@pytest.mark.parametrize(
    ("document", "rule"),
    [
        (parts(train=False), "unsupported train of a part"),
        (parts(weight=0), "unsupported weight of a part"),
        (parts(masked=True), "unsupported masked of a part"),
        (parts(image_url={"url": "u"}), "unsupported image_url of a part"),
        (parts(thinking="hm"), "unsupported thinking of a part"),
        ({"messages": [U, A], "chosen": "c", "rejected": "r"}, "two formats"),
        ({"conversations": [{"from": "human", "value": "q"}], "chosen": "c", "rejected": "r"}, "two formats"),
        ({"prompt": "p", "completion": "c", "label": False}, "answer not to be learned"),
        ({"instruction": "i", "input": "x", "context": "y", "response": "o"}, "two inputs"),
        ({"conversations": [{"from": "human", "role": "assistant", "value": "q"}, {"from": "gpt", "value": "a"}]}, "two roles"),
        ({"messages": [U, {**A, "value": "b"}]}, "two contents"),
    ],
)  # fmt: skip
def test_what_says_two_things_is_refused(document, rule):
    with pytest.raises(RejectedLine) as refused:
        parse_conversation(json.dumps(document).encode())
    assert refused.value.rule == rule


@pytest.mark.parametrize(
    ("document", "turns"),
    [
        (parts(train=True, weight=1, image_url=None, cache_control={"type": "x"}), ["q", "x"]),
        ({"messages": [U, A], "prompt": "p", "response": "o"}, ["q", "a"]),
        ({"messages": [U, A], "chosen": None, "rejected": ""}, ["q", "a"]),
        ({"prompt": "p", "completion": "c", "label": True}, ["p", "c"]),
        ({"instruction": "i", "context": "x", "response": "o", "category": "k"}, ["i\nx", "o"]),
        ({"instruction": "i", "input": "", "context": None, "response": "o"}, ["i", "o"]),
        ({"messages": [{**U, "from": "a@b.c"}, {**A, "value": "a"}]}, ["q", "a"]),
    ],
)
def test_what_says_one_thing_is_taken(document, turns):
    read = parse_conversation(json.dumps(document).encode())
    assert [turn.content for turn in read.turns] == turns
    if "cache_control" in json.dumps(document):
        assert read.other_keys == (), "what a server caches is no target"
