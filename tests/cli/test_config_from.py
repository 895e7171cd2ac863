"""`lumina config from`: files as people write them for other trainers, and that nothing of them is lost without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.foreign_runs import TRAINERS, run_from
from lumina_ds.config.load import dotted_fields, load_config
from lumina_ds.config.schema import RunConfig

AXOLOTL = """
base_model: some/model
load_in_8bit: false
datasets:
  - path: chats.jsonl
    type: chat_template
val_set_size: 0.05
output_dir: ./outputs/first
sequence_len: 4096
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 2e-5
bf16: auto
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
saves_per_epoch: 1
weight_decay: 0.0
deepspeed: deepspeed_configs/zero2.json
special_tokens:
  pad_token: <|end|>
"""
LLAMA_FACTORY = """
model_name_or_path: some/model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
dataset: identity
template: llama3
cutoff_len: 2048
output_dir: saves/full
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
save_steps: 500
eval_steps: 0.1
overwrite_cache: true
"""
TORCHTUNE = """
output_dir: /tmp/out
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: tok.model, max_seq_len: 1024}
dataset: {_component_: torchtune.datasets.chat_dataset, packed: true, data_files: chats.jsonl}
optimizer: {_component_: torch.optim.AdamW, lr: 2e-5, fused: true}
batch_size: 2
epochs: 1
dtype: bf16
seed: null
loss: {_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}
"""
TRL = "model_name_or_path: some/model\nmax_length: 512\nlearning_rate: 1e-5\nseed: -3\noptim: adafactor\n"


def made(trainer: str, text: str) -> tuple[dict[str, Any], dict[str, str]]:
    found = run_from(trainer, yaml.safe_load(text.replace("2e-5", "2.0e-5").replace("1e-5", "1.0e-5")))
    return found.values, {key: reason for key, _, reason in found.left_out}


def test_axolotl() -> None:
    values, left_out = made("axolotl", AXOLOTL)
    assert values == {
        "data.train_data": ["chats.jsonl"], "data.eval_fraction": 0.05, "run.name": "first", "run.runs_dir": "outputs",
        "data.seq_length": 4096, "data.packing": "best_fit", "train.micro_batch_size": 2,
        "train.gradient_accumulation_steps": 4, "train.epochs": 3, "train.optimizer": "adamw",
        "train.lr_scheduler_type": "cosine", "train.learning_rate": 2e-5, "train.precision": "bf16",
        "train.activation_checkpointing": "full", "train.flash_attention": "on", "train.weight_decay": 0.0,
    }  # fmt: skip
    assert list(left_out) == ["base_model", "warmup_steps", "saves_per_epoch", "deepspeed", "special_tokens.pad_token"]
    assert "lumina import" in left_out["base_model"] and "share of the steps" in left_out["warmup_steps"]


def test_llama_factory() -> None:
    values, left_out = made("llamafactory", LLAMA_FACTORY)
    assert values["data.chat_template"] == "llama3" and values["train.save_every_n_batches"] == 500
    assert left_out.keys() == {
        "model_name_or_path",
        "finetuning_type",
        "lora_rank",
        "dataset",
        "eval_steps",
        "overwrite_cache",
    }
    assert "no adapters" in left_out["lora_rank"] and "number of steps" in left_out["eval_steps"]


def test_torchtune_and_trl() -> None:
    values, left_out = made("torchtune", TORCHTUNE)
    assert values == {
        "run.name": "out", "run.runs_dir": "/tmp", "data.seq_length": 1024, "data.packing": "best_fit",
        "data.train_data": ["chats.jsonl"], "train.optimizer": "adamw", "train.learning_rate": 2e-5,
        "train.micro_batch_size": 2, "train.epochs": 1, "train.precision": "bf16",
    }  # fmt: skip
    assert left_out.keys() == {"tokenizer._component_", "tokenizer.path", "dataset._component_", "loss._component_"}
    values, left_out = made("trl", TRL)
    assert values == {"data.seq_length": 512, "train.learning_rate": 1e-5}
    assert left_out["seed"].startswith("train.seed: ") and "adamw" in left_out["optim"]


@pytest.mark.parametrize(
    ("trainer", "text"), [("axolotl", AXOLOTL), ("llamafactory", LLAMA_FACTORY), ("torchtune", TORCHTUNE)]
)
def test_what_is_written_is_what_our_reader_takes(trainer: str, text: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "theirs.yaml").write_text(text)
    words = ["config", "from", trainer, str(tmp_path / "theirs.yaml"), "--preset", "b7"]
    assert run_command(cli, [*words, "--out", str(tmp_path / "ours.yaml")]) == 0
    out, err = capsys.readouterr()
    values, left_out = made(trainer, text)
    assert f"{len(values)} fields" in out and err.count("left out: ") == len(left_out) == len(err.splitlines())
    config = load_config(str(tmp_path / "ours.yaml")).config
    for name, value in values.items():
        section, key = name.split(".")
        assert getattr(getattr(config, section), key) == value, name
    written = (tmp_path / "ours.yaml").read_text()
    assert all(f"# {key}: {reason}" in written for key, reason in left_out.items())
    assert run_command(cli, words) == 0
    assert capsys.readouterr().out == written
    assert run_command(cli, [*words, "--out", str(tmp_path / "ours.yaml")]) == 2
    assert "exists; give another --out" in capsys.readouterr().err


def test_every_key_of_every_table_takes_or_refuses_any_value() -> None:
    fields = {*dotted_fields(RunConfig)}
    for trainer, table in TRAINERS.items():
        for key in table:
            for value in (True, 1, -1, 0.5, 10**30, "x", "auto", [1], ["a.jsonl"], {"a": 1}, float("nan")):
                found = run_from(trainer, {key: value})
                assert set(found.values) <= fields
                assert (
                    found.values
                    or found.left_out
                    or key in ("do_train", "stage", "assistant_only_loss", "optimizer.fused")
                ), (key, value)
                assert all("\n" not in reason for _, _, reason in found.left_out)


def test_a_file_of_another_kind(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "x.yaml").write_text("a: 1\n")
    assert run_command(cli, ["config", "from", "trl", str(tmp_path / "x.yaml")]) == 2
    assert "is it the right file?" in capsys.readouterr().err
    assert run_command(cli, ["config", "from", "trl", str(tmp_path / "y.yaml")]) == 2
    assert "is no file; give the run file of trl" in capsys.readouterr().err
    (tmp_path / "x.yaml").write_text("seed: 3\n")
    assert run_command(cli, ["config", "from", "trl", str(tmp_path / "x.yaml")]) == 0
    assert capsys.readouterr().out.startswith("# Write `preset: NAME` here, or the section `model`")
