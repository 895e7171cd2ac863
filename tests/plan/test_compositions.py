"""A plan reads its options once and composes DeepSpeed's JSON as often as it looks at distinct layouts; offload comes
from one place, so that plan and train agree.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_ds.cli.plan.verify import memory_request
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.load import Override, load_config
from lumina_ds.errors import ConfigError

# A process of `lumina`, with a note of every composition and every reading of a configuration.
COUNTING = """
import json, sys
from lumina_ds.config import load
from lumina_ds.config.deepspeed import compose

calls = {"composed": [], "loaded": 0}
real_compose, real_load = compose.compose_deepspeed, load.load_config

def counted_compose(config, world_size, precision):
    deepspeed = config.deepspeed
    calls["composed"].append([deepspeed.zero_stage, deepspeed.expert_parallel_size, deepspeed.offload or "none"])
    return real_compose(config, world_size, precision)

def counted_load(*arguments):
    calls["loaded"] += 1
    return real_load(*arguments)

compose.compose_deepspeed, load.load_config = counted_compose, counted_load
from lumina_ds.cli.main import cli, run_command
code = run_command(cli, sys.argv[2:])
json.dump(calls, open(sys.argv[1], "w"))
sys.exit(code)
"""


@pytest.fixture
def counted(tmp_path: Path):
    """counted(words) runs `lumina WORDS` and gives (calls, its JSON)."""

    def run(words: str):
        calls = tmp_path / "calls.json"
        done = subprocess.run(
            [sys.executable, "-c", COUNTING, str(calls), *words.split()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(calls.read_text()), json.loads(done.stdout)

    return run


# Sizes of expert parallelism that divide the four experts of debug, and the four stages; ZeRO-0 is refused in bf16.
GRID = {(stage, size, "none") for stage in (0, 1, 2, 3) for size in (1, 2, 4)}


@pytest.mark.parametrize("more", ["", " --gpus 4", " --explain", " --gpus 4 --precision bf16 --explain"])
def test_a_plan_composes_each_layout_once(counted, more):
    calls, record = counted(f"plan --config debug{more} --json")
    assert calls["loaded"] == 1
    composed = [tuple(layout) for layout in calls["composed"]]
    # The run's own layout stands in the grid; its stage is the one that its number of ranks gives.
    resolved = [(record["zero_stage"] if stage is None else stage, *rest) for stage, *rest in composed]
    assert sorted(resolved) == sorted(GRID)


def test_a_search_composes_each_layout_once(counted):
    words = "plan --config b14 --gpus 8 --gpu rtx4090 --global-batch-tokens 1M --json"
    calls, record = counted(words)
    composed = [tuple(layout) for layout in calls["composed"]]
    cells = {(cell["zero_stage"], cell["expert_parallel_size"], "none") for cell in record["grid"]}
    assert len(composed) == len(set(composed))
    assert {layout for layout in composed if layout[2] == "none"} == cells
    # b14 needs offload on such cards: those layouts are what the grid does not show.
    assert record["cheapest"]["layout"]["offload"] == "optimizer"
    assert {layout[2] for layout in composed} == {"none", "optimizer"}


@pytest.mark.parametrize(
    "words", ["plan check zero2 --config debug --gpus 2", "plan time --config b1 --gpu h100-80 --tokens 1B"]
)
def test_other_verbs_compose_at_most_once(counted, words):
    calls, _ = counted(f"{words} --json")
    assert calls["loaded"] == 1 and len(calls["composed"]) == (1 if "check" in words else 0)


ON_HOST = {"device": "cpu", "pin_memory": True}
FILES = {
    "no file": None,
    "open": {"zero_optimization": {"stage": 3}},
    "optimizer": {"zero_optimization": {"stage": 3, "offload_optimizer": ON_HOST}},
    "both": {"zero_optimization": {"stage": 3, "offload_optimizer": ON_HOST, "offload_param": ON_HOST}},
}
# What is in host memory by the file and --offload; None is refused, since the two contradict.
OFFLOADED = {
    "no file": {None: set(), "none": set(), "optimizer": {"optimizer"}, "optimizer+params": {"optimizer", "param"}},
    "open": {None: set(), "none": set(), "optimizer": {"optimizer"}, "optimizer+params": {"optimizer", "param"}},
    "optimizer": {
        None: {"optimizer"},
        "none": None,
        "optimizer": {"optimizer"},
        "optimizer+params": {"optimizer", "param"},
    },
    "both": {
        None: {"optimizer", "param"},
        "none": None,
        "optimizer": {"optimizer", "param"},
        "optimizer+params": {"optimizer", "param"},
    },
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("offload", [None, "none", "optimizer", "optimizer+params"])
def test_plan_and_train_offload_alike(run_cli, tmp_path, file, offload):
    """`plan`, `plan verify` and the JSON that training composes: the same states in host memory, or the same refusal."""
    words, overrides = ["--zero", "3"], [Override("deepspeed.zero_stage", 3, "--zero")]
    if FILES[file] is not None:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(FILES[file]))
        words += ["--deepspeed_config", str(path)]
        overrides.append(Override("deepspeed.config", str(path), "--deepspeed_config"))
    if offload:
        words += ["--offload", offload]
        overrides.append(Override("deepspeed.offload", offload, "--offload"))
    expected = OFFLOADED[file][offload]
    config = load_config("debug", overrides).config
    code, out, err = run_cli("plan", "--config", "debug", "--gpus", "2", "--json", *words)
    if expected is None:
        with pytest.raises(ConfigError, match="offload_optimizer is set, but the run has --offload none"):
            compose_deepspeed(config, 2, "mixed_bf16")
        assert code == 2 and "is set, but the run has --offload none; drop one" in err
        return
    composed = compose_deepspeed(config, 2, "mixed_bf16")
    zero = composed["zero_optimization"]
    assert {name for name in ("optimizer", "param") if f"offload_{name}" in zero} == expected
    record = json.loads(out)
    assert code == 0 and bool(record["host_bytes"]) == bool(expected)
    request, plan = memory_request(config, 2, "mixed_bf16", "cuda")
    assert request["deepspeed"] == composed and plan.host_bytes == record["host_bytes"]
