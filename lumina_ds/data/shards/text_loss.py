"""What a tokenizer loses of the texts of a shard folder: a part of its manifest, and the same in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import BaseModel, ConfigDict

from lumina_ds.text import counted


class TextLoss(BaseModel):
    """What the tokenizer loses of the texts, held out ones included: ids for unknown characters (all are counted),
    and turns that do not decode to their text (of those that were tried)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    unknown_ids: int = 0
    trained_unknown_ids: int = 0
    first_unknown: list[str] = []
    first_trained_unknown: str = ""
    tried_texts: int = 0
    changed_texts: int = 0
    first_changed: list[str] = []
    lost_characters: dict[str, int] = {}

    @property
    def is_any(self) -> bool:
        return bool(self.unknown_ids or self.changed_texts)


def describe_loss(loss: TextLoss | None, num_tokens: int, num_trained_tokens: int) -> Iterator[str]:
    """Lines for a summary; they say so too where nothing is lost. None: of a folder that an earlier version made."""
    if loss is None:
        yield "unknown ids and texts that do not come back were not counted when these shards were made"
        return
    if not loss.is_any:
        yield f"0 unknown ids; 0 of {counted(loss.tried_texts, 'text')} tried do not come back from the tokenizer"
        return
    yield (
        f"{counted(loss.unknown_ids, 'unknown id')} ({loss.unknown_ids / max(1, num_tokens):.2%} of all), "
        f"{loss.trained_unknown_ids:,} of them trained ({loss.trained_unknown_ids / max(1, num_trained_tokens):.2%})"
    )
    yield from (f"  first: {place}" for place in loss.first_unknown)
    share = loss.changed_texts / max(1, loss.tried_texts)
    lost = f"; lost in all: {listed(loss.lost_characters)}" if loss.lost_characters else ""
    yield (
        f"{loss.changed_texts:,} of {counted(loss.tried_texts, 'text')} tried ({share:.1%}) "
        f"{'does' if loss.changed_texts == 1 else 'do'} not come back from the tokenizer{lost}"
    )
    yield from (f"  first: {place}" for place in loss.first_changed)


def listed(names: Mapping[str, int], most: int = 5) -> str:
    """The most frequent names, with how often each stands."""
    by_count = sorted(names.items(), key=lambda item: -item[1])
    shown = ", ".join(name if count == 1 else f"{name} x {count:,}" for name, count in by_count[:most])
    return f"{shown} and {len(by_count) - most} more" if len(by_count) > most else shown
