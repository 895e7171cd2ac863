"""ZeRO-3's fetches by hand: what is under way, what was copied out, and what is let go."""

from __future__ import annotations

from lumina_ds.config.load import load_config
from lumina_ds.plan.gathering import Gathered, Limits, Tensor, Widths, follow, module_tensors

ALL = Limits(prefetch=1000, live=1000, reuse=1000)


def modules(*sizes):
    return [[]] + [[Tensor(number, size, 2, 4)] for number, size in enumerate(sizes)]


def test_one_fetch_of_all_doubles_until_its_last_tensor_is_used():
    # 100 elements under way in 2 bytes each, copied out in 4 when the first is used.
    assert follow(modules(10, 50, 40), ALL) == Gathered(
        highest=600, decoder_end=600, head=400, backward=400, decoder=400 - 4 * 40
    )


def test_single_tensors_are_gathered_in_place():
    # A prefetch of one element takes one tensor at a time: the next is under way while one is used.
    found = follow(modules(10, 50, 40), Limits(prefetch=1, live=1000, reuse=1000))
    assert found == Gathered(4 * 60 + 2 * 40, 4 * 60 + 2 * 40, 400, 400, 400 - 4 * 40)


def test_the_limit_on_live_elements_throttles_prefetching():
    found = follow(modules(10, 50, 40), Limits(prefetch=1000, live=5, reuse=1000))
    # The first 10 are prefetched, then everything is fetched when it is needed.
    assert found.decoder_end == 4 * 60 and found.head == 400


def test_what_is_not_used_again_soon_is_let_go_and_fetched_again():
    found = follow(modules(10, 50, 40), Limits(prefetch=1, live=1000, reuse=100))
    # Of the way back, the 10 are 180 elements away and the 50 are 80.
    assert (found.head, found.backward) == (4 * 90, 4 * 90)
    assert found.decoder == max(found.highest, found.backward)


def test_tied_weights_are_fetched_once():
    embedding = Tensor(0, 10, 4, 4)
    assert follow([[], [embedding], [Tensor(1, 50, 4, 4)], [embedding]], ALL).head == 4 * 60


def test_modules_of_a_preset():
    model = load_config("debug").config.model
    listed = module_tensors(model, 2, 1000, True, Widths(4, 2))
    # Two containers, the embedding, 2 layers of two norms, four projections, router and experts, the final norm, and
    # the tied head.
    assert len(listed) == 2 + 1 + 2 * 8 + 1 + 1
    assert listed[2] == listed[-1] == [Tensor(0, 131_072, 4, 4)]
    experts = [tensors for tensors in listed if len(tensors) == 3]
    assert len(experts) == 2 and all(tensor.numel == 4 * 88 * 128 // 2 for tensor in experts[0])
    # Norms and the router are small enough to stay; projections are gathered in 16 bits.
    assert sum(len(tensors) for tensors in listed) == 2 + 2 * (4 + 3)
    assert listed[4][0].flat_bytes == 2
    without = module_tensors(model, 2, 1000, False, Widths(4, 2))
    assert sum(len(tensors) for tensors in without) == 2 + 2 * 4
