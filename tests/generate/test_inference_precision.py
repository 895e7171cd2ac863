"""Each precision computes what fp32 does, within what its format allows, and takes the memory that it should."""

import pytest
import torch

from lumina_ds.config.schema import ModelConfig
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.errors import MachineError
from lumina_ds.generate.load import build_model
from lumina_ds.generate.precision import inference_precision
from lumina_ds.measure.precisions import compare_precisions, weight_bytes
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM

TIED = ModelConfig(
    vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, num_experts=4, moe_intermediate_size=16, num_shared_experts=1,
    tie_word_embeddings=True,
)  # fmt: skip
UNTIED = TIED.model_copy(update={"tie_word_embeddings": False})
IDS = torch.arange(5, 45).unsqueeze(0)
POSITIONS = torch.arange(40).unsqueeze(0)


@pytest.fixture(params=[TIED, UNTIED], ids=["tied", "untied"])
def model(request):
    return request.param


@pytest.fixture
def load(model, corpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    network = CausalLM(model)
    initialize(network, model, seed=0)
    # Larger weights than at the start of training: differences must show.
    state = {name: 4 * value if value.ndim > 1 else value.clone() for name, value in network.state_dict().items()}
    if model.tie_word_embeddings:
        del state["lm_head.weight"]
    return lambda name: build_model(model, state, corpus.tokenizer, name)


@pytest.mark.parametrize(("name", "tolerance"), [("fp16", 0.005), ("bf16", 0.03), ("dynamic", 0.05)])
def test_logits_are_those_of_fp32_within_the_format(load, name, tolerance):
    with torch.inference_mode():
        expected = load("fp32").model(IDS, POSITIONS)
        found = load(name).model(IDS, POSITIONS).float()
    difference = float((found - expected).norm() / expected.norm())
    assert 0 < difference < tolerance


def test_weights_take_two_bytes_a_value_or_one_in_matrices(load, model):
    fp32 = weight_bytes(load("fp32").model)
    assert fp32 == 4 * sum(parameter.numel() for parameter in CausalLM(model).parameters())
    assert weight_bytes(load("bf16").model) == fp32 // 2
    # The embedding stays fp32, and with it a tied head; scales take 16 bytes a row.
    embedding, norms_and_gates = 400 * 32, 5 * 32 + 2 * 4 * 32
    matrices = fp32 // 4 - embedding - norms_and_gates
    rows = 2 * ((32 + 16 + 16 + 32) + (4 + 1) * (16 + 16 + 32)) + (0 if model.tie_word_embeddings else 400)
    expected = 4 * (embedding + norms_and_gates) + matrices + 16 * rows
    assert weight_bytes(load("dynamic").model) == expected


@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_the_loss_of_a_quantized_head_is_that_of_its_logits(load, chunk_tokens):
    network = load("dynamic").model
    network.lm_head.chunk_tokens = chunk_tokens
    labels = IDS.roll(-1, dims=1).masked_fill(POSITIONS % 3 == 0, -100)
    with torch.inference_mode():
        logits = network(IDS, POSITIONS)
        loss = network(IDS, POSITIONS, labels=labels)[0]
        nothing = network(IDS, POSITIONS, labels=torch.full_like(labels, -100))[0]
    expected = torch.nn.functional.cross_entropy(logits[0].float(), labels[0], reduction="sum")
    assert float(loss) == pytest.approx(float(expected), rel=0.02) and float(nothing) == 0


def test_the_router_stays_in_full_precision_under_int8(load):
    network = load("dynamic").model
    gates = [module for name, module in network.named_modules() if name.endswith("router.gate")]
    assert len(gates) == 2 and all(gate.weight.dtype == torch.float32 for gate in gates)


def test_auto_and_mixed_follow_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [inference_precision(name)[:2] for name in ("auto", "mixed_bf16", "fp16", "dynamic")] == [
        ("cpu", "fp32"),
        ("cpu", "bf16"),
        ("cpu", "fp16"),
        ("cpu", "dynamic"),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(MachineError, match=r"CPU kernels only .* use bf16"):
        inference_precision("dynamic")


def test_the_comparison_measures_every_precision_against_fp32(load, corpus, monkeypatch):
    def rows(loaded):
        return PackedRows(ShardFolder.open(corpus.eval_shards), 64)

    results = list(compare_precisions(load, rows, ("bf16", "dynamic"), max_rows=4, num_new_tokens=3))
    assert [result.precision for result in results] == ["fp32", "bf16", "dynamic"]
    reference = results[0].perplexity
    for result in results:
        assert result.missing is None and result.reading_tokens_per_second > 0 and result.writing_tokens_per_second > 0
        assert result.perplexity_change == pytest.approx(result.perplexity / reference - 1)
    assert 0 < abs(results[1].perplexity_change) < 0.2

    def without_quantization(name):
        if name == "dynamic":
            raise MachineError("no int8 here")
        return inference_precision(name)

    monkeypatch.setattr("lumina_ds.measure.precisions.inference_precision", without_quantization)
    [_, result] = compare_precisions(load, rows, ("dynamic",), max_rows=2, num_new_tokens=1)
    assert (result.precision, result.missing, result.perplexity) == ("dynamic", "no int8 here", None)
