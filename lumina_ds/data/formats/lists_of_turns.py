"""OpenAI's messages and ShareGPT's conversations: lines of these are read as they stand (lumina_ds/data/messages.py)."""

from __future__ import annotations

from lumina_ds.data.formats.base import DataFormat

MESSAGES = DataFormat(
    "OpenAI's list of messages; tools beside it, tool_calls, tool_call_id and reasoning_content at the messages",
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, how are you?"}]},
    frozenset({"messages"}),
)
SHAREGPT = DataFormat(
    "ShareGPT's list of turns; function_call, observation and tool are turns too",
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi, how are you?"}]},
    frozenset({"conversations"}),
)
