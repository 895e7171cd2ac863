"""The proof that a chat template's masks are right for a tokenizer, or where they are not.

The template is tried on conversations made for it, and on the user's own where some are given. Everything that is
known of it beside its source comes from here: which tokens end a reply, and whether it rewrites earlier turns.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.templates.jinja_template import (
    ENDS,
    FORGERY,
    PREFIX,
    STABLE,
    TEMPLATE_REFUSES,
    WHOLE,
    JinjaTemplate,
    Row,
    TemplateWriter,
    Tools,
    Unproven,
    WithoutEnd,
    sentinel,
    with_sentinels,
)
from lumina_ds.data.templates.leaves import Message, leaves
from lumina_ds.data.templates.samples import (
    MANY,
    SYSTEM,
    Sample,
    called,
    exchange,
    forgeries,
    samples,
)
from lumina_ds.data.templates.text_ids import SENTENCEPIECE
from lumina_ds.data.tokenizer.sentencepiece_file import read_model_file
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError

VERSION = 1
RENDERS = "renders"
# What is proven, in the order in which it is shown.
CONDITIONS = {
    RENDERS: "the template takes a question and an answer, which the tokenizer reads as transformers does",
    ENDS: "a token of its own ends every reply, and is a label",
    PREFIX: "the ids of a generation's prompt are a strict prefix of the trained ids, and none of them is a label",
    WHOLE: "every text stands whole and once in what is trained, and replies are labels",
    STABLE: "replies stay as they are when later turns are added",
    FORGERY: "no text becomes a special token",
}


class Counterexample(NamedTuple):
    """A conversation for which a condition does not hold."""

    condition: str
    reason: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass
class Certificate:
    """What was found. `counterexamples` of a condition say why it does not hold; `refused` counts what a template need
    not take, by kind and reason; `examples` are conversations with their proven rows."""

    template: JinjaTemplate
    tokenizer_digest: str
    counterexamples: list[Counterexample] = field(default_factory=list)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_tried: int = 0
    num_own: int = 0
    num_own_refused: int = 0
    examples: list[tuple[Sample, Row]] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.counterexamples

    def failed(self, condition: str) -> Counterexample | None:
        """The first counterexample of a condition."""
        return next((one for one in self.counterexamples if one.condition == condition), None)

    @property
    def digest(self) -> str:
        """SHA-256 of what is certified: the template, the tokenizer, and what was found of both."""
        content = {"version": VERSION, "tokenizer": self.tokenizer_digest, "template": self.template.digest} | {
            "stops": list(self.template.stops),
            "ends_with_next": self.template.ends_with_next,
            "rewrites": self.template.rewrites,
            "failed": sorted({one.condition for one in self.counterexamples}),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def certified(self, tokenizer_name: str) -> JinjaTemplate:
        """The template with the certificate's digest; DataError where it has none."""
        if self.holds:
            return replace(self.template, certificate=self.digest)
        first = self.counterexamples[0]
        raise DataError(
            f"chat template {self.template.name} has no certificate for {tokenizer_name}: not proven that "
            f"{CONDITIONS[first.condition]} ({first.reason}); lumina template check shows where"
        )


def certify(
    template: JinjaTemplate, tokenizer: Tokenizer, own: Iterable[tuple[Sequence[Message], Sequence[bool], Tools]] = ()
) -> Certificate:
    """Try the template. own: messages, labels by message, and tools of the user's conversations.

    Of these, what the template itself refuses, or has nothing to train in, is counted and speaks not against it.
    """
    found = Certificate(template, tokenizer.digest)
    spaces = _other_spaces(template, tokenizer)
    if spaces is not None:
        found.counterexamples.append(Counterexample(RENDERS, spaces, exchange("a question", "an answer")))
        return found
    try:
        _find_ends(found, template.with_tokenizer(tokenizer))
    except RejectedLine as refusal:
        found.counterexamples.append(Counterexample(RENDERS, refusal.reason, exchange("a question", "an answer")))
    if not found.holds:
        return found
    writer = found.template.with_tokenizer(tokenizer)
    for sample in samples():
        _try(found, writer, sample)
    for sample, plain in forgeries(list(writer.encoder.control_names)):
        _try_forgery(found, writer, sample, plain)
    for messages, trained, tools in own:
        _try_own(found, writer, messages, trained, tools)
    return found


def _other_spaces(template: JinjaTemplate, tokenizer: Tokenizer) -> str | None:
    """Why transformers reads the texts between special tokens otherwise: a SentencePiece model that puts a space before
    each text does so there at the beginning of the conversation only, unless its configuration says `legacy`."""
    if tokenizer.file_name != SENTENCEPIECE or template.tokenizer_config is None:
        return None
    config = json.loads(template.tokenizer_config)
    is_legacy = config.get("legacy") is True and config.get("add_prefix_space") in (None, True)
    if is_legacy or not read_model_file(tokenizer.path.read_bytes()).adds_dummy_prefix:
        return None
    return (
        f"{tokenizer.path} puts a space before every text, and tokenizer_config.json beside it does not say legacy: true, so "
        "transformers puts one at the beginning alone; name a tokenizer.json, which AutoTokenizer.from_pretrained(FOLDER)"
        ".save_pretrained(FOLDER) writes"
    )


def _find_ends(found: Certificate, writer: TemplateWriter) -> None:
    """Fill in stops, ends_with_next and rewrites."""
    question = exchange("a", "b")
    last = _end_of_reply(writer, question)
    try:
        middle = _end_of_reply(writer, [*question, *question], may_be_next=last is None)
    except RejectedLine:
        middle = last
    stops = tuple(dict.fromkeys(stop for stop in (last, middle) if stop is not None))
    found.template = replace(found.template, stops=stops, ends_with_next=last is None and bool(stops))
    if not stops:
        reason = f"{found.template.name} writes no special token of this tokenizer after a reply, so none would end"
        found.counterexamples.append(Counterexample(ENDS, reason, question))
        return
    found.template = replace(found.template, rewrites=len(stops) > 1 or _rewrites(writer))
    foreign = _foreign_labels(writer, question)
    if foreign:
        found.counterexamples.append(Counterexample(PREFIX, f"{found.template.name} {foreign}", question))


def _end_of_reply(writer: TemplateWriter, messages: list[dict[str, Any]], may_be_next: bool = False) -> str | None:
    """Name of the first special token after the first reply and before the next content.

    may_be_next: it belongs to the next turn. Then nothing but white space may stand between, and it must not begin replies
    too, or it would say nothing.
    """
    text, encoded, _ = writer.rendered(with_sentinels(messages), None)
    asked, own = sentinel(0), sentinel(1)
    if asked not in text or own not in text:
        raise RejectedLine(TEMPLATE_REFUSES, "it drops the content of a turn")
    begin, after = text.find(own), text.rfind(own) + len(own)
    following = text.find(sentinel(2), after)
    until = following if following >= 0 else len(text)
    control = next((one for one in encoded.controls if after <= one.begin < until), None)
    if control is None:
        return None
    header = {one.id for one in encoded.controls if text.find(asked) < one.begin < begin}
    if may_be_next and (control.id in header or text[after : control.begin].strip()):
        return None
    return writer.encoder.name_of(control.id)


def _foreign_labels(writer: TemplateWriter, question: list[dict[str, Any]]) -> str | None:
    """What a template writes after the prompt of a generation that would be a label and is no part of a reply."""
    marked = with_sentinels(question)
    text, encoded, _ = writer.rendered(marked, None)
    prompt = writer.text(marked[:1], None, add_generation_prompt=True)
    if not text.startswith(prompt):
        return None  # the proof of each conversation says so
    asked, own = sentinel(0), sentinel(1)
    if asked in text[len(prompt) :]:
        return "writes the question again within the reply, where it would be a label"
    opening = next((one.id for one in encoded.controls if len(prompt) <= one.begin < text.find(own)), None)
    if opening is not None and opening in {one.id for one in encoded.controls if one.begin < text.find(asked)}:
        name = writer.encoder.name_of(opening)
        return f"leaves {name}, which begins a turn, to the reply; let add_generation_prompt write the reply's header"
    return None


def _rewrites(writer: TemplateWriter) -> bool:
    """Does an earlier reply change when later turns are added, reasoning and calls included?"""
    thought = exchange("a", "b", "c")
    tagged = exchange("a", "<think>\nb\n</think>\n\nc")
    for earlier in (exchange("a", "b"), thought, tagged, called("b")):
        try:
            alone = writer.text(earlier, None)
            whole = writer.text([*earlier, *exchange("d", "e")], None)
        except RejectedLine:
            continue
        marked = writer.text(with_sentinels(earlier), None)
        ends = [
            marked.rfind(sentinel(n)) + len(sentinel(n)) for n in range(len(leaves(earlier))) if sentinel(n) in marked
        ]
        # What stands after the last text of the reply, an end of the whole conversation for one, is no part of it.
        kept = len(alone) - (len(marked) - max(ends, default=0))
        if not whole.startswith(alone[:kept]):
            return True
    return False


def _try(found: Certificate, writer: TemplateWriter, sample: Sample) -> None:
    found.num_tried += 1
    try:
        row = writer.row(sample.messages, sample.trained, sample.tools)
    except Unproven as fault:
        if sample.kind in (None, SYSTEM, MANY) and not (sample.kind == SYSTEM and fault.condition == WHOLE):
            found.counterexamples.append(Counterexample(fault.condition, fault.reason, sample.messages, sample.tools))
        else:
            found.refused[sample.kind or "", fault.reason] += 1
    except RejectedLine as refusal:
        if sample.kind is None or isinstance(refusal, WithoutEnd):
            found.counterexamples.append(Counterexample(RENDERS, refusal.reason, sample.messages, sample.tools))
        else:
            found.refused[sample.kind, refusal.reason] += 1
    else:
        if sample.kind is None and any(leaf.text not in row.text for leaf in leaves(sample.messages)):
            reason = "it changes white space within a text, which line breaks and indents are lost by"
            found.counterexamples.append(Counterexample(WHOLE, reason, sample.messages, sample.tools))
            return
        if sample.kind not in {example.kind for example, _ in found.examples}:
            found.examples.append((sample, row))


def _try_forgery(found: Certificate, writer: TemplateWriter, sample: Sample, plain: Sample) -> None:
    found.num_tried += 1
    try:
        spelled, expected = (writer.row(one.messages, one.trained) for one in (sample, plain))
    except RejectedLine as fault:
        condition = fault.condition if isinstance(fault, Unproven) else FORGERY
        found.counterexamples.append(Counterexample(condition, fault.reason, sample.messages))
        return
    control_ids = writer.encoder.control_ids
    found_ids, expected_ids = ([i for i in row.ids if i in control_ids] for row in (spelled, expected))
    if found_ids != expected_ids:
        found.counterexamples.append(Counterexample(FORGERY, "a text has become a special token", sample.messages))


def _try_own(
    found: Certificate, writer: TemplateWriter, messages: Sequence[Message], trained: Sequence[bool], tools: Tools
) -> None:
    found.num_own += 1
    own = [dict(message) for message in messages]
    try:
        row = writer.row(messages, trained, tools)
    except RejectedLine as fault:
        found.num_own_refused += 1
        found.refused["your own", fault.reason] += 1
        condition = RENDERS if isinstance(fault, WithoutEnd) else getattr(fault, "condition", None)
        if condition in (RENDERS, ENDS, STABLE):
            found.counterexamples.append(
                Counterexample(condition, fault.reason, own, [dict(tool) for tool in tools or ()] or None)
            )
        return
    if found.num_own - found.num_own_refused <= 3:
        found.examples.append((Sample("your own", own, [dict(tool) for tool in tools or ()] or None), row))


def to_json(found: Certificate) -> dict[str, Any]:
    """The certificate as `lumina template check --json` prints it."""
    template = found.template
    return {
        "template": template.name,
        "template_digest": template.digest,
        "tokenizer_digest": found.tokenizer_digest,
        "certified": found.holds,
        "digest": found.digest if found.holds else None,
        "stops": list(template.stops),
        "ends_with_next": template.ends_with_next,
        "rewrites": template.rewrites,
        "conditions": [
            {"condition": name, "meaning": meaning, "holds": found.failed(name) is None}
            for name, meaning in CONDITIONS.items()
        ],
        "counterexamples": [one._asdict() for one in found.counterexamples],
        "refused": [
            {"kind": kind, "reason": reason, "count": count} for (kind, reason), count in found.refused.items()
        ],
        "tried": found.num_tried,
        "own": {"conversations": found.num_own, "refused": found.num_own_refused},
    }
