"""Every start of a training says something before it imports anything slow: which line came first is counted, no clock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_ds.config.schema import RunConfig
from lumina_ds.ranks.handoff import hand_over

CHECKOUT = Path(__file__).parents[2]
# Ends the process where it would first import one of these, a second or more on a cold disk.
HOOK = """
import os, sys
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name in {"torch", "deepspeed", "pyarrow", "numpy", "sentencepiece", "transformers"}:
            sys.stderr.flush()
            os._exit(99)
sys.meta_path.insert(0, Slow())
"""
GROUP = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
WORDS = ["--config", "debug", "--data", "shards", "--experiment-name", "named"]
LUMINA, TRAIN = ["-m", "lumina_ds", "train"], [str(CHECKOUT / "launch/train.py")]
STARTS, LOADS = "run folder runs/named; loading PyTorch and DeepSpeed\n", "the ranks load PyTorch and DeepSpeed\n"


def first_lines(words: list[str], folder: Path, **variables: str) -> str:
    (folder / "sitecustomize.py").write_text(HOOK)
    paths = os.pathsep.join([str(folder), str(CHECKOUT)])
    kept = {name: value for name, value in os.environ.items() if name not in {*GROUP, "CROSS_RANK"}}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=kept | variables | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 99, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("words", "variables", "line"),
    [
        ([*LUMINA, *WORDS], {}, STARTS),
        ([*LUMINA, *WORDS, "--", "--num_gpus", "2"], {}, STARTS),
        ([*TRAIN, *WORDS], {}, LOADS),
        ([*TRAIN, *WORDS], GROUP, LOADS),
        ([*LUMINA, *WORDS], GROUP, LOADS),
        ([*LUMINA, *WORDS], {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, LOADS),
        # Of several ranks the first one alone speaks.
        ([*TRAIN, *WORDS], GROUP | {"RANK": "1", "LOCAL_RANK": "1"}, ""),
    ],
)  # fmt: skip
def test_a_line_comes_before_what_is_slow(
    words: list[str], variables: dict[str, str], line: str, tmp_path: Path
) -> None:
    assert first_lines(words, tmp_path, **variables) == line


def test_a_rank_of_lumina_train_too(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"run": {"runs_dir": str(tmp_path), "name": "r"}})
    (tmp_path / "r/logs").mkdir(parents=True)
    words = hand_over(config, ["lumina", "train"])
    assert first_lines(["-m", "lumina_ds.cli.train", "--local_rank=0", *words], tmp_path, **GROUP) == LOADS
