"""A card is one entry, a preset one file: each is added here from outside the package, and then planned with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml

from lumina_ds.config.load import load_config
from lumina_ds.errors import ConfigError
from lumina_ds.plan import hardware
from lumina_ds.plan.hardware import Gpu, cards, cards_that_fit, find_gpu

TOY = {
    "description": "a toy from outside of the package",
    "model": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "moe_intermediate_size": 96,
    },
}


@pytest.fixture
def toy_card(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    card = Gpu("toy9000-1", 1, 5, 0.9, bf16=False)
    monkeypatch.setattr(hardware, "GPUS", [*hardware.GPUS, card])
    return card


def test_a_card_is_one_entry(toy_card, run_cli):
    assert find_gpu("toy9000") == find_gpu("TOY9000-1GB") == find_gpu("NVIDIA TOY9000 PCIe") == toy_card
    assert (cards()[0].label, cards()[0].usable_bytes) == ("1 GB", int(0.9 * (1 << 30)))
    assert cards_that_fit(1 << 20)[0].memory_gb == 1 and cards_that_fit(1 << 30)[0].memory_gb == 16
    words = ("--config", "debug", "--gpus", 2, "--gpu", "toy9000", "--precision", "auto")
    code, out, err = run_cli("plan", *words, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["fits_on_gb"][0] == 16
    # It has no bf16, and less memory than a CUDA context with NCCL's buffers.
    assert record["precision"] == "fp16" and not record["cheapest"]["fits"]
    assert "the card has 921.60 MiB" in record["cheapest"]["binding"]
    code, out, err = run_cli("plan", "time", "--config", "debug", "--gpu", "toy9000", "--tokens", "1M", "--json")
    assert code == 0 and json.loads(out)["gpu"] == "toy9000-1", err


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtxpro6000-96"),
        ("AMD Instinct MI300X", "mi300x-192"),
    ],
)
def test_names_as_drivers_write_them(name, meant):
    assert find_gpu(name).name == meant


@pytest.mark.parametrize("name", ["Tesla V100-SXM2-8GB", "NVIDIA H100 CNX", "NVIDIA GB300", "NVIDIA A10M"])
def test_other_chips_and_sizes_are_not_taken_for_listed_ones(name):
    with pytest.raises(ConfigError, match="is no known card"):
        find_gpu(name)


def test_a_preset_is_one_file(tmp_path):
    """In processes of their own, as a user would: listed, shown, planned, completed, and the base of a YAML file."""
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY))
    mine = tmp_path / "mine.yml"
    mine.write_text("preset: toy\ntrain: {learning_rate: 0.002}\n")

    def lumina(*words: str) -> str:
        environment = os.environ | {"LUMINA_PRESETS": str(tmp_path)}
        command = [sys.executable, "-m", "lumina_ds", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = {record["name"]: record for record in json.loads(lumina("presets", "list", "--json"))}
    assert listed["toy"]["description"] == TOY["description"] and "b7" in listed
    total = json.loads(lumina("plan", "--config", "toy", "--gpus", "2", "--json"))["parameters"]["total"]
    # Embedding and head, and in each layer q, k, v, o, router, experts and norms, then the last norm.
    layer = 64 * (64 + 32 + 32 + 64) + 64 * 2 + 2 * 3 * 64 * 96 + 2 * 64
    assert total == listed["toy"]["parameters"]["total"] == 2 * 512 * 64 + 2 * layer + 64
    assert "a toy from outside" in lumina("presets", "show", "toy")
    assert json.loads(lumina("plan", "--config", str(mine), "--json"))["parameters"]["total"] == total


def test_a_preset_does_not_hide_another(tmp_path, monkeypatch):
    (tmp_path / "b7.yaml").write_text(yaml.safe_dump(TOY))
    monkeypatch.setenv("LUMINA_PRESETS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"is a preset of the same name; rename the file"):
        load_config("debug")
