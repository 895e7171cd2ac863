"""`lumina bench train` and `lumina profile` on real engines: figures that fit together, and mistakes in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.load import load_config
from lumina_ds.config.schema import ModelConfig
from lumina_ds.plan.flops import flops_per_token
from lumina_ds.plan.parameters import count_parameters

CHECKOUT = Path(__file__).parents[2]
LUMINA = [sys.executable, "-m", "lumina_ds"]
MODEL = {
    "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts": 4, "moe_intermediate_size": 32, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL, "train": {"micro_batch_size": 2}}))
    return str(path)


def run(words, cwd):
    paths = [str(CHECKOUT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [*LUMINA, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_bench_train_puts_variants_side_by_side(tiny, corpus, tmp_path):
    words = ["bench", "train", "--config", tiny, "--steps", 4, "--warmup", 1, "--json"]
    words += ["--variant", "--zero 1 --grad-accum 3", "--variant", f"--data {corpus.shards}"]
    code, out, err = run(words, tmp_path)
    assert code == 0, err
    random, real = json.loads(out)["results"]
    for result in (random, real):
        assert result["exit_code"] == 0 and result["world_size"] == 1 and result["steps"] == 4
        seconds = result["step_seconds"]
        assert 0 < seconds["min"] <= seconds["p10"] <= seconds["median"] <= seconds["p90"] <= seconds["max"]
        assert result["mfu"] == pytest.approx(
            flops_per_token(ModelConfig(**MODEL), 64) * result["tokens_per_second"] / result["peak_flops"]
        )
        assert (
            result["peak_flops"] > 1e9
            and "a matrix product of 1024" in result["peak_flops_of"]
            and 0 <= result["data_share"] < 1
            and result["peak_bytes"] > 50e6
        )
    # 2 rows of 64 tokens, three times; random rows have no padding, real ones do.
    assert (random["zero_stage"], random["tokens_per_step"], random["data"]) == (1, 384, "random tokens")
    seconds = random["step_seconds"]
    assert 384 / seconds["max"] <= random["tokens_per_second"] <= 384 / seconds["min"]
    assert 0 < real["tokens_per_step"] <= 128 and real["data"] == str(corpus.shards)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_profile_splits_time_and_memory(tiny, corpus, tmp_path):
    words = ["profile", "--config", tiny, "--data", corpus.shards, "--zero", 1, "--expert-parallel", 2]
    words += ["--steps", 3, "--trace", "trace.json"]
    code, out, err = run([*words, "--json", "--", "--num_gpus", 2], tmp_path)
    assert code == 0, err
    result = json.loads(out)
    spent = {(row["phase"], row["part"]): row["seconds"] for row in result["time"]}
    for part in ("attention", "router", "experts", "dispatch and combine", "norms", "embedding"):
        assert spent["forward", part] > 0 and spent["backward", part] > 0, part
    for phase in ("forward", "backward", "optimizer"):
        assert spent[phase, "communication"] > 0
    assert spent["forward", "head and loss"] > 0 and spent["backward", "gradients"] > 0
    assert spent["between", "data"] >= 0
    # The parts are the whole: nothing is counted twice or left out.
    assert sum(spent.values()) == pytest.approx(result["profiled_step_seconds"], rel=0.1)
    count = count_parameters(load_config(tiny).config.model)
    dense, experts = count.total - count.experts, count.experts // 2
    # fp32 weights of half the experts; masters and moments of half the rest too, with some elements of padding.
    components = result["memory"]["components"]
    assert components["parameters"] == pytest.approx(4 * (dense + experts), rel=0.01)
    assert components["moments"] == pytest.approx(8 * (dense / 2 + experts), rel=0.01)
    assert result["memory"]["peak_bytes_of_fullest_rank"] >= result["memory"]["peak_bytes"] > 50e6
    assert set(result["memory"]["peak_by_phase"]) == {"forward", "backward", "optimizer"}
    assert result["loader"]["seq_length"] == 64 and result["loader"]["rows_per_second"] > 0
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"lumina phase forward", "lumina part experts", "lumina part communication"} <= names
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


CASES = {
    "no configuration": (["bench", "train"], 2, "--config is missing"),
    "wrong option in a variant": (["bench", "train", "--config", "debug", "--variant", "--zeroo 2"], 2, "--zero?"),
    "open quote": (["bench", "train", "--config", "debug", "--variant", "--zero '"], 2, "--variant --zero '"),
    "no such shards": (["bench", "train", "--config", "debug", "--data", "nowhere"], 3, "nowhere"),
    "text": (["profile", "--config", "debug", "--train-data", "x.jsonl"], 2, "give --data"),
    "own option": (["profile", "--config", "debug", "--stepps", "3"], 2, "did you mean --steps?"),
    "trace": (["profile", "--config", "debug", "--trace", "{folder}/none/t.json"], 2, "cannot be written"),
    "snapshot": (["profile", "--config", "debug", "--memory-snapshot", "{folder}/s"], 4, "needs a CUDA GPU"),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes(case, tmp_path, capsys):
    import torch

    words, code, fragment = CASES[case]
    if case == "snapshot" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where a snapshot is no mistake")
    assert run_command(cli, [word.format(folder=tmp_path) for word in words]) == code
    printed = capsys.readouterr()
    assert fragment in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""
