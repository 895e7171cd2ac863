"""Muon and offloaded AdamW on two ranks follow a single process; who belongs to which half of Muon."""

from pathlib import Path

import numpy as np

from lumina_ds.config.schema import ModelConfig, TrainConfig
from lumina_ds.engine.deepspeed.muon import muon_groups
from lumina_ds.model.transformer import CausalLM


def test_every_layout_trains_like_one_process(run_ranks):
    curves = run_ranks(Path(__file__).parent / "optimizer_worker.py", timeout=400)
    muon_bf16 = curves.pop("muon bf16")
    # Muon lifts the singular values that rounding decides to the size of the others, so its curves agree less.
    for family, reference, tolerance in (("muon", "plain", 5e-3), ("adamw", "zero1", 1e-4)):
        expected = curves[family].pop(reference)
        assert expected[-1] < 0.8 * expected[0]
        assert len(curves[family]) == 4
        for name, found in curves[family].items():
            np.testing.assert_allclose(found, expected, rtol=tolerance, err_msg=f"{family} {name}")
    np.testing.assert_allclose(muon_bf16, expected_muon := curves["muon"]["zero2 ep2"], rtol=5e-2)
    assert muon_bf16 != expected_muon, "the precision was not used"


def test_matrices_go_to_muon_and_decay_by_the_same_product():
    model = CausalLM(
        ModelConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            num_experts=4, moe_intermediate_size=8, first_k_dense_layers=1, intermediate_size=24, qk_norm=True,
        )
    )  # fmt: skip
    train = TrainConfig(optimizer="muon", learning_rate=1e-3, muon_learning_rate=0.02, weight_decay=0.1)
    groups = {group["name"]: group for group in muon_groups(model, train)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {part: {names[id(p)] for p in group["params"]} for part, group in groups.items()}
    assert members["decay"] == {
        "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.router.gate.weight"
    }  # fmt: skip
    assert {"model.layers.1.mlp.experts.w1", "model.layers.0.mlp.up_proj.weight"} <= members["muon"]
    assert all("norm" in name for name in members["no_decay"])
    assert sum(map(len, members.values())) == len(names)
    decays = {part: group["weight_decay"] for part, group in groups.items()}
    # 0.02 x 0.005 = 1e-3 x 0.1
    assert decays == {"muon": 0.005, "decay": 0.1, "no_decay": 0.0}
