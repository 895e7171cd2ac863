"""Stopped, started again in new processes, and resumed: bit for bit the uninterrupted run, ZeRO 1 to 3 with experts."""

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lumina_ds.checkpoint.format import weight_files
from lumina_ds.cli.main import cli, run_command
from lumina_ds.monitor.writers import read_records

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "run_worker.py"
EXACT = ("loss", "grad_norm", "load_balancing_loss", "router_z_loss", "learning_rate")

ROUTING_METRICS = (
    "expert_usage", "usage_entropy", "router_entropy", "max_violation", "dead_experts", "dropped_share",
    "rerouted_share", "capacity_factor",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def records(run):
    return read_records(run / "metrics.jsonl")


def test_resumed_equals_uninterrupted(run_ranks, corpus, runs_dir):
    for kind in ("whole", "half", "resumed"):
        run_ranks(WORKER, kind, str(runs_dir), str(corpus.shards), str(corpus.eval_shards))
        if kind == "half":
            assert len(records(runs_dir / "parts-zero2-fp32")) == 4
    for case in ("zero1-fp32", "zero2-fp32", "zero3-fp32", "zero2-bf16"):
        whole, parts = records(runs_dir / f"whole-{case}"), records(runs_dir / f"parts-{case}")
        assert [record["step"] for record in parts] == list(range(1, 11))
        assert whole[-1]["loss"] < 0.8 * whole[0]["loss"]
        for expected, found in zip(whole, parts, strict=True):
            assert [expected[key].hex() for key in EXACT] == [found[key].hex() for key in EXACT], (
                case,
                expected["step"],
            )
            assert expected["samples"] == found["samples"]
            for key in ROUTING_METRICS:
                assert expected.get(key) == found.get(key), (case, key)
    assert len({tuple(record["capacity_factor"]) for record in records(runs_dir / "parts-zero3-fp32")}) > 3


@pytest.mark.parametrize("case", ["zero2-bf16", "zero3-fp32"])
def test_whole_weights_hold_the_selection_biases_as_the_routers_had_them(runs_dir, case):
    step = runs_dir / f"parts-{case}" / "checkpoints" / "step-00000010"
    weights = {name: tensor for path in weight_files(step) for name, tensor in load_file(path).items()}
    state = load_file(step / "buffers.safetensors")
    moved = 0.0
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.router.e_score_correction_bias"
        assert weights[name].dtype == torch.float32 and torch.equal(weights[name], state[name])
        # Ten steps of 0.01 up, down, or none.
        counts = weights[name] / 0.01
        assert torch.allclose(counts, counts.round(), atol=1e-3) and counts.abs().max() <= 10
        moved += float(counts.abs().sum())
    assert moved > 0
    assert ("model.layers.0.mlp.router.capacity_factor" in state) == (case == "zero3-fp32")


def test_the_run_folder_is_as_documented(runs_dir):
    run = runs_dir / "whole-zero2-fp32"
    names = {path.name for path in run.iterdir()}
    documented = {"config.yaml", "ds_config.json", "metrics.jsonl", "metrics.csv", "evaluations.jsonl", "checkpoints"}
    assert documented | {"tokenizer.model", "logs"} <= names
    steps = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert steps == ["step-00000004", "step-00000008", "step-00000010"]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000010"
    assert (run / "checkpoints" / "best").read_text() == "step-00000010"
    evaluations = read_records(run / "evaluations.jsonl")
    assert [record["step"] for record in evaluations] == [0, 5, 10]
    assert evaluations[-1]["perplexity"] < evaluations[0]["perplexity"] / 2


@pytest.mark.parametrize("case", ["zero1-fp32", "zero2-fp32", "zero3-fp32", "zero2-bf16"])
def test_evaluate_without_deepspeed_agrees_with_the_ranks(runs_dir, corpus, capsys, case):
    run = runs_dir / f"parts-{case}"
    precision = case.split("-")[1]
    command = ["evaluate", str(run), "--data", str(corpus.eval_shards), "--inference-precision", precision, "--json"]
    assert run_command(cli, command) == 0
    found = json.loads(capsys.readouterr().out)
    expected = read_records(run / "evaluations.jsonl")[-1]
    assert found["step"] == expected["step"] == 10
    assert found["trained_tokens"] == expected["trained_tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5 if precision == "fp32" else 1e-3)


def test_chat_answers_every_line_and_survives_one_that_is_too_long(runs_dir, capsys, monkeypatch):
    lines = ["what is 1 plus 2?", "word " * 200, "/reset", "and one more?", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    run = str(runs_dir / "whole-zero2-fp32")
    assert run_command(cli, ["chat", run, "--max-new-tokens", "8", "--temperature", "0"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2  # the replies; what is not answered is said beside them
    assert "the model's context is 64" in printed.err


def test_generate_repeats_with_the_seed(runs_dir, capsys):
    replies = []
    for _ in range(2):
        command = [
            "generate",
            str(runs_dir / "whole-zero3-fp32"),
            "--prompt",
            "what is 2 plus 2?",
            "--seed",
            "3",
            "--json",
        ]
        assert run_command(cli, [*command, "--max-new-tokens", "30"]) == 0
        replies.append(json.loads(capsys.readouterr().out))
    assert replies[0] == replies[1] and replies[0]["reply"] and replies[0]["step"] == 10


def test_checkpoint_verify_names_the_damaged_file_and_generate_falls_back(runs_dir, capsys):
    run = runs_dir / "whole-zero1-fp32"
    assert run_command(cli, ["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("sound") == 3
    damaged = next((run / "checkpoints" / "step-00000010").glob("model-*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit
    damaged.write_bytes(content)
    assert run_command(cli, ["checkpoint", "verify", str(run)]) == 5
    printed = capsys.readouterr()
    assert f"{damaged.name} was altered" in printed.out and "1 of 3 checkpoints is damaged" in printed.err
    assert run_command(cli, ["generate", str(run), "--prompt", "hello", "--json", "--max-new-tokens", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 8
    step = run / "checkpoints" / "step-00000010"
    assert run_command(cli, ["generate", str(step), "--prompt", "hello"]) == 5


def test_checkpoint_list(runs_dir, capsys):
    assert run_command(cli, ["checkpoint", "list", str(runs_dir / "whole-zero3-fp32"), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [row["step"] for row in listed] == [4, 8, 10] and listed[-1]["latest"]
    assert listed[0]["topology"] == {"world_size": 2, "zero_stage": 3, "expert_parallel_size": 2, "precision": "fp32"}
