"""The order of rows from several sources: a pure function of the seed, the weights and the position.

Every source is a stream of its own rows, shuffled anew in each pass. All streams run beside one clock: a row stands at
the time at which half of its tokens, with all of those before it, are due by the source's weight, and the mixture is
all rows by their time (as packets share a line in weighted fair queueing: Demers, Keshav and Shenker, SIGCOMM 1989). So
at any time a source has given its weight of tokens within half a row, however long its rows are, and a source that
has reached its cap leaves its place to the others in proportion.

Rows are found block by block, and a block from where the one before ended. A checkpoint keeps that place, so a resumed
run begins at once; nothing of the size of the data is held.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lumina_ds.data.mixture.shares import Weights
from lumina_ds.data.mixture.state import MixtureState, Reached, Stretch
from lumina_ds.data.sampler import FILLER_ROW, EpochOrder, TrainingOrder
from lumina_ds.errors import CheckpointError

# Part of a checkpoint's identity, as sampler.ORDER_VERSION is.
MIXTURE_VERSION = "fair-1"

Number = TypeVar("Number")

_ROWS_PER_BLOCK = 4096
_BLOCKS_HELD = 32


@dataclass(frozen=True)
class SourceStream:
    """A source's rows, pass after pass. `row_tokens` gives the tokens of rows by number; `first_row` is what its row 0
    is called in the mixture."""

    name: str
    num_rows: int
    num_tokens: int
    first_row: int
    seed: int
    row_tokens: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(
        cls, name: str, num_rows: int, num_tokens: int, first_row: int, seed: int, row_tokens: Callable[..., np.ndarray]
    ) -> SourceStream:
        """`seed` is that of the run; a source's own hangs on its name, so other sources do not change its order."""
        own = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
        return cls(name, num_rows, num_tokens, first_row, own, row_tokens)

    def rows(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: its own row numbers at positions first .. first+count-1 of its stream."""
        parts, end = [np.zeros(0, np.int64)], first + count
        while first < end:
            number, place = divmod(first, self.num_rows)
            size = min(self.num_rows - place, end - first)
            parts.append(EpochOrder(self.num_rows, self.seed, number).rows_at(np.arange(place, place + size)))
            first += size
        return np.concatenate(parts)


@dataclass(frozen=True)
class _Place:
    """A position with the rows taken of each source and their tokens, in the order of the streams."""

    position: int
    taken: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class _Stretch:
    begins: _Place
    weights: tuple[float, ...]
    caps: tuple[int | None, ...]


@dataclass(frozen=True)
class _Block:
    begins: _Place
    ends: _Place
    rows: list[int]  # as the mixture calls them
    sources: np.ndarray
    tokens: np.ndarray


class MixtureOrder(TrainingOrder):
    """The endless stream of rows of a mixture; it ends only where every source has reached its cap.

    `passes` of the mixture are the run, or None for a run that ends by steps. Positions that are passed over count as
    taken from their sources.
    """

    def __init__(
        self,
        streams: Sequence[SourceStream],
        weights: Weights,
        caps: Mapping[str, float | None],
        seed: int,
        passes: float | None = None,
    ) -> None:
        """`streams` in the order of their names; `caps` are passes over a source's own rows."""
        super().__init__(sum(stream.num_rows for stream in streams), seed)
        self.streams = tuple(streams)
        self.pass_tokens = weights.pass_tokens
        self.passes = passes
        zeros = (0,) * len(streams)
        rows = tuple(None if (cap := caps[each.name]) is None else round(cap * each.num_rows) for each in streams)
        given = tuple(weights.by_source[each.name] for each in streams)
        self._stretches = [_Stretch(_Place(0, zeros, zeros), given, rows)]
        self._anchors: list[_Place] = []
        self._blocks: deque[_Block] = deque(maxlen=_BLOCKS_HELD)
        self._ends_at: int | None = None  # where every source has reached its cap
        self._lock = threading.Lock()
        self._set_length()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(stream.name for stream in self.streams)

    @property
    def caps(self) -> dict[str, int | None]:
        """Most rows of each source in the whole run, as they hold now."""
        return dict(zip(self.names, self._stretches[-1].caps, strict=True))

    @property
    def capacity(self) -> int | None:
        """Rows that the caps leave from here on and have left so far; None where some source has none."""
        last = self._stretches[-1]
        left = [
            None if cap is None else max(0, cap - taken)
            for weight, cap, taken in zip(last.weights, last.caps, last.begins.taken, strict=True)
            if weight
        ]
        return None if None in left else last.begins.position + sum(each or 0 for each in left)

    def go_on_from(self, state: MixtureState) -> list[str]:
        """Take up the history of an earlier life, and let the present weights and caps begin where it ended if they
        differ. Returns a sentence for every source whose share or cap has changed. CheckpointError for other sources.
        """
        if tuple(sorted(state.reached.rows)) != self.names:
            raise CheckpointError(
                f"the checkpoint is of the sources {', '.join(sorted(state.reached.rows))}, not {', '.join(self.names)}; "
                "name the same ones; one with weight 0 is not trained"
            )
        present, reached = self._stretches[-1], self._place(state.reached)
        self._stretches = [
            _Stretch(self._place(each.begins), self._in_order(each.weights), self._in_order(each.caps))
            for each in state.stretches
        ]
        changes = _changes(self.names, self._stretches[-1], present)
        if changes:
            kept = [each for each in self._stretches if each.begins.position < reached.position]
            self._stretches = [*kept, _Stretch(reached, present.weights, present.caps)]
        self._blocks.clear()
        self._ends_at = None
        self._anchors.append(reached)
        self._set_length()
        return changes

    def know(self, state: MixtureState | None) -> None:
        """Begin from the place of an earlier checkpoint of this course where it is nearer than others."""
        if state is not None:
            self._anchors.append(self._place(state.reached))

    def state_at(self, position: int) -> MixtureState:
        """What a checkpoint keeps, when the next row is that of `position`."""
        return MixtureState(
            stretches=[
                Stretch(
                    begins=self._reached(each.begins),
                    weights=dict(zip(self.names, each.weights, strict=True)),
                    caps=dict(zip(self.names, each.caps, strict=True)),
                )
                for each in self._stretches
            ],
            reached=self.reached(position),
        )

    def reached(self, position: int) -> Reached:
        """Rows and tokens of each source before `position`, those passed over with them."""
        whole = self._in_whole_stream(position)
        return self._reached(self._place_at(whole if self.total_rows is None else min(whole, self.total_rows)))

    def shares_at(self, position: int) -> dict[str, float]:
        """Share of the tokens that each source is to have where `position` stands."""
        weights = self._stretch_at(self._in_whole_stream(position)).weights
        return {name: weight / sum(weights) for name, weight in zip(self.names, weights, strict=True)}

    def passes_at(self, position: int) -> dict[str, float]:
        """Passes over each source's own rows that are complete before `position`."""
        rows = self.reached(position).rows
        return {stream.name: rows[stream.name] / stream.num_rows for stream in self.streams}

    def epoch_at(self, position: int) -> float:
        """Tokens before `position` over those of a pass of the mixture."""
        return sum(self.reached(position).tokens.values()) / self.pass_tokens

    def _set_length(self) -> None:
        """`total_rows`: those whose time comes before the end of the last pass, by the weights that hold now."""
        if self.passes is None:
            return
        last = self._stretches[-1]
        rest = self.passes * self.pass_tokens - sum(last.begins.tokens)
        twice = 2 * max(0.0, rest) / sum(last.weights)
        counts = (self._rows_before(number, last, twice) for number in range(len(self.streams)))
        self.total_rows = last.begins.position + sum(counts)

    def _rows_before(self, number: int, stretch: _Stretch, twice: float) -> int:
        """Rows of one source in a stretch whose time is before half of `twice`; whole passes are not walked through."""
        stream, weight, first = self.streams[number], stretch.weights[number], stretch.begins.taken[number]
        left = _left(stretch.caps[number], first)
        count = tokens = 0
        while weight and count < left:
            place = (first + count) % stream.num_rows
            if place == 0:
                passes = int((twice * weight / 2 - tokens) // stream.num_tokens)
                passes = passes if math.isinf(left) else min(passes, int(left - count) // stream.num_rows)
                if passes > 0:
                    count, tokens = count + passes * stream.num_rows, tokens + passes * stream.num_tokens
                    continue
            size = int(min(_ROWS_PER_BLOCK, stream.num_rows - place, left - count))
            own = stream.row_tokens(stream.rows(first + count, size))
            inside = int(np.searchsorted(_times(tokens, own, weight), twice))
            count, tokens = count + inside, tokens + int(own.sum())
            if inside < size:
                break
        return count

    def _row_in_whole_stream(self, position: int) -> int:
        block = self._block_of(position)
        return FILLER_ROW if block is None else block.rows[position - block.begins.position]

    def _place_at(self, position: int) -> _Place:
        if position == 0:
            return self._stretches[0].begins
        block = self._block_of(position - 1)
        if block is None:  # beyond the end of every source
            return self._place_at(self._ends_at or 0)
        count = position - block.begins.position
        sources = block.sources[:count]
        taken = np.bincount(sources, minlength=len(self.streams))
        tokens = np.bincount(sources, block.tokens[:count], len(self.streams)).astype(np.int64)
        return _moved(block.begins, taken, tokens)

    def _block_of(self, position: int) -> _Block | None:
        """The block with this position of the whole stream; None beyond the end of every source."""
        with self._lock:
            if self._ends_at is not None and position >= self._ends_at:
                return None
            for block in reversed(self._blocks):
                if block.begins.position <= position < block.ends.position:
                    return block
            known = [
                *(each.begins for each in self._stretches), *self._anchors,
                *(place for block in self._blocks for place in (block.begins, block.ends)),
            ]  # fmt: skip
            begins = max((each for each in known if each.position <= position), key=lambda each: each.position)
            while True:
                block = self._make_block(begins)
                if not block.rows:
                    self._ends_at = begins.position
                    return None
                self._blocks.append(block)
                if position < block.ends.position:
                    return block
                begins = block.ends

    def _make_block(self, begins: _Place) -> _Block:
        stretch = self._stretch_at(begins.position)
        end = min((s.begins.position for s in self._stretches if s.begins.position > begins.position), default=None)
        lefts = [
            _left(cap, taken) if weight else 0
            for weight, cap, taken in zip(stretch.weights, stretch.caps, begins.taken, strict=True)
        ]
        rates = [  # rows in a time
            weight * each.num_rows / each.num_tokens if left else 0.0
            for weight, each, left in zip(stretch.weights, self.streams, lefts, strict=True)
        ]
        counts = [
            int(min(math.ceil(_ROWS_PER_BLOCK * rate / sum(rates)) + 1, left)) if left else 0
            for rate, left in zip(rates, lefts, strict=True)
        ]
        found = [
            (*self._ahead(number, stretch, begins, count), count == left)
            for number, (count, left) in enumerate(zip(counts, lefts, strict=True))
        ]
        # Beyond the first stream that was not followed to its end, rows of it may be missing.
        horizon = min((each[0][-1] for each in found if not each[3]), default=math.inf)
        times, rows, tokens = (np.concatenate([each[column] for each in found]) for column in range(3))
        sources = np.repeat(np.arange(len(found)), [len(each[0]) for each in found])
        order = np.lexsort((sources, times))
        order = order[times[order] <= horizon][: None if end is None else end - begins.position]
        sources, tokens = sources[order], tokens[order]
        taken = np.bincount(sources, minlength=len(found))
        given = np.bincount(sources, tokens, len(found)).astype(np.int64)
        return _Block(begins, _moved(begins, taken, given), rows[order].tolist(), sources, tokens)

    def _ahead(
        self, number: int, stretch: _Stretch, begins: _Place, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Twice the times, the rows as the mixture calls them, and the tokens of the next `count` rows of a source."""
        stream = self.streams[number]
        own = stream.rows(begins.taken[number], count)
        tokens = stream.row_tokens(own)
        before = begins.tokens[number] - stretch.begins.tokens[number]
        times = _times(before, tokens, stretch.weights[number]) if count else np.zeros(0)
        return times, own + stream.first_row, tokens

    def _stretch_at(self, position: int) -> _Stretch:
        return next(each for each in reversed(self._stretches) if each.begins.position <= position)

    def _place(self, reached: Reached) -> _Place:
        return _Place(reached.position, self._in_order(reached.rows), self._in_order(reached.tokens))

    def _reached(self, place: _Place) -> Reached:
        rows, tokens = (dict(zip(self.names, each, strict=True)) for each in (place.taken, place.tokens))
        return Reached(position=place.position, rows=rows, tokens=tokens)

    def _in_order(self, values: Mapping[str, Number]) -> tuple[Number, ...]:
        return tuple(values[name] for name in self.names)


def _times(before: int, tokens: np.ndarray, weight: float) -> np.ndarray:
    """Twice the time of each of a source's next rows, after `before` tokens of it."""
    ends = before + np.cumsum(tokens)
    return (2 * ends - tokens) / weight


def _left(cap: int | None, taken: int) -> float:
    return math.inf if cap is None else max(0, cap - taken)


def _moved(place: _Place, taken: np.ndarray, tokens: np.ndarray) -> _Place:
    return _Place(
        place.position + int(taken.sum()),
        tuple(a + int(b) for a, b in zip(place.taken, taken, strict=True)),
        tuple(a + int(b) for a, b in zip(place.tokens, tokens, strict=True)),
    )


def _changes(names: Sequence[str], before: _Stretch, now: _Stretch) -> list[str]:
    found = []
    for number, name in enumerate(names):
        was, new = (each.weights[number] / sum(each.weights) for each in (before, now))
        if not math.isclose(was, new, rel_tol=1e-12):
            found.append(f"share of {name} {was:.4g} -> {new:.4g}")
        if before.caps[number] != now.caps[number]:
            found.append(f"cap of {name} {before.caps[number]} -> {now.caps[number]} rows")
    return found
