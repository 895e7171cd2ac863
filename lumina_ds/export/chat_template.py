"""Our chat template in Jinja, as transformers, vLLM and llama.cpp run it: the ids of lumina_ds/data/chat_template.py.

Those programs build one text and look for special tokens in it, so a user who types `<|end|>` would end the turn.
The template therefore puts GUARD, a code point that Unicode reserves from use in text, into every special token that
a content spells, and the exported tokenizer drops GUARD after it has looked for special tokens. What is left
is the ordinary text, with the ids that training gave it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lumina_ds.data.tokenizer.tokenizer import END_MARKER, ROLE_MARKERS

GUARD = "\ufdd0"


def jinja_chat_template(guarded: Sequence[str], has_bos: bool) -> str:
    """guarded: the special tokens whose spelling in a content must stay text, longest first.

    Tools, calls, results and reasoning are written as lumina_ds/data/rendering.py does. Results are not sorted: others than
    in the order of their calls raise.
    """
    guard = "".join(f".replace({_quoted(token)}, {_quoted(split_token(token))})" for token in guarded)
    system, user, assistant = (ROLE_MARKERS[role] for role in ("system", "user", "assistant"))
    return "\n".join([
        *(["{{- bos_token }}"] if has_bos else []),
        *_DEFINITIONS,
        f"{{{{- '{system}{system}' + all.text{guard} + '{END_MARKER}' }}}}",
        "{%- endif %}",
        "{%- set open = namespace(calls=[], answered=0) %}",
        "{%- for message in messages %}",
        *_CONTENT,
        "{%- if message['role'] == 'system' %}",
        f"{{{{- '{system}' + content{guard} + '{END_MARKER}' }}}}",
        "{%- elif message['role'] == 'user' %}",
        f"{{{{- '{user}' + content{guard} + '{END_MARKER}' }}}}",
        "{%- elif message['role'] == 'assistant' %}",
        *_ASSISTANT,
        f"{{{{- '{assistant}' + turn.text{guard} + '{END_MARKER}' }}}}",
        "{%- elif message['role'] == 'tool' %}",
        *_RESULT,
        f"{{{{- '{system}{user}' + content{guard} + '{END_MARKER}' }}}}",
        "{%- else %}",
        "{{- raise_exception('unknown role ' + message['role'] + '; use system, user, assistant or tool') }}",
        "{%- endif %}",
        "{%- endfor %}",
        "{%- if add_generation_prompt %}",
        f"{{{{- '{assistant}' }}}}",
        "{%- endif %}",
    ])  # fmt: skip


_DEFINITIONS = (
    "{%- if tools %}",
    "{%- set all = namespace(text='') %}",
    "{%- for tool in tools %}",
    "{%- set whole = tool if tool['function'] is defined else {'type': 'function', 'function': tool} %}",
    "{%- set all.text = all.text + ('' if loop.first else '\\n') + (whole | tojson) %}",
    "{%- endfor %}",
)
_CONTENT = (
    "{%- if message['content'] is string %}",
    "{%- set content = message['content'] %}",
    "{%- elif not message['content'] %}",
    "{%- set content = '' %}",
    "{%- else %}",
    "{{- raise_exception('a content is no text') }}",
    "{%- endif %}",
)
_ASSISTANT = (
    "{%- set turn = namespace(text='') %}",
    "{%- if message['reasoning_content'] %}",
    "{%- set turn.text = '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' %}",
    "{%- endif %}",
    "{%- set turn.text = turn.text + content %}",
    "{%- if message['tool_calls'] %}",
    "{%- set open.calls = message['tool_calls'] %}",
    "{%- set open.answered = 0 %}",
    "{%- for call in message['tool_calls'] %}",
    "{%- set function = call['function'] if call['function'] is defined else call %}",
    "{%- set arguments = function['arguments'] if function['arguments'] is string else function['arguments'] | tojson %}",
    "{%- set written = '{\"name\": ' + (function['name'] | tojson) + ', \"arguments\": ' + arguments + '}' %}",
    "{%- set written = written.replace('</tool_call>', '<\\\\/tool_call>') %}",
    "{%- set before = '\\n' if content or not loop.first else '' %}",
    "{%- set turn.text = turn.text + before + '<tool_call>\\n' + written + '\\n</tool_call>' %}",
    "{%- endfor %}",
    "{%- endif %}",
)
_RESULT = (
    "{%- if message['tool_call_id'] and open.answered < open.calls | length %}",
    "{%- set call_id = open.calls[open.answered]['id'] %}",
    "{%- if call_id and call_id != message['tool_call_id'] %}",
    "{{- raise_exception('give the results in the order of their calls') }}",
    "{%- endif %}",
    "{%- endif %}",
    "{%- set open.answered = open.answered + 1 %}",
)


def split_token(token: str) -> str:
    """The token with GUARD after its first character, so that it cannot be found in the text."""
    overlaps = any(token.endswith(token[:length]) for length in range(1, len(token)))
    # Of "    " the token "   " would be found again from its second character on.
    return token[0] + GUARD + token[1:] + (GUARD if overlaps else "")


def _quoted(text: str) -> str:
    """A Jinja string."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
