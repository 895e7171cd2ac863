"""`lumina train` through the real deepspeed runner, torchrun, and as a plain process: what a user types."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from lumina_ds.engine.world import free_port
from lumina_ds.monitor.writers import read_records

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
LUMINA = [sys.executable, "-m", "lumina_ds"]
MODEL = {
    "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts": 4, "moe_intermediate_size": 32, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL, "train": {"micro_batch_size": 2, "max_steps": 4}}))
    return str(path)


def environment():
    paths = [str(CHECKOUT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(command, cwd, timeout=180):
    finished = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    return finished.returncode, finished.stdout, finished.stderr


def test_jsonl_to_a_trained_model_in_one_command(tiny, corpus, tmp_path):
    command = [*LUMINA, "train", "--config", tiny, "--train-data", corpus.train, "--tokenizer", "auto", "--zero", "2"]
    command += ["--expert-parallel", "2", "--eval-fraction", "0.1"]
    code, out, err = run([*command, "--experiment-name", "first", "--", "--num_gpus", "2"], tmp_path)
    assert code == 0, err
    assert "ZeRO-2 EP2 fp32" in out and "2 ranks on cpu" in out and "ended at step 4 of 4" in out
    records = read_records(tmp_path / "runs/first/metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(0 <= record["data_seconds"] <= record["step_seconds"] for record in records)
    made = sorted((tmp_path / "runs/.data/shards").glob("*/manifest.json"))
    stamps = [path.stat().st_mtime_ns for path in made]
    assert len(made) == 1
    # The same input again, on one rank and started by hand: the shards are reused.
    plain = [sys.executable, CHECKOUT / "launch/train.py", *command[4:], "--experiment-name", "second"]
    plain[plain.index("--expert-parallel") + 1] = "1"
    code, out, err = run(plain, tmp_path)
    assert code == 0, err
    assert "ZeRO-2 EP1 fp32" in out and "1 rank on cpu" in out
    again = sorted((tmp_path / "runs/.data/shards").glob("*/manifest.json"))
    assert again == made and [path.stat().st_mtime_ns for path in again] == stamps


def test_torchrun_starts_the_same_program(tiny, corpus, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--config", tiny, "--data", corpus.shards, "--expert-parallel", "2", "--experiment-name", "t"]
    code, out, err = run([*torchrun, CHECKOUT / "launch/train.py", *options], tmp_path)
    assert code == 0, err
    assert "ZeRO-1 EP2 fp32" in out and "ended at step 4 of 4" in out


def test_a_signal_saves_ends_with_75_leaves_nobody_behind_and_the_same_command_goes_on(tiny, corpus, tmp_path):
    command = [*LUMINA, "train", "--config", tiny, "--data", corpus.shards, "--expert-parallel", "2"]
    command += ["--experiment-name", "s", "--max-steps", "60"]
    runner = ["--", "--num_gpus", "2"]
    slow = [*command, "--train.gradient_accumulation_steps", "4", *runner]
    metrics = tmp_path / "runs/s/metrics.jsonl"
    log = open(tmp_path / "log", "w+")
    process = subprocess.Popen(
        [str(word) for word in slow], cwd=tmp_path, env=environment(), stdout=log, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 90
        while len(read_records(metrics)) < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4  # runner, launch, two ranks
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
        process.wait()
    log.seek(0)
    printed = log.read()
    assert code == 75, printed
    assert re.search(r"\nstopped by a signal at step \d+ of 60; the checkpoint is saved", printed)
    psutil.wait_procs(family, timeout=15)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    step = json.loads(next((tmp_path / "runs/s/checkpoints").glob("step-*/manifest.json")).read_text())["step"]
    assert 3 <= step < 60
    code, out, err = run([*slow[: -len(runner)], "--stop-at-step", str(step + 1), *runner], tmp_path)
    assert code == 0, err
    assert "resumed from" in out and f"ended at step {step + 1} of 60" in out
    assert [record["step"] for record in read_records(metrics)] == list(range(1, step + 2))
    # One rank instead of two is another batch, and so other rows in a step: refused with the way that keeps them.
    code, out, err = run([*LUMINA, *_with_one_rank(slow)], tmp_path)
    assert code == 5 and "schedule.rows_per_step was 16, is now 8" in err
    assert "keep --batch-size x --grad-accum x 1 rank at 16" in err


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_rank_that_is_told_to_stop_while_it_starts_ends_with_75(number, tiny, corpus, tmp_path):
    """As SLURM does it to tasks of srun; the other rank never comes, so this one stays where it waits for it."""
    task = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    task |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [*LUMINA, "train", "--config", tiny, "--data", str(corpus.shards)]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment() | task, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not _handles(process.pid, number) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75, printed
    assert printed.splitlines()[-1] == "stopped by a signal before there was anything to save"


def _handles(pid, number):
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text()).group(1)
    return bool(int(mask, 16) >> (number - 1) & 1)


def _with_one_rank(command):
    words = [str(word) for word in command[3:]]
    words[words.index("--expert-parallel") + 1] = "1"
    words[words.index("--num_gpus") + 1] = "1"
    return words


def test_dry_run_shows_everything_and_starts_nothing(tiny, corpus, tmp_path):
    command = [*LUMINA, "train", "--config", tiny, "--data", corpus.shards, "--zero", "3", "--expert-parallel", "2"]
    command += ["--model.num_experts", "8", "--dry-run"]
    code, out, err = run([*command, "--json", "--", "--num_gpus", "4"], tmp_path)
    assert code == 0, err
    document = json.loads(out)
    assert document["config"]["model.num_experts"] == {"value": 8, "origin": "command line --model.num_experts"}
    assert document["config"]["model.vocab_size"] == {"value": 400, "origin": f"file {tiny}"}
    assert document["config"]["train.seed"]["origin"] == "default"
    assert document["deepspeed"]["zero_optimization"]["stage"] == 3
    assert (
        document["deepspeed"]["train_batch_size"] == 8 and document["deepspeed"]["expert_parallel"]["autoep_size"] == 2
    )
    assert document["plan"] and document["command"].startswith("deepspeed --log_level critical --master_port")
    assert "--dry-run" not in document["command"] and "--json" not in document["command"]
    code, out, err = run([*command, "--", "--num_gpus", "4"], tmp_path)
    assert code == 0, err
    for part in (
        "model.num_experts",
        "command line",
        '"autoep_size": 2',
        "Peak",
        "deepspeed --log_level critical --master_port",
    ):
        assert part in out
    assert not (tmp_path / "runs").exists()
