"""The shuffled order: a permutation of any size, even over seeds, and the same one for ever."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from lumina_ds.data.sampler import EpochOrder

SIZES = [*range(1, 130), 251, 256, 257, 1021, 4095, 4096, 4097, 7919, 65535, 65536, 65537, 99_991]


def order(num_rows: int, seed: int = 3, epoch: int = 1) -> np.ndarray:
    return EpochOrder(num_rows, seed, epoch).rows_at(np.arange(num_rows))


def deviation(counts: np.ndarray) -> float:
    """Chi-square of counts against even ones, in standard deviations of its own distribution."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("num_rows", SIZES)
def test_every_row_once(num_rows: int) -> None:
    assert np.array_equal(np.sort(order(num_rows)), np.arange(num_rows))


def test_the_order_never_changes() -> None:
    # pinned: a run must resume in the same order under another numpy, or another version of this package
    assert order(10, seed=42, epoch=0).tolist() == [5, 0, 2, 1, 8, 3, 7, 6, 9, 4]
    assert order(10, seed=42, epoch=1).tolist() == [9, 1, 5, 4, 7, 6, 8, 3, 2, 0]
    large = EpochOrder(10**12, 42, 0).rows_at(np.array([0, 1, 10**12 - 1]))
    assert large.tolist() == [559998982, 350268614533, 582653840171]
    assert EpochOrder(1000, 2**40, 7).rows_at(np.array([[0, 1], [998, 999]])).tolist() == [[338, 765], [214, 352]]


def slow_row_at(position: int, num_rows: int, seed: int, epoch: int) -> int:
    """The same network in Python's integers, one number at a time."""
    height = math.ceil(math.sqrt(num_rows))
    width = math.ceil(num_rows / height)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(16, np.uint64).tolist()
    number = position
    while True:
        left, right = divmod(number, width)
        for turn, key in enumerate(keys):
            mixed = ((left if turn % 2 else right) + key) % 2**64
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
            mixed = (mixed ^ mixed >> 31) >> 8
            if turn % 2:
                right = (right + mixed) % width
            else:
                left = (left + mixed) % height
        number = left * width + right
        if number < num_rows:
            return number


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 12, 100, 101, 4096, 5000])
def test_equal_to_the_slow_reference(num_rows: int) -> None:
    positions = np.arange(num_rows)[:: max(1, num_rows // 40)]
    expected = [slow_row_at(position, num_rows, 11, 2) for position in positions.tolist()]
    assert EpochOrder(num_rows, 11, 2).rows_at(positions).tolist() == expected


def test_by_hand_with_the_hash_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 rows lie in a grid of 3 x 2. With hash(x) = x and two passes, (l, r) goes to (l + r mod 3, r + l' mod 2)."""
    monkeypatch.setattr("lumina_ds.data.sampler.NUM_PASSES", 2)
    monkeypatch.setattr("lumina_ds.data.sampler._hash", lambda values, key: values)
    # 0=(0,0)->(0,0)=0  1=(0,1)->(1,0)=2  2=(1,0)->(1,1)=3  4=(2,0)->(2,0)=4
    # 3=(1,1)->(2,1)=5, beyond the last row, so again: (2,1)->(0,1)=1
    assert order(5).tolist() == [0, 2, 3, 1, 4]


def test_seeds_and_epochs_differ() -> None:
    orders = [order(1000, seed, epoch).tolist() for seed, epoch in itertools.product(range(3), range(3))]
    assert len({tuple(one) for one in orders}) == 9
    # two independent orders share a place with probability 1/n: one in all, on average, and never 12
    assert all(sum(map(int.__eq__, one, other)) < 12 for one, other in itertools.combinations(orders, 2))


@pytest.mark.parametrize("num_rows", [3, 4, 5])
def test_small_permutations_are_equally_frequent(num_rows: int) -> None:
    number = {permutation: index for index, permutation in enumerate(itertools.permutations(range(num_rows)))}
    seen = np.zeros(len(number))
    for seed in range(1500):
        seen[number[tuple(order(num_rows, seed).tolist())]] += 1
    assert deviation(seen) < 5


def test_first_rows_and_their_neighbours_are_even_over_seeds() -> None:
    first, step = np.zeros(50), np.zeros(50)
    for seed in range(2000):
        one, two = EpochOrder(50, seed, 0).rows_at(np.array([0, 1])).tolist()
        first[one] += 1
        step[(two - one) % 50] += 1
    assert step[0] == 0
    assert deviation(first) < 5 and deviation(step[1:]) < 5


def test_neighbours_in_a_large_order_are_even() -> None:
    num_rows = 200_000
    rows = order(num_rows)
    for stride in (1, 2, math.isqrt(num_rows), 4096):
        assert deviation(np.bincount((rows[stride:] - rows[:-stride]) % num_rows * 500 // num_rows)) < 5
    assert abs(np.corrcoef(np.arange(num_rows), rows)[0, 1]) < 0.01


def test_any_position_costs_no_table() -> None:
    tracemalloc.start()
    rows = EpochOrder(10**15, seed=1, epoch=0).rows_at(np.array([10**14, 5 * 10**14]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows.min() >= 0 and rows.max() < 10**15 and peak < 100_000
