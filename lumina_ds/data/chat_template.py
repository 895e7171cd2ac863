"""A chat template at work: a conversation's token ids and which of them are trained.

    [BOS] (special tokens, ids of the content, special tokens) per turn

An entry of config/chat_templates.py says which special tokens; the content is encoded on its own and unaltered. Trained
are an assistant's content and what stands after it, so that a model learns to stop; a turn that is switched off
is context. Tools, calls, results and reasoning are pieces of such texts (rendering.py). Generation uses encode_prompt(),
whose ids are the exact prefix that training saw. A model's own template (templates/jinja_template.py) goes the same ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, TypeAlias

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, TEMPLATES, ChatTemplate
from lumina_ds.data.rendering import Piece, first_with_reasoning, render
from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.data.turns import Conversation, TrainReasoning, Turn, to_messages
from lumina_ds.errors import DataError

if TYPE_CHECKING:  # most runs need none, and it brings a dozen modules
    from lumina_ds.data.templates.jinja_template import JinjaTemplate, TemplateWriter

_DEFAULT = TEMPLATES[DEFAULT_TEMPLATE]
Template: TypeAlias = "ChatTemplate | JinjaTemplate"


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: Template = _DEFAULT,
    train_reasoning: TrainReasoning = "yes",
) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of every conversation, all contents in one batched call; mask[i] is 1 where token i is trained.

    Raises RejectedLine where a model's own template refuses one, or its mask is not proven.
    """
    if not isinstance(template, ChatTemplate):
        writer = template.with_tokenizer(tokenizer)
        return [_own_row(conversation, tokenizer, writer, train_reasoning) for conversation in conversations]
    rendered = [render(conversation, train_reasoning) for conversation in conversations]
    contents = iter(tokenizer.encode_batch([piece.text for pieces in rendered for piece in pieces]))
    return [_layout(pieces, islice(contents, len(pieces)), tokenizer, template) for pieces in rendered]


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    template: Template = _DEFAULT,
    tools: Sequence[str] = (),
    train_reasoning: TrainReasoning = "yes",
) -> list[int]:
    """Ids of `turns` followed by what stands before an assistant's content: what a reply continues.

    tools: definitions as JSON text. Raises DataError for turns that a model's own template refuses.
    """
    asked = Conversation(tuple(turns), tools=tuple(tools))
    if not isinstance(template, ChatTemplate):
        try:
            return template.with_tokenizer(tokenizer).prompt(*_messages(asked, train_reasoning, is_prompt=True))
        except RejectedLine as refusal:
            raise DataError(refusal.reason) from None
    pieces = render(asked, train_reasoning, is_prompt=True)
    contents = iter(tokenizer.encode_batch([piece.text for piece in pieces]))
    ids, _ = _layout(pieces, contents, tokenizer, template)
    return [*ids, *tokenizer.ids_of(template.before["assistant"])]


def stop_ids(tokenizer: Tokenizer, template: Template = _DEFAULT) -> frozenset[int]:
    """The ids each of which ends a reply."""
    if not isinstance(template, ChatTemplate):
        return template.with_tokenizer(tokenizer).stop_ids
    return frozenset(tokenizer.ids_of([template.end_token]))


def _own_row(
    conversation: Conversation, tokenizer: Tokenizer, writer: TemplateWriter, train_reasoning: TrainReasoning
) -> tuple[list[int], list[int]]:
    if conversation.is_text:
        return _document(conversation.turns[0].content, tokenizer, writer)
    messages, tools = _messages(conversation, train_reasoning)
    row = writer.row(messages, conversation.trained, tools, train_reasoning != "no")
    return row.ids, row.mask


def _messages(
    conversation: Conversation, train_reasoning: TrainReasoning, is_prompt: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """What a model's own template gets; under `last` the reasoning of earlier exchanges is left out, as in render()."""
    messages, tools = to_messages(conversation)
    if train_reasoning == "last":
        for message in messages[: first_with_reasoning(conversation.turns, is_prompt)]:
            message.pop("reasoning_content", None)
    return messages, tools


def _document(text: str, tokenizer: Tokenizer, writer: TemplateWriter) -> tuple[list[int], list[int]]:
    """A text for continued pretraining: BOS, where the tokenizer puts one, the text, and the end of a text."""
    names = dict(writer.template.special_tokens)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = writer.encoder.control_names.get(names.get("eos_token", ""), min(writer.stop_ids))
    ids = [*begin, *tokenizer.encode_plain(text), end]
    # Nothing predicts a first token.
    return ids, [0, *[1] * (len(ids) - 1)]


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
