"""Logits equal those of transformers for each of the four published architectures, on the same weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lumina_ds.config.schema import ModelConfig
from lumina_ds.errors import ConfigError
from lumina_ds.export.hugging_face import hugging_face_config, hugging_face_family, published_names
from lumina_ds.model.balancing import selection_biases
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM

transformers = pytest.importorskip("transformers")

SHAPE = dict(
    vocab_size=96,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_theta=5000.0,
    initializer_range=0.2,
)
FAMILIES = {
    "llama": ModelConfig(**SHAPE, intermediate_size=80),
    "qwen3": ModelConfig(**SHAPE, intermediate_size=80, qk_norm=True, head_dim=16, tie_word_embeddings=True),
    "mixtral": ModelConfig(**SHAPE, num_experts=4, moe_intermediate_size=32),
    "qwen3_moe": ModelConfig(
        **SHAPE,
        num_experts=4,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        qk_norm=True,
        norm_topk_prob=False,
        first_k_dense_layers=1,
        intermediate_size=80,
    ),
    "glm4_moe": ModelConfig(
        **SHAPE,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        num_shared_experts=2,
        qk_norm=True,
        head_dim=8,
        first_k_dense_layers=1,
        intermediate_size=80,
        scoring_func="sigmoid",
        router_bias_update_rate=0.0,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    config = FAMILIES[family]
    assert hugging_face_family(config) == family
    ours = CausalLM(config).eval()
    initialize(ours, config, seed=1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.dim() == 1:  # norms at one would hide a swapped or missing norm
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
        for bias in selection_biases(ours).values():  # so large that it decides most choices
            bias.normal_(0, 0.5, generator=torch.Generator().manual_seed(3))
    tensors = {
        published: (tensor if expert is None else tensor[expert]).contiguous()
        for name, tensor in ours.state_dict().items()
        for published, expert in published_names(name, len(tensor), config)
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(config)))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    ids = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        found = ours(ids)
    assert expected.std() > 0.1  # the comparison is about something
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_shapes_without_a_published_counterpart_are_refused():
    with pytest.raises(ConfigError, match="shared experts"):
        hugging_face_family(FAMILIES["mixtral"].model_copy(update={"num_shared_experts": 1}))
    with pytest.raises(ConfigError, match="always normalises"):
        hugging_face_family(FAMILIES["mixtral"].model_copy(update={"norm_topk_prob": False}))
    with pytest.raises(ConfigError, match="selection bias"):
        hugging_face_family(FAMILIES["mixtral"].model_copy(update={"router_bias_update_rate": 0.001}))
    with pytest.raises(ConfigError, match="lacks one of them"):
        hugging_face_family(FAMILIES["glm4_moe"].model_copy(update={"num_shared_experts": 0}))
