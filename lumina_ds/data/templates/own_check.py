"""The same conditions for a template of the table, which is made of ids around each content: tried, not rendered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lumina_ds.config.chat_templates import ChatTemplate
from lumina_ds.data.chat_template import encode_conversations, encode_prompt
from lumina_ds.data.templates.certificate import ENDS, FORGERY, PREFIX, STABLE, WHOLE, Counterexample
from lumina_ds.data.templates.leaves import Message
from lumina_ds.data.templates.samples import CALLS, REASONING, Sample, forgeries, samples
from lumina_ds.data.tokenizer.tokenizer import MARKERS, Tokenizer
from lumina_ds.data.turns import Conversation, Turn


def try_entry(
    template: ChatTemplate, tokenizer: Tokenizer, own: Iterable[Sequence[Message]] = ()
) -> tuple[int, list[Counterexample]]:
    """(number of conversations, those for which something does not hold). own: the user's, of contents alone."""
    names = [*tokenizer.special_tokens, *MARKERS]
    chats = [sample for sample in samples() if sample.kind not in (CALLS, REASONING)]
    chats += [spelled for spelled, _ in forgeries(names)]
    chats += [Sample(None, [dict(message) for message in messages]) for messages in own]
    return len(chats), [fault for chat in chats for fault in _faults(chat, template, tokenizer)]


def _faults(chat: Sample, template: ChatTemplate, tokenizer: Tokenizer) -> Iterator[Counterexample]:
    turns = tuple(Turn(message["role"], message["content"]) for message in chat.messages)
    ((ids, mask),) = encode_conversations([Conversation(turns)], tokenizer, template)
    markers = {*tokenizer.special_tokens.values(), *tokenizer.ids_of(MARKERS)}
    labels = [0] * len(ids)
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt = encode_prompt(turns[:number], tokenizer, template)
        (content,) = tokenizer.encode_batch([turn.content])
        after = tokenizer.ids_of(template.after["assistant"])
        reply = [*content, *after]
        end = len(prompt) + len(reply)
        if ids[: len(prompt)] != prompt or len(prompt) == len(ids):
            yield Counterexample(PREFIX, f"the prompt of turn {number + 1} is no prefix", chat.messages)
        if ids[len(prompt) : end] != reply:
            yield Counterexample(WHOLE, f"turn {number + 1} is not whole", chat.messages)
        if not after:
            yield Counterexample(ENDS, f"no token ends turn {number + 1}", chat.messages)
        if markers & set(content):
            yield Counterexample(FORGERY, f"a text of turn {number + 1} has become a special token", chat.messages)
        ((alone, _),) = encode_conversations([Conversation(turns[: number + 1])], tokenizer, template)
        if ids[: len(alone)] != alone:
            yield Counterexample(STABLE, f"turn {number + 1} changes when later turns are added", chat.messages)
        labels[len(prompt) : end] = [1] * len(reply)
    if labels != mask:
        yield Counterexample(PREFIX, "labels are not the replies and their ends", chat.messages)
