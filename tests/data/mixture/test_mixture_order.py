"""The order of a mixture against a plain loop that takes one row at a time, and what the shares promise."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_ds.config.mixtures import SourceConfig
from lumina_ds.data.mixture.forecast import forecast
from lumina_ds.data.mixture.order import MixtureOrder, SourceStream
from lumina_ds.data.mixture.shares import mixture_weights
from lumina_ds.data.mixture.state import MixtureState
from lumina_ds.data.sampler import FILLER_ROW, EpochOrder
from lumina_ds.errors import CheckpointError

ROW = 64
SIZES = {"chats": 300, "code": 37, "few": 5}
TOKENS = {name: np.random.default_rng(size).integers(9, ROW + 1, size) for name, size in SIZES.items()}
TOTALS = {name: int(tokens.sum()) for name, tokens in TOKENS.items()}


def mixture(settings=None, passes=None, temperature=None, seed=7, names=tuple(SIZES)):
    """An order over the sources above; `settings` by name are those of a source."""
    given = [SourceConfig(name=name, paths=["x"], **(settings or {}).get(name, {})) for name in names]
    streams, first = [], 0
    for name in sorted(names):
        streams.append(SourceStream.of(name, SIZES[name], TOTALS[name], first, seed, TOKENS[name].__getitem__))
        first += SIZES[name]
    weights = mixture_weights(given, {name: TOTALS[name] for name in names}, temperature)
    return MixtureOrder(streams, weights, {each.name: each.cap for each in given}, seed, passes)


def one_by_one(order, weights, caps, count, taken=None):
    """The same rows by the definition: always the source whose next row has the earliest middle; -1 after the last."""
    taken = dict(taken or dict.fromkeys(weights, 0))
    tokens, found = dict.fromkeys(weights, 0), []
    streams = {stream.name: stream for stream in order.streams}
    while len(found) < count:
        best = None
        for name, weight in sorted(weights.items()):
            if not weight or (caps.get(name) is not None and taken[name] >= caps[name]):
                continue
            stream = streams[name]
            epoch, place = divmod(taken[name], stream.num_rows)
            row = int(EpochOrder(stream.num_rows, stream.seed, epoch).rows_at(np.array([place]))[0])
            size = int(TOKENS[name][row])
            middle = (2 * tokens[name] + size) / weight
            if best is None or middle < best[0]:
                best = (middle, name, row, size)
        if best is None:
            found.append(FILLER_ROW)
            continue
        _, name, row, size = best
        taken[name], tokens[name] = taken[name] + 1, tokens[name] + size
        found.append(streams[name].first_row + row)
    return found


def rows_of(order, count, first=0):
    return [order.row_at(position) for position in range(first, first + count)]


WEIGHTED = {"chats": {"weight": 2.0}, "code": {"weight": 1.0}, "few": {"weight": 0.5}}


@pytest.mark.parametrize(
    ("given", "weights", "caps"),
    [
        ({}, TOTALS, {}),
        (WEIGHTED, {"chats": 2.0, "code": 1.0, "few": 0.5}, {}),
        ({"chats": {"tokens": 9000}, "few": {"repeats": 3.0}}, TOTALS | {"chats": 9000, "few": 3 * TOTALS["few"]}, {}),
        (
            {"chats": {"weight": 1.0, "cap": 1}, "code": {"weight": 1.0, "cap": 2.5}, "few": {"weight": 0.0}},
            {"chats": 1.0, "code": 1.0, "few": 0.0},
            {"chats": 300, "code": 92},
        ),
    ],
    ids=["sizes", "weights", "amounts", "caps"],
)
def test_the_order_is_that_of_a_plain_loop_from_any_position(given, weights, caps):
    expected = one_by_one(mixture(), weights, caps, 900)
    order = mixture(given)
    assert rows_of(order, 900) == expected
    for position in (899, 3, 450, 0):
        assert mixture(given).row_at(position) == expected[position]
    assert [mixture(given).row_at(5000), order.row_at(5000)].count(FILLER_ROW) == (2 if caps else 0)


def test_the_listing_and_the_ranks_change_nothing():
    order = mixture(WEIGHTED)
    whole = rows_of(order, 96)
    assert rows_of(mixture(WEIGHTED, names=("few", "code", "chats")), 96) == whole
    for ranks, micro, accumulation in ((1, 12, 1), (2, 3, 2), (3, 1, 4), (6, 2, 1)):
        found, order = [], mixture(WEIGHTED)
        for step in range(8):
            for index in range(accumulation):
                for rank in range(ranks):
                    found += order.step_rows(step, index, rank, ranks, micro, accumulation)
        assert found == whole
    assert rows_of(mixture(WEIGHTED, seed=8), 96) != whole


@given(st.lists(st.floats(0.01, 50), min_size=3, max_size=3), st.integers(0, 2000), st.integers(1, 2000))
@settings(max_examples=12, deadline=None)
def test_every_window_has_the_shares_within_a_row_of_each_source(weights, first, count):
    order = mixture({name: {"weight": weight} for name, weight in zip(SIZES, weights, strict=True)})
    before, after = (order.reached(position).tokens for position in (first, first + count))
    tokens = {name: after[name] - before[name] for name in SIZES}
    total = sum(tokens.values())
    for name, weight in zip(SIZES, weights, strict=True):
        share = weight / sum(weights)
        # Its own row, and its share of a row of each source in the total.
        assert abs(tokens[name] - share * total) <= ROW + share * ROW * len(SIZES)


def test_a_pass_has_every_row_once_or_as_often_as_asked():
    order = mixture(passes=2)
    assert Counter(rows_of(order, order.total_rows)) == {row: 2 for row in range(sum(SIZES.values()))}
    assert order.row_at(order.total_rows) == FILLER_ROW and order.epoch_at(order.total_rows) == 2.0
    order = mixture({"few": {"repeats": 4}, "code": {"tokens": 2 * TOTALS["code"]}}, passes=1)
    assert order.reached(order.total_rows).rows == {"chats": 300, "code": 74, "few": 20}
    # By weights, a pass has the tokens of all sources.
    order = mixture(WEIGHTED, passes=1)
    tokens = order.reached(order.total_rows).tokens
    for name, share in (("chats", 2 / 3.5), ("code", 1 / 3.5), ("few", 0.5 / 3.5)):
        assert abs(tokens[name] - share * sum(TOTALS.values())) <= ROW / 2


def test_temperature_bends_the_shares():
    for temperature in (1.0, 2.0, 5.0, 0.5):
        bent = {name: total ** (1 / temperature) for name, total in TOTALS.items()}
        shares = mixture(temperature=temperature).shares_at(0)
        assert shares == pytest.approx({name: bent[name] / sum(bent.values()) for name in SIZES})


def saved(order, position):
    """As a checkpoint holds it and gives it back."""
    return MixtureState.model_validate_json(order.state_at(position).model_dump_json())


def test_a_resumed_mixture_goes_on_at_once():
    order = mixture(WEIGHTED)
    whole, state = rows_of(order, 700), saved(order, 500)
    again = mixture(WEIGHTED)
    assert again.go_on_from(state) == []
    assert rows_of(again, 200, 500) == whole[500:] and rows_of(again, 500) == whole[:500]
    assert again.state_at(700) == order.state_at(700)


def test_a_changed_weight_begins_where_the_run_goes_on_and_loses_no_row():
    first = mixture(WEIGHTED)
    before, state = rows_of(first, 400), saved(first, 400)
    other = {"chats": {"weight": 1.0}, "code": {"weight": 1.0}, "few": {"weight": 0.0}}
    second = mixture(other)
    changes = second.go_on_from(state)
    assert changes[0] == "share of chats 0.5714 -> 0.5" and len(changes) == 3
    expected = one_by_one(second, {"chats": 1.0, "code": 1.0, "few": 0.0}, {}, 300, state.reached.rows)
    assert rows_of(second, 300, 400) == expected and rows_of(second, 400) == before
    # The third life of the run knows both stretches, from wherever it begins.
    third = mixture(other)
    assert third.go_on_from(saved(second, 600)) == []
    assert rows_of(third, 700) == before + expected
    assert [stretch.begins.position for stretch in third.state_at(700).stretches] == [0, 400]
    assert third.shares_at(399) != third.shares_at(400) == {"chats": 0.5, "code": 0.5, "few": 0.0}


def test_a_source_passes_through_its_rows_whatever_the_weights_do():
    """Over three lives with other weights, each pass of a source has each of its rows once."""
    order, rows = mixture(WEIGHTED), []
    for end, weight in ((150, 3.0), (333, 0.1), (900, 5.0)):
        rows += rows_of(order, end - len(rows), len(rows))
        state, order = saved(order, end), mixture(WEIGHTED | {"code": {"weight": weight}})
        order.go_on_from(state)
    own = [row for row in rows if 300 <= row < 337]
    whole = len(own) // 37
    assert whole >= 3
    for number in range(whole):
        assert sorted(own[number * 37 : (number + 1) * 37]) == list(range(300, 337))


def test_rows_that_are_passed_over_stay_out_after_a_resume():
    order = mixture(WEIGHTED)
    whole = rows_of(order, 60)
    assert order.pass_over(10, 5) == whole[10:15]
    assert rows_of(order, 50) == whole[:10] + whole[15:55]
    again = mixture(WEIGHTED)
    again.go_on_from(saved(order, 20))
    again.passed_over = order.passed_over
    assert rows_of(again, 30, 20) == rows_of(order, 30, 20)


@pytest.mark.parametrize("settings", [{}, WEIGHTED])
def test_a_longer_second_life_reads_every_row_of_the_longer_run(settings):
    """The first life fills its last step with empty rows, which are none of the mixture's."""
    first, batch = mixture(settings, passes=1), 16
    end = -(-first.total_rows // batch) * batch
    assert end > first.total_rows and first.row_at(end - 1) == FILLER_ROW
    state = saved(first, end)
    assert state.reached.position == first.total_rows
    second, long = mixture(settings, passes=2.5), mixture(settings, passes=2.5)
    second.go_on_from(state)
    second.filled = first.filled_before(end)
    assert second.num_positions == long.total_rows + second.num_filled
    rows = rows_of(first, first.total_rows) + rows_of(second, second.num_positions - end, end)
    assert rows == rows_of(long, long.total_rows)


def test_other_sources_are_refused():
    state = saved(mixture(WEIGHTED), 10)
    with pytest.raises(CheckpointError, match=r"of the sources chats, code, few, not chats, few; name the same ones"):
        mixture(names=("chats", "few")).go_on_from(state)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state["reached"]["rows"].pop("few"), "name different sources"),
        (lambda state: state["stretches"][0]["weights"].update(chats=0, code=0, few=0), "no source with a weight"),
        (lambda state: state["reached"].update(position=11), "not those of its rows"),
        (lambda state: state["stretches"].clear(), "at least 1 item"),
    ],
)
def test_a_state_that_contradicts_itself_is_refused(damage, message):
    state = mixture(WEIGHTED).state_at(10).model_dump()
    damage(state)
    with pytest.raises(ValueError, match=message):
        MixtureState.model_validate(state)


def test_the_forecast_is_what_comes_to_within_a_row():
    capped = {"chats": {"weight": 1.0}, "code": {"weight": 1.0, "cap": 1.5}, "few": {"weight": 0.2, "cap": 2}}
    for sources in ({}, WEIGHTED, capped):
        order = mixture(sources)
        reached = order.reached(800)
        for each in forecast(order, 800):
            # Rows differ in length, so the mean row is an estimate within a pass.
            assert each.tokens_in_run == pytest.approx(reached.tokens[each.name], abs=6 * ROW)
            assert each.reaches_cap == (order.caps[each.name] == reached.rows[each.name])
