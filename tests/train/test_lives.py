"""A run of several lives trains what one long run would: the order of rows and its state, without an engine."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import make_manifest

from lumina_ds.checkpoint.manifest import Manifest, RunIdentity
from lumina_ds.config.schema import HealthConfig, RunConfig
from lumina_ds.data.sampler import FILLER_ROW, TrainingOrder
from lumina_ds.train.health import StepHealth
from lumina_ds.train.state import RunLength, RunState

SEED = 5
MANIFEST = make_manifest()
IDENTITY = RunIdentity.model_validate({name: getattr(MANIFEST, name) for name in RunIdentity.model_fields})
CONFIG = RunConfig().model_dump()


class Life:
    """A life of a run without its engine: its rows step by step, and what its checkpoint says."""

    def __init__(self, num_rows: int, batch: int, saved: Manifest | None = None, **length: float) -> None:
        config = RunConfig.model_validate({"train": {"micro_batch_size": batch, **length}})
        self.length = RunLength.of(config, num_rows, readers=1)
        order = TrainingOrder(num_rows, SEED, self.length.total_rows)
        self.state = RunState(order, StepHealth(HealthConfig()))
        self.batch, self.resumed_from = batch, saved
        self.rows: list[int] = []
        if saved is not None:
            self.state.take(saved)
            self.length = self.length.after_filling(order.num_filled)

    def train(self, until: int | None = None) -> Manifest:
        """To the end, or to step `until` when that is earlier; a life with nothing left saves nothing."""
        last_step = self.length.last_step(self.state.order)
        while self.state.step < (last_step if until is None else min(until, last_step)):
            self.rows += self.state.order.step_rows(self.state.step, 0, 0, 1, self.batch, 1)
            self.state.step += 1
            assert self.state.step_rows(self.batch) == self.rows[-self.batch :]
        return self.saved() if self.rows or self.resumed_from is None else self.resumed_from

    def saved(self) -> Manifest:
        """Its checkpoint, read from JSON as the next life reads it."""
        run = self.state.saved(IDENTITY, CONFIG, self.batch, None, None)
        sealed = make_manifest(**run.model_dump(exclude={"config"})).model_dump_json()
        return Manifest.model_validate_json(sealed)


def stream(num_rows: int, count: int) -> list[int]:
    """The first rows of the order, of which every run trains a beginning."""
    order = TrainingOrder(num_rows, SEED)
    return [order.row_at(position) for position in range(count)]


def real(rows: list[int]) -> list[int]:
    return [row for row in rows if row != FILLER_ROW]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_lives_of_any_lengths_train_every_row_as_often_as_one_long_run(
    num_rows: int, batch: int, thirds: list[int], data: st.DataObject
) -> None:
    thirds = [third for third in thirds if round(third / 3 * num_rows)] or [3]
    saved, rows = None, []
    for third in thirds:
        life = Life(num_rows, batch, saved, epochs=third / 3)
        if data.draw(st.booleans()):
            stopped = life.train(until=data.draw(st.integers(0, 30)))
            rows += life.rows
            life = Life(num_rows, batch, stopped, epochs=third / 3)
        saved = life.train()
        rows += life.rows
    long = Life(num_rows, batch, epochs=max(thirds) / 3)
    long.train()
    assert real(rows) == real(long.rows)
    assert len(real(rows)) == round(max(thirds) / 3 * num_rows)
    assert saved.step * batch == len(rows)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 12), st.integers(1, 12))
def test_steps_after_epochs_and_epochs_after_steps_leave_no_row_out(
    num_rows: int, batch: int, epochs: int, steps: int
) -> None:
    for first, second in (({"epochs": epochs}, {"max_steps": steps}), ({"max_steps": steps}, {"epochs": epochs})):
        one = Life(num_rows, batch, **first)
        two = Life(num_rows, batch, one.train(), **second)
        three = Life(num_rows, batch, two.train(), epochs=13 + steps * batch)
        three.train(until=two.state.step + 3)
        rows = real(one.rows + two.rows + three.rows)
        assert rows == stream(num_rows, len(rows))


def test_the_fault_as_it_was_found() -> None:
    """169 rows in steps of 16: the first life's last step has 9, and the second skipped the other 7 of its start."""
    one = Life(169, 16, epochs=1)
    saved = one.train()
    assert saved.filled == [[169, 7]] and saved.step == 11
    two = Life(169, 16, saved, epochs=2)
    assert two.length.num_steps == 22
    two.train()
    assert Counter(real(one.rows + two.rows)) == Counter({row: 2 for row in range(169)})


def test_one_conversation_in_a_batch_of_128() -> None:
    one = Life(1, 128, epochs=1)
    two = Life(1, 128, one.train(), epochs=133)
    two.train()
    assert len(real(one.rows + two.rows)) == 133
    assert two.state.epoch(128) == 133


def test_a_resume_of_equal_length_changes_nothing() -> None:
    whole = Life(50, 8, epochs=2.5)
    whole.train()
    half = Life(50, 8, epochs=2.5)
    saved = half.train(until=7)
    assert saved.filled == []
    rest = Life(50, 8, saved, epochs=2.5)
    end = rest.train()
    assert half.rows + rest.rows == whole.rows and rest.length == whole.length
    again = Life(50, 8, end, epochs=2.5)
    again.train()
    assert again.rows == [] and again.length.num_steps == whole.length.num_steps


def test_a_checkpoint_of_an_earlier_version_goes_on_as_it_did() -> None:
    content = Life(10, 4, epochs=1).train().model_dump()
    del content["filled"]
    two = Life(10, 4, Manifest.model_validate(content), epochs=2)
    two.train()
    assert two.rows == stream(10, 20)[12:]


def test_passing_over_a_last_step_takes_no_row_from_a_longer_life() -> None:
    """Six rows in steps of 4: the second step has two rows and two fillers."""
    one = Life(6, 4, epochs=1)
    saved = one.train(until=1)
    one.train()
    assert one.state.order.pass_over(4, 4) == stream(6, 6)[4:]
    one.state.go_back(saved)
    assert one.length.last_step(one.state.order) == 1
    two = Life(6, 4, one.train(), epochs=2)
    two.train()
    assert real(two.rows) == stream(6, 12)[6:]


@pytest.mark.parametrize("back_to", [1, 2])
def test_going_back_over_the_end_of_a_shorter_life_passes_over_what_was_trained(back_to: int) -> None:
    """Ten rows in steps of 4: step 3 holds two and ends the first life; step 4 holds the next four."""
    one = Life(10, 4, epochs=1)
    earlier = one.train(until=back_to)
    two = Life(10, 4, one.train(), epochs=2)
    two.train(until=4)
    assert two.rows == stream(10, 14)[10:]
    passed = two.state.order.pass_over(12, 4)  # step 4 was bad
    assert passed == two.rows
    two.state.go_back(earlier)
    assert two.state.rollbacks == 1 and two.state.step == back_to
    two.rows = []
    two.train()
    assert one.rows[: 4 * back_to] + real(two.rows) == [*stream(10, 10), *stream(10, 20)[14:]]


def test_going_back_twice_to_one_checkpoint_passes_over_both() -> None:
    run = Life(30, 4, epochs=1)
    saved = run.train(until=1)
    for step in (2, 2):
        run.train(until=step)
        run.state.order.pass_over(4, 4)
        run.state.go_back(saved)
    run.rows = []
    run.train()
    assert real(run.rows) == stream(30, 30)[12:]
    assert run.state.rollbacks == 2
