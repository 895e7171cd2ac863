"""`lumina train` on two ranks of the real deepspeed runner, in a folder of its own, with faults injected into the ranks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import yaml

from lumina_ds.monitor.writers import read_records
from lumina_ds.ranks.runner import rank_processes

CHECKOUT = Path(__file__).parents[2]
# Runs in every rank before anything else: installs what the test has put into the environment.
HOOK = """import importlib, os
if "RANK" in os.environ and "LUMINA_TEST_HOOK" in os.environ:
    importlib.import_module(os.environ["LUMINA_TEST_HOOK"]).install()
"""
CONFIG = {
    "model": {
        "vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "num_experts": 4, "moe_intermediate_size": 16,
        "tie_word_embeddings": True,
    },
    "train": {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 10, "save_every_n_batches": 2},
    "deepspeed": {"zero_stage": 2, "expert_parallel_size": 2},
    "health": {"stall_timeout_seconds": 10},
    "run": {"record_samples": True, "restart_backoff_seconds": 0.1},
}  # fmt: skip


class Run:
    """`lumina train` on two ranks in a folder of its own, with the faults that are given."""

    def __init__(
        self, folder, shards, faults=(), options=(), runner=("--num_gpus", "2"), environment=None, launcher=None
    ):
        """`launcher`: a command that starts the ranks itself, instead of `lumina train`."""
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(HOOK)
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        planned = [fault | {"marker": str(folder / f"fault-{number}")} for number, fault in enumerate(faults)]
        self.path = folder / "runs/r"
        self.mark = uuid.uuid4().hex
        paths = [str(folder), str(Path(__file__).parent), str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "LUMINA_TEST_MARK": self.mark,
            **(faults_environment(planned) if faults else {}), **(environment or {}),
        }  # fmt: skip
        words = ["--config", folder / "config.yaml", "--data", shards, "--experiment-name", "r", *options]
        command = [sys.executable, "-m", "lumina_ds", "train", *words, "--", *runner]
        if launcher is not None:
            command = [*launcher, CHECKOUT / "launch/train.py", *words]
        self.log = open(folder / "log", "w+")
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=folder, env=self.environment, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait(self, timeout=240):
        """The exit code; fails on a run that does not end, and on processes that it leaves."""
        try:
            code = self.process.wait(timeout)
            time.sleep(1)
            left = [process.cmdline() for process in self.family()]
            assert not left, left
            return code
        finally:
            for process in [self.process, *self.family()]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self.process.wait()

    def family(self):
        """Every process of this run, by the mark in its environment, whoever its parent is now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get("LUMINA_TEST_MARK") == self.mark:
                    found.append(process)
        return found

    def wait_for_step(self, step, timeout=120):
        deadline = time.monotonic() + timeout
        while len(self.records) < step and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def has_ranks(self):
        """Whether the launcher has started one, whatever that has done by now."""
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if "RANK" in process.environ():
                    return True
        return False

    def ranks(self):
        """Processes of the ranks, in the order of their numbers."""
        runner = psutil.Process(self.process.pid).children()[0]
        return sorted(rank_processes(runner.pid), key=lambda process: int(process.environ()["RANK"]))

    @property
    def printed(self):
        self.log.seek(0)
        return self.log.read()

    @property
    def records(self):
        return read_records(self.path / "metrics.jsonl")

    @property
    def exact(self):
        """What must not change, of every step: I1 and I2."""
        return [(r["step"], r["loss"].hex(), r["grad_norm"].hex(), r["samples"]) for r in self.records]

    @property
    def restarts(self):
        return read_records(self.path / "logs/restarts.jsonl")

    @property
    def layouts(self):
        """(ranks, expert-parallel size, accumulation) of every life of an elastic run."""
        names = ("ranks", "expert_parallel_size", "gradient_accumulation_steps")
        return [tuple(record[name] for name in names) for record in read_records(self.path / "logs/layouts.jsonl")]

    def lose_and_regain(self, hosts, most, left):
        """Kill all ranks but `left` and take their slots out of the host file; put them back when the run has gone on."""
        self.wait_for_step(3)
        for rank in self.ranks()[left:]:
            rank.send_signal(signal.SIGKILL)
        hosts.write_text(f"localhost slots={left}\n")
        deadline = time.monotonic() + 120
        while len(self.layouts) < 2:
            assert self.process.poll() is None and time.monotonic() < deadline, self.printed
            time.sleep(0.05)
        hosts.write_text(f"localhost slots={most}\n")


def faults_environment(planned):
    return {"LUMINA_TEST_HOOK": "fault_injection", "LUMINA_TEST_FAULTS": json.dumps(planned)}
