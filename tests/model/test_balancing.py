"""What routers learn outside the optimizer, one step at a time, by hand."""

import pytest
import torch

from lumina_ds.config.schema import ModelConfig
from lumina_ds.model.balancing import (
    bias_step,
    capacity_factors,
    routers,
    routing_state,
    selection_biases,
    update_balance,
)
from lumina_ds.model.transformer import CausalLM

NAMES = [f"model.layers.{layer}.mlp.router" for layer in (1, 2)]


def model(**settings):
    return CausalLM(
        ModelConfig(
            vocab_size=16, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            num_experts=4, moe_intermediate_size=8, first_k_dense_layers=1, intermediate_size=8, **settings,
        )
    )  # fmt: skip


def test_bias_moves_by_the_rate_towards_an_even_load():
    assert bias_step(torch.tensor([4.0, 1.0, 2.0, 1.0]), 0.5).tolist() == [-0.5, 0.5, 0.0, 0.5]


def test_every_layer_learns_from_its_own_counts():
    made = model(router_bias_update_rate=0.5, router_aux_loss_scope="sequence")
    assert list(routers(made)) == NAMES
    assignments = torch.tensor([[4.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    for _ in range(2):
        update_balance(made, assignments, torch.zeros(2))
    state = routing_state(made)
    assert state[f"{NAMES[0]}.e_score_correction_bias"].tolist() == [-1.0, 1.0, 0.0, 1.0]
    assert not state[f"{NAMES[1]}.e_score_correction_bias"].any()  # a layer without tokens keeps its state
    assert selection_biases(made).keys() == state.keys()


def test_a_rate_of_zero_keeps_a_bias_fixed():
    made = model(router_bias_update_rate=0.0)
    selection_biases(made)[f"{NAMES[0]}.e_score_correction_bias"].fill_(0.25)
    update_balance(made, torch.tensor([[4.0, 1, 2, 1]] * 2), torch.zeros(2))
    assert selection_biases(made)[f"{NAMES[0]}.e_score_correction_bias"].tolist() == [0.25] * 4


def test_the_load_of_the_step_is_kept_for_the_next_ones_loss():
    made = model()
    state = routing_state(made)
    assert state[f"{NAMES[0]}.load"].tolist() == [0.25] * 4
    update_balance(made, torch.tensor([[4.0, 1, 2, 1], [8, 0, 0, 0]]), torch.zeros(2))
    assert state[f"{NAMES[0]}.load"].tolist() == [0.5, 0.125, 0.25, 0.125]
    assert state[f"{NAMES[1]}.load"].tolist() == [1, 0, 0, 0]
    assert selection_biases(made) == {}


def test_capacity_grows_on_overflow_shrinks_slowly_and_keeps_its_bounds():
    bounds = {"capacity_factor": 1.0, "min_capacity_factor": 0.98, "max_capacity_factor": 1.1}
    made = model(overflow_policy="drop", capacity_overflow_target=0.02, **bounds)
    even = torch.ones(2, 4)
    expected = [[1.05, 0.99], [1.1, 0.9801], [1.1, 0.98], [1.089, 1.029]]
    for overflow, factors in zip(([0.03, 0.02], [0.5, 0.0], [0.5, 0.0], [0.0, 0.5]), expected, strict=True):
        update_balance(made, even, torch.tensor(overflow))
        assert capacity_factors(made) == pytest.approx(factors)
    assert capacity_factors(model()) == []


def test_no_state_where_no_setting_asks_for_it():
    assert routing_state(model(router_aux_loss_coef=0.0)) == {}
    assert routing_state(model(router_aux_loss_scope="micro_batch")) == {}
