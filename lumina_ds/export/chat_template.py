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
    """guarded: the special tokens whose spelling in a content must stay text, longest first."""
    replaced = "".join(f".replace({_quoted(token)}, {_quoted(split_token(token))})" for token in guarded)
    lines = ["{{- bos_token }}"] if has_bos else []
    lines += [
        "{%- for message in messages %}",
        f"{{%- set content = message['content']{replaced} %}}",
    ]
    for number, (role, marker) in enumerate(ROLE_MARKERS.items()):
        lines.append(f"{{%- {'elif' if number else 'if'} message['role'] == '{role}' %}}")
        lines.append(f"{{{{- '{marker}' + content + '{END_MARKER}' }}}}")
    lines += [
        "{%- else %}",
        "{{- raise_exception('unknown role ' + message['role'] + '; use system, user or assistant') }}",
        "{%- endif %}",
        "{%- endfor %}",
        "{%- if add_generation_prompt %}",
        f"{{{{- '{ROLE_MARKERS['assistant']}' }}}}",
        "{%- endif %}",
    ]
    return "\n".join(lines)


def split_token(token: str) -> str:
    """The token with GUARD after its first character, so that it cannot be found in the text."""
    overlaps = any(token.endswith(token[:length]) for length in range(1, len(token)))
    # Of "    " the token "   " would be found again from its second character on.
    return token[0] + GUARD + token[1:] + (GUARD if overlaps else "")


def _quoted(text: str) -> str:
    """A Jinja string."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
