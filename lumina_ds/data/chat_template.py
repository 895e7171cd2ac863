"""A chat template at work: a conversation's token ids and which of them are trained.

    [BOS] (special tokens, ids of the content, special tokens) per turn

An entry of config/chat_templates.py says which special tokens; the content is encoded on its own and unaltered. Trained
are an assistant's content and what stands after it, so that a model learns to stop; a turn that is switched off
is context. Tools, calls, results and reasoning are pieces of such texts (rendering.py). Generation uses encode_prompt(), whose ids are the exact prefix that training saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, takewhile

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, TEMPLATES, ChatTemplate
from lumina_ds.data.rendering import Piece, render
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.data.turns import Conversation, TrainReasoning, Turn

_DEFAULT = TEMPLATES[DEFAULT_TEMPLATE]


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: ChatTemplate = _DEFAULT,
    train_reasoning: TrainReasoning = "yes",
) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of every conversation, all contents in one batched call; mask[i] is 1 where token i is trained."""
    rendered = [render(conversation, train_reasoning) for conversation in conversations]
    contents = iter(tokenizer.encode_batch([piece.text for pieces in rendered for piece in pieces]))
    return [_layout(pieces, islice(contents, len(pieces)), tokenizer, template) for pieces in rendered]


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    template: ChatTemplate = _DEFAULT,
    tools: Sequence[str] = (),
    train_reasoning: TrainReasoning = "yes",
) -> list[int]:
    """Ids of `turns` followed by what stands before an assistant's content: what a reply continues.

    tools: definitions as JSON text.
    """
    pieces = render(Conversation(tuple(turns), tools=tuple(tools)), train_reasoning, is_prompt=True)
    contents = iter(tokenizer.encode_batch([piece.text for piece in pieces]))
    ids, _ = _layout(pieces, contents, tokenizer, template)
    return [*ids, *tokenizer.ids_of(template.before["assistant"])]


def num_context_tokens(ids: Sequence[int], context: str, tokenizer: Tokenizer) -> int:
    """How many of the first `ids` lie wholly within `context`, the beginning of the text that they spell."""
    (alone,) = tokenizer.encode_batch([context])
    count = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(ids, alone, strict=False)))
    # Where the context ends, its tokens may differ from those of the text that goes on.
    while count < len(ids) and context.startswith(tokenizer.decode(ids[: count + 1])):
        count += 1
    return count


def _layout(
    pieces: Sequence[Piece], contents: Iterator[list[int]], tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[list[int], list[int]]:
    ids = [tokenizer.bos_id] if template.bos and tokenizer.bos_id is not None else []
    mask = [0] * len(ids)
    for piece, content in zip(pieces, contents, strict=True):
        before, after = (tokenizer.ids_of(tokens) for tokens in template.around(piece.role))
        trained = [int(piece.is_trained)] * (len(content) + len(after))
        if piece.context_bytes:
            context = piece.text.encode()[: piece.context_bytes].decode()
            count = num_context_tokens(content, context, tokenizer)
            trained[:count] = [0] * count
        ids += [*before, *content, *after]
        mask += [*[0] * len(before), *trained]
    # Nothing predicts a first token, which is one of a text where the tokenizer has no BOS.
    return ids, [0, *mask[1:]] if mask else []
