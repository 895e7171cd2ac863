"""`rejected.jsonl`: every refused line with source, line, byte offset, rule and reason, counted by rule."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lumina_ds.data.conversation import NO_ASSISTANT_TURN
from lumina_ds.data.remedies import remedy
from lumina_ds.data.shards.manifest import FileEntry, Totals
from lumina_ds.data.shards.writer import HashingFile
from lumina_ds.data.strict_json import NOT_JSON_RULES
from lumina_ds.errors import DataError
from lumina_ds.text import counted
from preprocess.journal import QuarantinePosition
from preprocess.scan import Rejection


class Quarantine:
    """Writes refused lines and counts them."""

    def __init__(self, path: Path, at: QuarantinePosition | None = None) -> None:
        """Begin, or go on after `at`; then ValueError says that the file holds something else."""
        self._file = HashingFile(path) if at is None else HashingFile.reopen(path, at.file)
        self.by_rule: Counter[str] = Counter({} if at is None else at.by_rule)
        self.first_by_rule: dict[str, str] = {} if at is None else dict(at.first_by_rule)

    @property
    def num_rejected(self) -> int:
        return self.by_rule.total()

    def add(self, rejections: Iterable[Rejection]) -> None:
        for rejection in rejections:
            self.by_rule[rejection.rule] += 1
            self.first_by_rule.setdefault(
                rejection.rule, f"{rejection.source} line {rejection.line}: {rejection.reason}"
            )
            self._file.write(json.dumps(rejection._asdict(), ensure_ascii=True).encode() + b"\n")

    def position(self) -> QuarantinePosition:
        return QuarantinePosition(
            file=self._file.position(), by_rule=dict(self.by_rule), first_by_rule=self.first_by_rule.copy()
        )

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> FileEntry:
        self._file.close()
        return self._file.entry()

    def keep_beside(self, out: Path) -> Path:
        """Move the file to OUT.rejected.jsonl, for a run that fails and publishes no folder."""
        self._file.close()
        kept = out.parent / f"{out.name}.rejected.jsonl"
        os.replace(self._file.path, kept)
        return kept

    def describe_first(self) -> str:
        """The first refused line, for a message."""
        return next(iter(self.first_by_rule.values()))


def is_too_many(num_rejected: int, num_lines: int, limit: int | float) -> bool:
    """Whether refused lines exceed `limit`: a number of them (int), or a share of the lines (float)."""
    if isinstance(limit, int):
        return num_rejected > limit
    # As a product, 29 of 100 would be more than 0.29: the quotient is rounded as 29% is.
    return num_lines > 0 and num_rejected / num_lines > limit


def too_many_rejected(totals: Totals, limit: int | float, where: Path, at_end: bool = True) -> DataError:
    """The error of data with more refused lines than --max-rejected allows; all of them stand in `where`.

    at_end: whether all lines were read.
    """
    rule, first = next(iter(totals.first_rejected.items()))
    mends = f"mend them ({rule}: {how})" if (how := remedy(rule)) else "mend them"
    rules = ", ".join(f"{count:,} {rule}" for rule, count in totals.rejected_by_rule.items())
    shown = f"{limit}" if isinstance(limit, int) else f"{limit:.4%}".rstrip("0%").rstrip(".") + "%"
    allows = (
        "raise --max-rejected"
        if isinstance(limit, int)
        else f"allow them with --max-rejected {-(-100 * totals.rejected // totals.lines)}%"
    )
    read = "" if at_end else f"; no more than the first {counted(totals.lines, 'line')} looked at"
    return DataError(
        f"{totals.rejected} of {counted(totals.lines, 'line')} rejected, more than --max-rejected {shown} "
        f"(first: {first}; by rule: {rules}{read}); all of them stand in {where}; {mends}, "
        f"or {allows}"
    )


def nothing_accepted(quarantine: Quarantine, inputs: str, out: Path) -> DataError:
    """The error of a run whose input holds no trainable conversation; it names what all lines have in common."""
    fault = common_fault(set(quarantine.by_rule), inputs)
    if not quarantine.num_rejected:
        return DataError(fault)
    first = quarantine.describe_first()
    return DataError(f"{fault} (first: {first}); all reasons stand in {quarantine.keep_beside(out)}")


def common_fault(rules: set[str], inputs: str) -> str:
    """What is wrong with inputs whose every line was refused for one of `rules`, in words."""
    if not rules:
        return f"{inputs} holds no conversations: it is empty"
    if rules <= NOT_JSON_RULES:
        return f"{inputs} is not JSONL: no line of it is JSON"
    if rules == {NO_ASSISTANT_TURN}:
        return (
            f"no assistant turn anywhere in {inputs}, so there is nothing to train; "
            "every conversation needs a message with role assistant"
        )
    return f"every line of {inputs} was rejected"
