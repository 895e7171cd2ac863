"""Prompts from a file: what is read, what is refused before a model is loaded, and replies beside their documents."""

import json

import pytest

from lumina_ds.data.turns import Conversation, ToolCall, Turn
from lumina_ds.errors import ConfigError, DataError
from lumina_ds.generate import batch
from lumina_ds.generate.batch import read_prompts, replies
from lumina_ds.generate.sampling import SamplingSettings


def written(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_prompt_or_messages_a_line_and_the_rest_of_the_document_stays(tmp_path):
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = written(tmp_path, {"prompt": "p", "id": 7}, "", {"messages": talk})
    assert read_prompts(path, system="be brief") == [
        ({"prompt": "p", "id": 7}, Conversation((Turn("system", "be brief"), Turn("user", "p")))),
        ({"messages": talk}, Conversation((Turn("system", "s"), Turn("user", "u")))),
    ]


def test_tools_and_results_are_part_of_a_prompt(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
    talk = [{"role": "user", "content": "u"}, call, {"role": "tool", "content": "21"}]
    path = written(tmp_path, {"messages": talk, "tools": [{"name": "f"}]}, {"prompt": "p", "tools": [{"name": "f"}]})
    (_, first), (_, second) = read_prompts(path)
    assert first.turns[1:] == (Turn("assistant", "", tool_calls=(ToolCall("f", "{}"),)), Turn("tool", "21"))
    assert first.tools == second.tools == ('{"type": "function", "function": {"name": "f"}}',)


def test_lines_end_at_line_feeds_alone_and_roles_are_those_of_training_data(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "a\u2028b\u0085c"}\r\n{"conversations": [{"from": "human", "value": "d"}]}'.encode())
    assert [chat.turns for _, chat in read_prompts(path)] == [(Turn("user", "a\u2028b\u0085c"),), (Turn("user", "d"),)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("no json", "line 2: invalid JSON: Expecting value"),
        ([1], "line 2: a list, not an object"),
        ({"prompt": ""}, "line 2: no key 'messages' or 'conversations'"),
        ({"messages": []}, "line 2: 'messages' is empty"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "line 2: message 1 has the unknown role 'robot'"),
        ({"prompt": 5}, "line 2: 'prompt' is no text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "line 2: the last turn is the assistant's"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, says):
    with pytest.raises(DataError, match=says):
        read_prompts(written(tmp_path, {"prompt": "good"}, line))


def test_a_file_without_prompts_or_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(written(tmp_path, "", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    for name, says in (
        ("latin.jsonl", "latin.jsonl, line 1: invalid UTF-8 at byte 15"),
        ("missing.jsonl", "cannot read .*missing.jsonl"),
    ):
        with pytest.raises(DataError, match=says):
            read_prompts(tmp_path / name)


def test_a_prompt_that_does_not_fit_does_not_lose_the_others(monkeypatch):
    def answer(loaded, turns, settings, tools):
        if turns[-1].content == "long":
            raise ConfigError("the prompt has 99 tokens")
        yield from ("re", "ply")

    monkeypatch.setattr(batch, "stream_reply", answer)
    asked = [({"prompt": text}, Conversation((Turn("user", text),))) for text in ("a", "long", "b")]
    assert list(replies(None, asked, SamplingSettings())) == [
        {"prompt": "a", "reply": "reply"},
        {"prompt": "long", "reply": "", "error": "the prompt has 99 tokens"},
        {"prompt": "b", "reply": "reply"},
    ]
