"""The turn model, and the messages that a Hugging Face chat template is given."""

from __future__ import annotations

from lumina_ds.data.turns import Conversation, ToolCall, Turn, to_messages

WEATHER = '{"type": "function", "function": {"name": "weather", "parameters": {}}}'
CALLS = Conversation(
    (
        Turn("user", "Warm?"),
        Turn(
            "assistant", "", "They ask for Ulm.", (ToolCall("weather", '{"city": "Ülm"}', "c1"), ToolCall("now", "{}"))
        ),
        Turn("tool", "21", tool_call_id="c1", name="weather"),
        Turn("assistant", "Yes."),
    ),
    tools=(WEATHER,),
)


def test_messages_for_a_hugging_face_template() -> None:
    messages, tools = to_messages(CALLS)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Ülm"}}}
    now = {"type": "function", "function": {"name": "now", "arguments": {}}}
    assert messages == [
        {"role": "user", "content": "Warm?"},
        {
            "role": "assistant", "content": "", "reasoning_content": "They ask for Ulm.", "tool_calls": [call, now],
        },
        {"role": "tool", "content": "21", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "Yes."},
    ]  # fmt: skip
    assert tools == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def test_arguments_as_text_for_templates_that_join_strings() -> None:
    messages, _ = to_messages(CALLS, arguments_as_text=True)
    assert [call["function"]["arguments"] for call in messages[1]["tool_calls"]] == ['{"city": "Ülm"}', "{}"]


def test_a_plain_chat_has_plain_messages_and_no_tools() -> None:
    chat = Conversation((Turn("user", "a"), Turn("assistant", "b")))
    assert to_messages(chat) == ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None)
    assert chat.trained == (False, True)


def test_a_text_is_trained_whole() -> None:
    document = Conversation((Turn("text", "Once upon a time."),))
    assert document.is_text and document.trained == (True,)
