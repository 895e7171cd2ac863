"""A model's own chat template at work: ids as transformers makes them, and a mask that is proven for each conversation.

No tag in the template says what an assistant writes. Where a reply begins is told by rendering the turns before it
with the generation prompt: that text, and its ids, must be a prefix of the whole. Where it ends is told by rendering
the conversation once more with a sentinel in place of every text: the first token after the last sentinel of the
reply that ends replies. Both renderings must hold the same control tokens, so no text has become one. What cannot be
proven so is refused, line by line; certificate.py proves a template before the first line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, takewhile
from typing import Any, NamedTuple

from lumina_ds.data.conversation import NOTHING_TO_TRAIN
from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.templates.leaves import REASONING, Leaf, Message, all_texts, leaves, replace_all, replace_leaves
from lumina_ds.data.templates.render import TemplateRefusal, TemplateWithoutEnd, render
from lumina_ds.data.templates.text_ids import GUARDS, TextEncoder, TextIds, text_encoder
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.foreign_files import shorten

TEMPLATE_REFUSES = "refused by the template"
UNPROVEN = "mask not proven"
# What a proof may lack, as certificates name it.
PREFIX, ENDS, WHOLE, STABLE, FORGERY = "prefix", "ends", "whole", "stable", "forgery"

Tools = Sequence[Mapping[str, Any]] | None


class WithoutEnd(RejectedLine):
    """A template that computes or writes without end: no fault of the conversation, so nothing goes on after it."""


class Unproven(RejectedLine):
    """A conversation whose mask cannot be proven; `condition` says what is missing."""

    def __init__(self, condition: str, reason: str) -> None:
        super().__init__(UNPROVEN, reason)
        self.condition = condition


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template in Jinja with what its certificate found for a tokenizer.

    special_tokens: (name, text) pairs that the source knows. day: year-month-day that it may write. stops: control
    tokens that end a reply. ends_with_next: the first token of the next turn ends a reply. rewrites: earlier turns
    change when later ones are added, so that only the last reply is trained. certificate: its digest.
    tokenizer_config: the content of the file that came with the tokenizer. for_tools: where the folder has another template
    for conversations with tools, which this one then refuses.
    """

    name: str
    source: str
    special_tokens: tuple[tuple[str, str], ...] = ()
    day: str | None = None
    stops: tuple[str, ...] = ()
    ends_with_next: bool = False
    rewrites: bool = False
    certificate: str | None = None
    tokenizer_config: str | None = None
    for_tools: str = ""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the source and the special tokens: what the ids depend on beside the tokenizer and the day."""
        values = ["jinja", self.source, sorted(self.special_tokens), *filter(None, [self.for_tools])]
        content = json.dumps(values, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def with_tokenizer(self, tokenizer: Tokenizer) -> TemplateWriter:
        """The template at work, with ids."""
        return TemplateWriter(self, text_encoder(tokenizer))


class Rendered(NamedTuple):
    """A rendering and its ids; `guard` stands in every special token that a content spells."""

    text: str
    encoded: TextIds
    guard: str = ""


class Guarded(NamedTuple):
    """Messages and tools with `guard` inside every special token that a text spells; "" where none does."""

    messages: Sequence[Message]
    tools: Tools
    guard: str


class Span(NamedTuple):
    """The label tokens of one turn: ids[begin:end]; `text` is where their text lies in the rendering."""

    turn: int
    begin: int
    end: int
    text: tuple[int, int]


class Row(NamedTuple):
    """A conversation's ids, the spans of its labels, and the rendering they come from."""

    ids: list[int]
    spans: list[Span]
    text: str

    @property
    def mask(self) -> list[int]:
        mask = [0] * len(self.ids)
        for span in self.spans:
            mask[span.begin : span.end] = [1] * (span.end - span.begin)
        return mask


class TemplateWriter:
    """A template together with the tokenizer's reading of its texts."""

    def __init__(self, template: JinjaTemplate, encoder: TextEncoder) -> None:
        self.template = template
        self.encoder = encoder
        self._special_tokens = dict(template.special_tokens)
        names = encoder.control_names
        self.stop_ids = frozenset(names[stop] for stop in template.stops if stop in names)

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Ids that a reply continues. Raises RejectedLine."""
        chat = self._guarded(messages, tools)
        return self.rendered(chat.messages, chat.tools, True, chat.guard).encoded.ids

    def row(
        self, messages: Sequence[Message], trained: Sequence[bool], tools: Tools = None, train_reasoning: bool = True
    ) -> Row:
        """The conversation as it is trained. trained: of each message, whether it is to be a label. train_reasoning: the
        reasoning of such a message is a label too.

        Raises RejectedLine where the template refuses the messages, the mask cannot be proven, or nothing is trained.
        """
        chat = self._guarded(messages, tools)
        whole = self.rendered(chat.messages, chat.tools, False, chat.guard)
        if chat.guard and whole.text.replace(chat.guard, "") != self.text(messages, tools):
            raise Unproven(FORGERY, "the template acts on the spelling of a special token in a text; remove it there")
        found = leaves(chat.messages)
        self._check_context(chat, found, whole)
        model = self._with_sentinels(chat, found, whole)
        spans = self._spans(chat, trained, whole, model, found)
        if not train_reasoning:
            spans = [self._without_reasoning(span, chat.messages[span.turn], whole) for span in spans]
        return self._closed(whole, spans, len(chat.messages))

    def _spans(
        self, chat: Guarded, trained: Sequence[bool], whole: Rendered, model: Rendered, found: Sequence[Leaf]
    ) -> list[Span]:
        messages = chat.messages
        spans, faults = [], []
        rewrites = self.template.rewrites
        last_question = max(
            (number for number, message in enumerate(messages) if message["role"] == "user"), default=-1
        )
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or not trained[turn] or (rewrites and turn < last_question):
                continue
            try:
                spans.append(_Turn(self, chat, whole, model, found, turn).span())
            except Unproven as fault:
                # Of a reply in several turns, such a template may show all but the last otherwise than they were asked for.
                if not rewrites or turn == len(messages) - 1:
                    raise
                faults.append(fault)
        if not spans:
            raise faults[0] if faults else self._nothing(trained)
        return spans

    def text(self, messages: Sequence[Message], tools: Tools = None, add_generation_prompt: bool = False) -> str:
        """The rendering. Raises RejectedLine where the template refuses."""
        if tools and self.template.for_tools:
            raise RejectedLine(TEMPLATE_REFUSES, self._not_for_tools())
        try:
            return render(
                self.template.source, self._special_tokens, messages, tools,
                add_generation_prompt=add_generation_prompt, day=self.template.day,
            )  # fmt: skip
        except TemplateWithoutEnd as refusal:
            remedy = "mend the template, or choose another with --chat-template"
            raise WithoutEnd(TEMPLATE_REFUSES, f"chat template {self.template.name} {refusal}; {remedy}") from None
        except TemplateRefusal as refusal:
            raise RejectedLine(TEMPLATE_REFUSES, f"chat template {self.template.name}: {refusal}") from None

    def _not_for_tools(self) -> str:
        """transformers would render these with another template than other conversations."""
        return (
            f"the conversation has tools, for which the folder has another chat template, {self.template.for_tools}; write "
            "that one into a file and train all conversations with it: --chat-template FILE.jinja"
        )

    def _check_context(self, chat: Guarded, found: Sequence[Leaf], whole: Rendered) -> None:
        """Definitions of tools, questions and system turns stand in the text."""
        text, squeezed = whole.text, squeeze(whole.text, whole.guard)
        for leaf in found:
            is_context = chat.messages[leaf.turn]["role"] in ("system", "user")
            if is_context and squeeze(leaf.text, whole.guard) not in squeezed:
                raise Unproven(WHOLE, f"chat template {self.template.name} drops text of turn {leaf.turn + 1}")
        for tool in chat.tools or ():
            name = tool.get("function", tool).get("name")
            if isinstance(name, str) and name not in text:
                raise Unproven(
                    WHOLE, f"chat template {self.template.name} drops the definition of the tool {shorten(name)}"
                )

    def _nothing(self, trained: Sequence[bool]) -> RejectedLine:
        if self.template.rewrites and any(trained):
            return RejectedLine(
                NOTHING_TO_TRAIN,
                f"chat template {self.template.name} rewrites earlier turns, so only the last reply is trained, and none "
                "stands at the end or a flag switches it off",
            )
        return RejectedLine(NOTHING_TO_TRAIN, "no assistant turn is to be trained")

    def _without_reasoning(self, span: Span, message: Message, whole: Rendered) -> Span:
        """The span from the content on; its last token of reasoning stays a label where it holds some of the content."""
        if not any(message.get(key) for key in REASONING):
            return span
        begin, end = span.text
        content = str(message.get("content") or "").strip()
        at = whole.text.rfind(content, begin, end) if content else -1
        if at < 0:
            raise Unproven(
                WHOLE, f"turn {span.turn + 1} has no content after its reasoning, which is not to be trained"
            )
        before = [control for control in whole.encoded.controls if control.begin < at]
        place, start = (before[-1].place, before[-1].begin) if before else (0, 0)
        ids = self.encoder.encode(whole.text[start:at], whole.guard).ids
        pairs = zip(ids, whole.encoded.ids[place:], strict=False)
        num_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return span._replace(begin=max(span.begin, place + num_same))

    def _guarded(self, messages: Sequence[Message], tools: Tools) -> Guarded:
        spells = self.encoder.spelling.search
        texts = list(all_texts([messages, tools or ()]))
        if not any(map(spells, texts)):
            return Guarded(messages, tools, "")
        guard = next((one for one in GUARDS if not any(one in text for text in texts)), None)
        if guard is None:
            raise Unproven(FORGERY, "a text holds a special token's name and every code point from U+FDD0 to U+FDEF")

        def broken_up(text: str) -> str:
            return self.encoder.guarded(text, guard)

        guarded = [replace_all(message, broken_up) for message in messages]
        guarded_tools = replace_all(tools, broken_up) if tools else tools
        left = next((text for text in all_texts([guarded, guarded_tools or ()]) if spells(text)), None)
        if left is not None:
            raise Unproven(FORGERY, f"{shorten(left)}, a key or a role, spells a special token; rename it")
        return Guarded(guarded, guarded_tools, guard)

    def rendered(
        self, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool = False, guard: str = ""
    ) -> Rendered:
        """Text and ids, of messages that are guarded already. Raises RejectedLine."""
        text = self.text(messages, tools, add_generation_prompt)
        try:
            return Rendered(text, self.encoder.encode(text, guard), guard)
        except ValueError as error:
            raise Unproven(FORGERY, str(error)) from None

    def _with_sentinels(self, chat: Guarded, found: Sequence[Leaf], whole: Rendered) -> Rendered:
        """The rendering in which every text is its sentinel; it must hold the control tokens of the real one."""
        text = self.text(with_sentinels(chat.messages), chat.tools)
        model = Rendered(text, self.encoder.named(text), chat.guard)
        last = len(chat.messages) - 1
        for number, leaf in enumerate(found):
            if sentinel(number) not in model.text and not (
                self.template.rewrites and leaf.key in REASONING and leaf.turn < last
            ):
                raise Unproven(WHOLE, f"chat template {self.template.name} drops {leaf.key} of turn {leaf.turn + 1}")
            # Names and arguments of calls may stand in texts about them too.
            if leaf.key != "tool_calls" and model.text.count(sentinel(number)) > 1:
                raise Unproven(
                    WHOLE,
                    f"chat template {self.template.name} writes {leaf.key} of turn {leaf.turn + 1} more than once",
                )
        if [control.id for control in whole.encoded.controls] != [control.id for control in model.encoded.controls]:
            raise Unproven(FORGERY, "the texts change which special tokens the template writes")
        return model

    def _closed(self, whole: Rendered, spans: list[Span], num_messages: int) -> Row:
        """The row; where only a next turn would end the last reply, with the token that would begin it."""
        ids, last = whole.encoded.ids, spans[-1]
        if self.template.ends_with_next and last.turn == num_messages - 1:
            ids = [*ids, self.encoder.control_names[self.template.stops[0]]]
            spans = [*spans[:-1], last._replace(end=len(ids))]
        return Row(ids, spans, whole.text)


class _Turn:
    """The proof for one reply: where its labels begin and end."""

    def __init__(
        self, writer: TemplateWriter, chat: Guarded, whole: Rendered, model: Rendered, found: Sequence[Leaf], turn: int
    ) -> None:
        self._writer, self._messages, self._tools, self._turn = writer, chat.messages, chat.tools, turn
        self._whole, self._model = whole, model
        self._mine = [number for number, leaf in enumerate(found) if leaf.turn == turn]
        self._texts = [found[number] for number in self._mine]
        self._template = writer.template
        self._is_last = turn == len(chat.messages) - 1

    def span(self) -> Span:
        """Raises RejectedLine."""
        begin, text_begin = self._begin()
        control = self._end_control()
        if control is None:
            end, text_end = len(self._whole.encoded.ids), len(self._whole.text)
        else:
            place, _, at = self._whole.encoded.controls[control]
            end, text_end = place + 1, at
        if end <= begin:
            raise Unproven(ENDS, f"no token of turn {self._turn + 1} follows its generation prompt")
        self._check_whole(self._whole.text[text_begin:text_end])
        if not self._is_last:
            self._check_stable(text_end, control)
        return Span(self._turn, begin, end, (text_begin, text_end))

    def _begin(self) -> tuple[int, int]:
        """Place of the first label, and its character: both right after the generation prompt."""
        text, encoded, guard = self._whole
        prompt = self._writer.text(self._messages[: self._turn], self._tools, add_generation_prompt=True)
        what = f"the prompt of turn {self._turn + 1} is no prefix of what is trained"
        if not text.startswith(prompt) or len(prompt) == len(text):
            raise Unproven(PREFIX, f"{what}: after {shorten(_common(text, prompt)[-40:])} it differs")
        before = [control for control in encoded.controls if control.begin < len(prompt)]
        place, begin = (before[-1].place, before[-1].begin) if before else (0, 0)
        # Tokens on either side of a control token do not know of each other: the rest need not be encoded again.
        ids = self._writer.encoder.encode(prompt[begin:], guard).ids
        if encoded.ids[place : place + len(ids)] != ids:
            raise Unproven(
                PREFIX,
                f"{what}: its last tokens merge with the beginning of the reply; remove white space at its beginning",
            )
        return place + len(ids), len(prompt)

    def _end_control(self) -> int | None:
        """Which of the control tokens ends the reply; None where the text does, and a token will be added."""
        text, encoded, _ = self._model
        if not self._mine:
            raise Unproven(WHOLE, f"turn {self._turn + 1} is empty")
        after = max(text.rfind(sentinel(number)) + len(sentinel(number)) for number in self._mine)
        following = [text.find(sentinel(self._mine[-1] + 1), after)]
        until = following[0] if following[0] >= 0 else len(text)
        controls = [(number, one) for number, one in enumerate(encoded.controls) if after <= one.begin < until]
        for number, one in controls:
            if one.id in self._writer.stop_ids:
                return number
        if self._template.ends_with_next:
            if controls and not self._is_last:
                return controls[0][0]
            if self._is_last and not controls:
                return None
        own = self._own_controls(after)
        if own is None:
            raise Unproven(ENDS, f"no token ends turn {self._turn + 1}")
        return own

    def _own_controls(self, after: int) -> int | None:
        """The last control token that the turn has when no other follows it, as calls of tools have ends of their own."""
        encoded = self._model.encoded
        if not self._is_last:
            alone = with_sentinels(self._messages[: self._turn + 1])
            encoded = self._writer.encoder.named(self._writer.text(alone, self._tools))
        own = [number for number, control in enumerate(encoded.controls) if control.begin >= after]
        return own[-1] if own else None

    def _check_whole(self, text: str) -> None:
        guard = self._whole.guard
        squeezed = squeeze(text, guard)
        for leaf in self._texts:
            if leaf.key != "tool_calls" and squeeze(leaf.text, guard) not in squeezed:
                raise Unproven(
                    WHOLE, f"the {leaf.key} of turn {self._turn + 1} is not whole in what the template makes of it"
                )

    def _check_stable(self, until: int, control: int | None) -> None:
        alone = self._writer.text(self._messages[: self._turn + 1], self._tools)
        name = "" if control is None else self._writer.encoder.name_of(self._whole.encoded.controls[control].id) or ""
        expected = self._whole.text[:until]
        if self._template.ends_with_next:
            is_same = alone.rstrip() == expected.rstrip()
        else:
            is_same = alone.startswith(expected + name)
        if not is_same:
            raise Unproven(STABLE, f"turn {self._turn + 1} changes when later turns are added")


def sentinel(number: int) -> str:
    """A text that no template or conversation holds, and that trimming leaves as it is."""
    return f"Zq{number}vXwQz"


def with_sentinels(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with sentinel(n) in place of the n-th of leaves()."""
    numbers = count()
    return replace_leaves(messages, lambda text: sentinel(next(numbers)))


def squeeze(text: str, guard: str) -> str:
    """`text` without the guard and without white space, which templates trim and add at will."""
    return "".join((text.replace(guard, "") if guard else text).split())


def _common(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]
