"""A chat template at work: a conversation's token ids and which of them are trained.

    [BOS] (special tokens, ids of the content, special tokens) per turn

An entry of config/chat_templates.py says which special tokens; the content is encoded on its own and unaltered. Trained
are an assistant's content and what stands after it, so that a model learns to stop; a turn that is switched off
is context. Generation uses encode_prompt(), whose ids are the exact prefix that training saw. A model's own template
(templates/jinja_template.py) goes the same ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, TEMPLATES, ChatTemplate
from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.templates.jinja_template import JinjaTemplate, TemplateWriter
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.data.turns import Conversation, Turn, to_messages
from lumina_ds.errors import DataError

_DEFAULT = TEMPLATES[DEFAULT_TEMPLATE]
Template = ChatTemplate | JinjaTemplate


def encode_conversations(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, template: Template = _DEFAULT
) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of every conversation, all contents in one batched call; mask[i] is 1 where token i is trained.

    Raises RejectedLine where a model's own template refuses one, or its mask is not proven.
    """
    if isinstance(template, JinjaTemplate):
        writer = template.with_tokenizer(tokenizer)
        rows = []
        for conversation in conversations:
            if conversation.is_text:
                rows.append(_document(conversation.turns[0].content, tokenizer, writer))
                continue
            messages, tools = to_messages(conversation)
            row = writer.row(messages, conversation.trained, tools)
            rows.append((row.ids, row.mask))
        return rows
    contents = iter(tokenizer.encode_batch([turn.content for c in conversations for turn in c.turns]))
    return [_layout(c.turns, c.trained, islice(contents, len(c.turns)), tokenizer, template) for c in conversations]


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer, template: Template = _DEFAULT) -> list[int]:
    """Ids of `turns` followed by what stands before an assistant's content: what a reply continues.

    Raises DataError for turns that a model's own template refuses.
    """
    if isinstance(template, JinjaTemplate):
        try:
            return template.with_tokenizer(tokenizer).prompt(*to_messages(Conversation(tuple(turns))))
        except RejectedLine as refusal:
            raise DataError(refusal.reason) from None
    contents = iter(tokenizer.encode_batch([turn.content for turn in turns]))
    ids, _ = _layout(turns, [False] * len(turns), contents, tokenizer, template)
    return [*ids, *tokenizer.ids_of(template.before["assistant"])]


def stop_ids(tokenizer: Tokenizer, template: Template = _DEFAULT) -> frozenset[int]:
    """The ids each of which ends a reply."""
    if isinstance(template, JinjaTemplate):
        return template.with_tokenizer(tokenizer).stop_ids
    return frozenset(tokenizer.ids_of([template.end_token]))


def _document(text: str, tokenizer: Tokenizer, writer: TemplateWriter) -> tuple[list[int], list[int]]:
    """A text for continued pretraining: BOS, where the tokenizer puts one, the text, and the end of a text."""
    names = dict(writer.template.special_tokens)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = writer.encoder.control_names.get(names.get("eos_token", ""), min(writer.stop_ids))
    content = tokenizer.encode_plain(text)
    return [*begin, *content, end], [*(0 for _ in begin), *(1 for _ in content), 1]


def _layout(
    turns: Sequence[Turn],
    trained: Sequence[bool],
    contents: Iterator[list[int]],
    tokenizer: Tokenizer,
    template: ChatTemplate,
) -> tuple[list[int], list[int]]:
    ids = [tokenizer.bos_id] if template.bos and tokenizer.bos_id is not None else []
    mask = [0] * len(ids)
    for turn, is_trained, content in zip(turns, trained, contents, strict=True):
        before, after = tokenizer.ids_of(template.before[turn.role]), tokenizer.ids_of(template.after[turn.role])
        ids += [*before, *content, *after]
        mask += [0] * len(before) + [int(is_trained)] * (len(content) + len(after))
    return ids, mask
