"""Capacity: every place counted, no expert over its room, overflow dropped or given to the next choice with room."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_ds.model.placement import UNPLACED, count_places, expert_capacity, fill_unplaced, place


def placed_by_hand(preference, real, capacity, num_experts, top_k):
    """The same rule written out: at each rank, tokens in turn ask for their expert of that rank."""
    room = [capacity] * num_experts
    placed = [[] for _ in preference]
    for rank in range(len(preference[0])):
        for token, order in enumerate(preference):
            if real[token] and len(placed[token]) < top_k and room[order[rank]] > 0:
                room[order[rank]] -= 1
                placed[token].append(order[rank])
    return [experts + [UNPLACED] * (top_k - len(experts)) for experts in placed]


@st.composite
def cases(draw):
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    num_tokens = draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Few distinct logits per expert: some experts are far more wanted than others.
    scores = torch.rand(num_tokens, num_experts, generator=generator) + torch.linspace(
        0, draw(st.floats(0, 2)), num_experts
    )
    num_ranks = draw(st.sampled_from([top_k, num_experts]))
    real = torch.rand(num_tokens, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    capacity = draw(st.integers(0, num_tokens + 1))
    return scores.topk(num_ranks).indices, real, capacity, num_experts, top_k


@settings(max_examples=300, deadline=None)
@given(cases())
def test_places_are_those_of_the_rule_written_out(case):
    preference, real, capacity, num_experts, top_k = case
    placed = place(preference, real, torch.tensor(capacity), num_experts, top_k)
    assert placed.tolist() == placed_by_hand(preference.tolist(), real.tolist(), capacity, num_experts, top_k)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_no_expert_over_capacity_no_place_lost_no_expert_twice(case):
    preference, real, capacity, num_experts, top_k = case
    placed = place(preference, real, torch.tensor(capacity), num_experts, top_k)
    loads = count_places(placed, num_experts)
    assert loads.max() <= capacity
    num_dropped = (placed[real] == UNPLACED).sum()
    assert loads.sum() + num_dropped == real.sum() * top_k
    assert (placed[~real] == UNPLACED).all()
    for token in placed.tolist():
        got = [expert for expert in token if expert != UNPLACED]
        assert len(set(got)) == len(got)
    is_rerouting = preference.shape[1] == num_experts
    if is_rerouting and num_dropped:
        # Whoever lacks an expert has them all already, or met no room anywhere else.
        for token in placed[real].tolist():
            if UNPLACED in token:
                assert all(loads[e] == capacity or e in token for e in range(num_experts))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_fillers_keep_what_is_placed_and_make_no_expert_busier_than_the_busiest(case):
    preference, real, capacity, num_experts, top_k = case
    placed = place(preference, real, torch.tensor(capacity), num_experts, top_k)
    filled = fill_unplaced(placed, num_experts)
    assert ((filled >= 0) & (filled < num_experts)).all()
    assert torch.equal(filled[placed != UNPLACED], placed[placed != UNPLACED])
    even = -(-placed.numel() // num_experts)
    assert count_places(filled, num_experts).max() <= max(even, int(count_places(placed, num_experts).max()))


def test_drop_and_reroute_by_hand():
    # Three tokens want expert 0 first, and there is room for one each.
    preference = torch.tensor([[0, 1, 2], [0, 2, 1], [0, 1, 2]])
    real = torch.ones(3, dtype=torch.bool)
    one = torch.tensor(1)
    assert place(preference[:, :1], real, one, 3, 1).tolist() == [[0], [UNPLACED], [UNPLACED]]
    # Token 1's next choice is 2; token 2's is 1.
    assert place(preference, real, one, 3, 1).tolist() == [[0], [2], [1]]
    # Two places each: first choices first, so token 1 gets its second choice before anyone's third.
    assert place(preference, real, one, 3, 2).tolist() == [[0, 1], [2, UNPLACED], [UNPLACED, UNPLACED]]
    assert place(preference, torch.tensor([False, True, True]), one, 3, 1).tolist() == [[UNPLACED], [0], [1]]


def test_capacity_is_rounded_up_and_exact_products_are_not():
    def capacity(factor, tokens, top_k, experts):
        return int(expert_capacity(factor, torch.tensor(tokens), top_k, experts))

    assert capacity(1.0, 8, 2, 4) == 4
    assert capacity(1.25, 8, 2, 4) == 5
    assert capacity(1.25, 7, 2, 4) == 5  # 4.375
    assert capacity(1.1, 100, 2, 4) == 55  # 55.00000000000001 in floating point
    assert capacity(0.1, 1, 1, 64) == 1
    assert capacity(1.25, 0, 2, 4) == 0
