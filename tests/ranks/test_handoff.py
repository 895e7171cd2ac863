"""`lumina train` settles everything once: what each process parses, merges and composes, and what ranks refuse."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from lumina_ds.cli.main import run_command
from lumina_ds.cli.train import command
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.ranks import handoff
from lumina_ds.ranks.handoff import hand_over, take_over
from lumina_ds.ranks.runner import runner_command

CHECKOUT = Path(__file__).parents[2]
MODEL = {
    "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts": 4, "moe_intermediate_size": 32, "tie_word_embeddings": True,
}  # fmt: skip

# Put before the program of every process: notes each call of these functions in a file, with the process that made it.
COUNTER = """
import os, sys
from functools import wraps
from lumina_ds.config import load
from lumina_ds.config.deepspeed import compose

def noted(function):
    @wraps(function)
    def call(*arguments, **options):
        with open(os.environ["COUNTED"], "a") as stream:
            stream.write(f"{os.environ.get('RANK', 'parent')} {function.__name__}\\n")
        return function(*arguments, **options)
    return call

load.load_config = noted(load.load_config)
compose.compose_deepspeed = noted(compose.compose_deepspeed)
"""


@pytest.fixture
def count(tmp_path):
    """count(words) runs Python with them; how often each process called each of the counted functions."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first/sitecustomize.py").write_text(COUNTER)
    paths = [str(tmp_path / "first"), str(CHECKOUT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    counted = tmp_path / "counted"

    def run(*words):
        counted.write_text("")
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env=environment | {"COUNTED": str(counted)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return dict(Counter(counted.read_text().splitlines())), done.stdout

    return run


@pytest.fixture
def tiny(tmp_path, corpus):
    path = tmp_path / "tiny.yaml"
    train = {"micro_batch_size": 2, "max_steps": 2}
    path.write_text(yaml.safe_dump({"model": MODEL, "train": train, "data": {"shards": str(corpus.shards)}}))
    return path


@pytest.mark.slow
def test_every_process_settles_its_options_once(count, tiny, tmp_path):
    train = ["-m", "lumina_ds", "train", "--config", tiny, "--expert-parallel", "2", "--experiment-name", "handed"]
    runner = ["--", "--num_gpus", "2"]
    once = {"parent load_config": 1, "parent compose_deepspeed": 1}
    counts, printed = count(*train, "--dry-run", "--json", *runner)
    assert counts == once
    # What it shows is a command for a user, in the user's own words.
    assert f"--config {tiny} --expert-parallel 2" in json.loads(printed)["command"]

    counts, printed = count(*train, *runner)
    assert counts == once | {f"{rank} compose_deepspeed": 1 for rank in (0, 1)}
    assert "ZeRO-1 EP2 fp32" in printed and "ended at step 2 of 2" in printed
    folder = tmp_path / "runs/handed"
    [start] = folder.glob("logs/start-*.json")
    handed = RunConfig.model_validate(json.loads(start.read_text())["config"])
    assert handed.deepspeed.expert_parallel_size == 2 and handed.run.name == "handed"
    written = json.loads((folder / "environment.json").read_text())
    assert written["command"][1:] == [*map(str, train[2:]), *runner]

    # One that another launcher starts resolves its own words.
    counts, _ = count(CHECKOUT / "launch/train.py", "--config", tiny, "--experiment-name", "foreign")
    assert counts == {"parent load_config": 1, "0 compose_deepspeed": 1}


def handed_over(folder):
    config = RunConfig.model_validate({"model": MODEL, "run": {"name": "r", "runs_dir": str(folder)}})
    (folder / "r/logs").mkdir(parents=True)
    return config, hand_over(config, ["lumina", "train"])


def test_the_same_configuration_comes_out(tmp_path):
    config, [option, path, digest] = handed_over(tmp_path)
    assert take_over(Path(path), digest) == (config, ["lumina", "train"])
    assert runner_command([], [option, path, digest])[-3:] == [option, path, digest]
    # The same start writes the same file, another one another.
    assert hand_over(config, ["lumina", "train"]) == [option, path, digest]
    config.train.seed = 7
    assert hand_over(config, ["lumina", "train"])[1] != path


def test_a_changed_file_is_refused_in_one_line(tmp_path, capsys):
    _, [option, path, digest] = handed_over(tmp_path)
    text = Path(path).read_text()
    Path(path).write_text(text.replace('"seed": 42', '"seed": 43'))
    assert run_command(command, ["--local_rank=0", option, path, digest]) == ConfigError.exit_code == 2
    printed = capsys.readouterr().err
    assert printed.splitlines() == [  # the first is what rank 0 says at once
        "the ranks load PyTorch and DeepSpeed",
        f"error: {path} has changed since the run was started; start the run again",
    ]


def test_a_host_without_the_file_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(handoff, "_PATIENCE_SECONDS", 0.0)
    of_a_launcher = {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in of_a_launcher.items():
        monkeypatch.setenv(name, str(value))
    words = ["--resolved", str(tmp_path / "start.json"), "0" * 64]
    assert run_command(command, words) == MachineError.exit_code
    printed = capsys.readouterr().err
    assert printed.startswith("[rank 3] error: ") and "--runs-dir must be a folder that all hosts share" in printed


@pytest.mark.parametrize(
    "more", [["--zero", "2"], ["--model.num_experts", "8"], ["--dry-run"], ["--", "--num_gpus", "2"]]
)
def test_nothing_goes_with_it(more, tmp_path, capsys):
    _, words = handed_over(tmp_path)
    assert run_command(command, [*words, *more]) == 2
    assert "no other option goes with it" in capsys.readouterr().err
