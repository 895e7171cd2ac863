"""The router's choice, weights, losses and noise against values worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_ds.config.schema import ModelConfig
from lumina_ds.model.router import MEASURED, Router, RoutingContext, balance_loss, count_assignments

E = 4


def router(**settings):
    """A router whose gate is the identity: a token's vector is its logits."""
    settings = {"num_experts": E, "num_experts_per_tok": 2} | settings
    made = Router(ModelConfig(hidden_size=max(8, settings["num_experts"]), moe_intermediate_size=8, **settings), 0)
    with torch.no_grad():
        made.gate.weight.copy_(torch.eye(settings["num_experts"], made.gate.in_features))
    return made.train()


def tokens(*rows):
    """Logits of tokens, padded to the router's width."""
    return torch.nn.functional.pad(torch.tensor(rows, dtype=torch.float32), (0, 8 - len(rows[0])))


def scalar(statistics, name):
    return float(statistics.measured[2 * E + MEASURED.index(name)])


LOGITS = (1.0, 2.0, 0.0, -1.0)
POWERS = [math.e**logit for logit in LOGITS]
SIGMOIDS = [1 / (1 + math.e**-logit) for logit in LOGITS]


@pytest.mark.parametrize(
    ("scoring", "normalised", "expected"),
    [
        ("softmax", True, [math.e / (1 + math.e), 1 / (1 + math.e)]),
        ("softmax", False, [POWERS[1] / sum(POWERS), POWERS[0] / sum(POWERS)]),
        ("sigmoid", True, [SIGMOIDS[1] / (SIGMOIDS[0] + SIGMOIDS[1]), SIGMOIDS[0] / (SIGMOIDS[0] + SIGMOIDS[1])]),
        ("sigmoid", False, [SIGMOIDS[1], SIGMOIDS[0]]),
    ],
)
def test_scores(scoring, normalised, expected):
    weights, indices, counts = router(scoring_func=scoring, norm_topk_prob=normalised)(tokens(LOGITS))
    assert indices.tolist() == [[1, 0]] and counts.tolist() == [1, 1, 0, 0]
    assert weights[0].tolist() == pytest.approx(expected)


def test_top_k_is_any_number_up_to_all_experts():
    for top_k in range(1, E + 1):
        weights, indices, counts = router(num_experts_per_tok=top_k)(tokens(LOGITS))
        assert indices[0].tolist() == [1, 0, 2, 3][:top_k] and counts.sum() == top_k
        assert weights.sum().item() == pytest.approx(1.0)


def test_bias_shifts_the_choice_and_not_the_weights():
    made = router(router_bias_update_rate=0.1, router_aux_loss_coef=0.0)
    made.e_score_correction_bias.copy_(torch.tensor([0.0, -1.0, 1.0, 0.0]))
    weights, indices, _ = made(tokens(LOGITS))
    assert indices.tolist() == [[2, 0]]
    assert weights[0].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])


def test_dropped_choices_weigh_nothing_and_are_counted():
    # Everyone prefers 0, then 1; ceil(1.0 * 4 tokens * 2 / 4) = 2 places each.
    x = tokens(*[(3.0, 2.0, 1.0, 0.0)] * 4)
    own = [math.e / (1 + math.e), 1 / (1 + math.e)]
    made = router(overflow_policy="drop", capacity_factor=1.0)
    weights, _, counts = made(x)
    assert weights[:2].flatten().tolist() == pytest.approx(own * 2)
    assert weights[2:].tolist() == [[0, 0], [0, 0]]
    assert counts.sum() == 8 and counts.max() == 2  # what is dropped is computed where there is room
    assert scalar(made.statistics, "dropped") == 4 and scalar(made.statistics, "rerouted") == 0
    assert made.statistics.measured[:E].tolist() == [4, 4, 0, 0]  # the choices, before any drop
    assert made.eval()(x)[0].tolist() == pytest.approx([pytest.approx(own)] * 4)  # no capacity in evaluation


def test_rerouted_choices_go_to_the_next_with_room_and_share_what_they_got():
    made = router(overflow_policy="reroute", capacity_factor=1.0)
    weights, indices, counts = made(tokens(*[(3.0, 2.0, 1.0, 0.0)] * 4))
    assert indices.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]] and counts.tolist() == [2, 2, 2, 2]
    assert weights.flatten().tolist() == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)] * 4)
    assert scalar(made.statistics, "dropped") == 0 and scalar(made.statistics, "rerouted") == 4


def test_a_capacity_that_follows_overflow_replaces_the_fixed_one():
    made = router(overflow_policy="drop", capacity_factor=1.0, min_capacity_factor=0.5, max_capacity_factor=2.0)
    x = tokens(*[(3.0, 2.0, 1.0, 0.0)] * 4)
    for factor, dropped in ((0.5, 6), (1.0, 4), (2.0, 0)):
        made.capacity_factor.fill_(factor)
        made(x)
        assert scalar(made.statistics, "dropped") == dropped


@pytest.mark.parametrize("policy", ["dropless", "drop", "reroute"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_token_k_experts_and_counts_add_up(policy, data):
    top_k, num_tokens = data.draw(st.integers(1, E)), data.draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.randn(num_tokens, 8, generator=generator) + torch.tensor([1.0, 0.5, 0, 0, 0, 0, 0, 0])
    mask = torch.rand(num_tokens, generator=generator) < 0.8 if data.draw(st.booleans()) else None
    factor = data.draw(st.sampled_from([0.3, 1.0, 1.25, 4.0]))
    made = router(num_experts_per_tok=top_k, overflow_policy=policy, capacity_factor=factor)
    made.context = RoutingContext(mask)
    weights, indices, counts = made(x)
    real = torch.ones(num_tokens, dtype=torch.bool) if mask is None else mask
    num_real = int(real.sum())
    assert indices.shape == weights.shape == (num_tokens, top_k)
    assert counts.tolist() == torch.bincount(indices.flatten(), minlength=E).tolist()
    assert (weights[~real] == 0).all() and (weights >= 0).all() and weights.isfinite().all()
    kept = torch.bincount(indices[weights > 0], minlength=E)
    if policy == "dropless":
        assert (weights[real] > 0).all()
        assert all(len(set(token)) == top_k for token in indices[real].tolist())
    else:
        assert kept.max() <= math.ceil(factor * num_real * top_k / E - 1e-9)
    measured = made.statistics.measured
    assert measured[:E].sum() == num_real * top_k
    assert measured[E : 2 * E].sum().item() == pytest.approx(num_real, rel=1e-5)
    assert kept.sum() + scalar(made.statistics, "dropped") == num_real * top_k
    assert scalar(made.statistics, "tokens") == num_real
    if policy != "reroute":
        assert scalar(made.statistics, "rerouted") == 0
    elif factor * num_real * top_k >= num_real * E:  # room for everyone everywhere
        assert scalar(made.statistics, "dropped") == 0


def test_padding_takes_no_room_and_no_share():
    x = tokens(*[(3.0, 2.0, 1.0, 0.0)] * 3)
    for policy in ("dropless", "drop", "reroute"):
        alone, padded = (router(overflow_policy=policy, capacity_factor=1.0) for _ in range(2))
        expected = alone(x[:2])[0]
        padded.context = RoutingContext(torch.tensor([False, True, True]))
        weights, _, _ = padded(torch.cat([x[:1] * 9, x[:2]]))
        assert weights[0].tolist() == [0, 0]
        torch.testing.assert_close(weights[1:], expected)
        for name in ("balance_loss", "z_loss", "measured"):
            torch.testing.assert_close(getattr(padded.statistics, name), getattr(alone.statistics, name))
    padded.context = RoutingContext(torch.zeros(3, dtype=torch.bool))
    weights, _, _ = padded(x)
    assert not weights.any() and not padded.statistics.measured.any() and padded.statistics.balance_loss == 0


def test_balanced_routing_costs_one_per_token_and_collapse_the_number_of_experts():
    made = router(num_experts_per_tok=1, router_aux_loss_scope="micro_batch")
    made(60 * torch.eye(E, 8) - 30)  # every token to its own expert
    assert math.isclose(made.statistics.balance_loss.item(), 4.0, rel_tol=1e-5)
    assert math.isclose(made.statistics.z_loss, 4 * 900.0, rel_tol=1e-5)  # log-sum-exp is 30 for each token
    made(tokens(*[(-30.0, -30.0, 30.0, -30.0)] * 4))
    assert math.isclose(made.statistics.balance_loss, 4 * 4.0, rel_tol=1e-5)
    assert scalar(made.statistics, "entropy") == pytest.approx(0, abs=1e-6)
    made(tokens(*[(0.0, 0.0, 0.0, 0.0)] * 4))
    assert scalar(made.statistics, "entropy") == pytest.approx(4 * math.log(4))


def test_the_loss_over_documents_is_that_of_each_alone():
    probability = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    chosen = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    context = RoutingContext(document_T=torch.tensor([0, 0, 1]), num_documents=2)
    found = balance_loss(probability, chosen, "sequence", None, context)
    # First document: all on expert 0, 2 * (1 * 0.75) for its two tokens; second: 2 * 0.7 for one.
    assert float(found) == pytest.approx(2 * 1.5 + 1.4)
    whole = balance_loss(probability, chosen, "micro_batch", None, context)
    assert float(whole) == pytest.approx(2 * (2 / 3 * 1.8 + 1 / 3 * 1.2))
    of_the_step = balance_loss(probability, chosen, "global_batch", torch.tensor([0.25, 0.75]), context)
    assert float(of_the_step) == pytest.approx(2 * (0.25 * 1.8 + 0.75 * 1.2))


def test_noise_is_a_function_of_the_row_alone():
    made = router(router_jitter_noise=0.5, expert_dropout=0.3)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    made.context = RoutingContext(row_seeds=(11, 12))
    weights, indices, _ = made(x)
    torch.manual_seed(5)
    again, _, _ = made(x)
    assert torch.equal(weights, again)
    for row, seed in enumerate((11, 12)):  # cut into other micro-batches
        made.context = RoutingContext(row_seeds=(seed,))
        alone = made(x[3 * row : 3 * row + 3])
        assert torch.equal(alone[0], weights[3 * row : 3 * row + 3])
        assert torch.equal(alone[1], indices[3 * row : 3 * row + 3])
    made.context = RoutingContext(row_seeds=(12, 11))
    assert not torch.equal(made(x)[0], weights)
    made.context = RoutingContext(row_seeds=(11, 12))
    made.layer = 1
    assert not torch.equal(made(x)[0], weights)
    quiet = router().eval()(x)[0]
    assert torch.equal(made.eval()(x)[0], quiet)


def test_jitter_stays_within_its_bounds():
    made = router(router_jitter_noise=0.25, num_experts_per_tok=1, norm_topk_prob=False, scoring_func="sigmoid")
    made.context = RoutingContext(row_seeds=(3,))
    weights, _, _ = made(tokens(*[(4.0, -9.0, -9.0, -9.0)] * 2000))
    factors = torch.logit(weights.double()) / 4
    assert 0.75 <= factors.min() < 0.76 and 1.24 < factors.max() <= 1.25
    assert factors.mean().item() == pytest.approx(1.0, abs=0.02)


def test_dropout_leaves_experts_out_and_always_keeps_k():
    made = router(expert_dropout=0.25, num_experts_per_tok=1)
    made.context = RoutingContext(row_seeds=(3,))
    _, indices, _ = made(tokens(*[(3.0, 2.0, 1.0, 0.0)] * 4000))
    shares = torch.bincount(indices.flatten(), minlength=E) / 4000
    # The best one not left out: 3/4, 1/4 * 3/4, ...; all four left out once in 256, then the best after all.
    assert shares.tolist() == pytest.approx([0.754, 0.1875, 0.0469, 0.0117], abs=0.02)
    made = router(expert_dropout=0.99, num_experts_per_tok=E)
    made.context = RoutingContext(row_seeds=(3,))
    weights, indices, _ = made(tokens(LOGITS, LOGITS))
    assert all(sorted(token) == [0, 1, 2, 3] for token in indices.tolist())
    assert weights.sum(1).tolist() == pytest.approx([1, 1])


def test_counts():
    assert count_assignments(torch.tensor([[0, 3], [3, 1]]), 5).tolist() == [1, 1, 0, 2, 0]


def test_state_stays_fp32_in_a_bf16_model():
    made = router(router_bias_update_rate=0.001, router_aux_loss_coef=0.0)
    made.e_score_correction_bias.fill_(0.1234567)
    made.bfloat16()
    assert made.gate.weight.dtype == torch.bfloat16
    assert made.e_score_correction_bias.dtype == torch.float32
    assert made.e_score_correction_bias[0] == torch.tensor(0.1234567)
