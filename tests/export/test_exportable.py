"""What is known of an export before it: whether a model can be exported at all; and who may read its files."""

from __future__ import annotations

import os
import stat

import pytest
from safetensors.torch import save_file

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.schema import ModelConfig
from lumina_ds.export.folder import export_model
from lumina_ds.export.hugging_face import exportable
from lumina_ds.export.start_folder import import_model
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM

SMALL = dict(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
EXPERTS = dict(**SMALL, num_experts=4, moe_intermediate_size=16)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ModelConfig(**EXPERTS), None),
        (ModelConfig(**SMALL, intermediate_size=32), None),
        (ModelConfig(**EXPERTS, num_shared_experts=1), "num_shared_experts 1: neither Mixtral nor Qwen3-MoE"),
        (ModelConfig(**EXPERTS, router_bias_update_rate=0.1), "router_bias_update_rate 0.1"),
    ],
)
def test_it_is_known_before_training_what_no_export_takes(model, reason):
    found = exportable(model)
    assert found is None if reason is None else reason in found


def test_train_warns_before_it_begins(corpus, capsys):
    words = ["train", "--config", "debug", "--data", str(corpus.shards), "--dry-run", "--json"]
    assert run_command(cli, words) == 0
    assert "will not take this model" not in capsys.readouterr().err
    assert run_command(cli, [*words, "--model.num_shared_experts", "1"]) == 0
    assert "warning: lumina export will not take this model: model.num_shared_experts 1" in capsys.readouterr().err


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_exported_and_imported_files_follow_the_umask(umask, corpus, tmp_path):
    model = ModelConfig(**EXPERTS, max_position_embeddings=64)
    (tmp_path / "ours").mkdir()
    network = CausalLM(model)
    initialize(network, model, seed=0)
    save_file(dict(network.named_parameters()), tmp_path / "ours/model.safetensors")
    before = os.umask(umask)
    try:
        export_model(model, tmp_path / "ours", corpus.tokenizer, tmp_path / "out")
        import_model(tmp_path / "out", tmp_path / "start")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    for folder in ("out", "start"):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / folder).iterdir()}
        assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}, modes
