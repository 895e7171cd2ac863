"""The chat template: a conversation's token ids and which of them are trained.

    [BOS] (role marker, ids of the content, end marker) per turn

The marker is one id, the content is encoded on its own and unaltered, the end marker is one id. Trained
are an assistant's content and the end marker after it, so that a model learns to stop; a turn that is switched off
is context. Generation uses
encode_prompt(), whose ids are the exact prefix that training saw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice

from lumina_ds.data.conversation import Conversation, Turn
from lumina_ds.data.tokenizer.tokenizer import END_MARKER, ROLE_MARKERS, Tokenizer

TEMPLATE_VERSION = "lumina-chat-1"
_LAYOUT = "bos (role content end)*; trained: assistant content end"
# Part of every cache key: shards made under another template must not be taken for current ones.
TEMPLATE_DIGEST = hashlib.sha256(
    "\n".join([TEMPLATE_VERSION, _LAYOUT, *ROLE_MARKERS, *ROLE_MARKERS.values(), END_MARKER]).encode()
).hexdigest()


def encode_conversations(
    conversations: Sequence[Conversation], tokenizer: Tokenizer
) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of every conversation, all contents in one batched call; mask[i] is 1 where token i is trained."""
    contents = iter(tokenizer.encode_batch([turn.content for c in conversations for turn in c.turns]))
    return [_layout(c.turns, c.trained, islice(contents, len(c.turns)), tokenizer) for c in conversations]


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """Ids of `turns` followed by the assistant's marker: what a reply continues."""
    ids, _ = _layout(
        turns, [False] * len(turns), iter(tokenizer.encode_batch([turn.content for turn in turns])), tokenizer
    )
    return [*ids, tokenizer.role_ids["assistant"]]


def _layout(
    turns: Sequence[Turn], trained: Sequence[bool], contents: Iterator[list[int]], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    mask = [0] * len(ids)
    for turn, is_trained, content in zip(turns, trained, contents, strict=True):
        ids.append(tokenizer.role_ids[turn.role])
        ids += content
        ids.append(tokenizer.end_id)
        mask.append(0)
        mask += [int(is_trained)] * (len(content) + 1)
    return ids, mask
