"""When ranks are started again, by programs in their place that end as told; rows 22 and 36 of the fault matrix."""

import json
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import CheckpointError, MachineError
from lumina_ds.ranks.supervise import end_marked, supervise
from lumina_ds.train.watch.heartbeat import Beat
from lumina_ds.train.watch.orphans import START_MARK

# Plays one start: takes the next of the planned ends, publishes its checkpoint, reaches its step, ends with its code.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
folder, words = Path(sys.argv[1]), sys.argv[2:]
plan = json.loads((folder / "plan").read_text())
end = plan.pop(0)
(folder / "plan").write_text(json.dumps(plan))
with open(folder / "starts", "a") as stream:
    stream.write(json.dumps(words) + "\\n")
if end.get("checkpoint"):
    (folder / "checkpoints" / f"step-{end['checkpoint']:08d}").mkdir()
(folder / "metrics.jsonl").write_text(json.dumps({"step": end.get("step", 0)}) + "\\n")
sys.exit(end["code"])
"""

# A runner and its rank as SLURM signals them: all at once. The rank saves for longer than a leftover may stay, and fails.
SIGNALLED = """
import os, signal, subprocess, sys, time
rank, ready = [sys.executable, "-c", sys.argv[2], sys.argv[1], "lumina_ds.cli.train"], sys.argv[1] + "/ready"
process = subprocess.Popen(rank)
while not os.path.exists(ready):
    time.sleep(0.05)
for number in (process.pid, os.getppid(), os.getpid()):
    os.kill(number, signal.SIGUSR1)
time.sleep(60)
"""
RANK = """
import shutil, signal, sys, time
signals = {signal.SIGUSR1, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
open(sys.argv[1] + "/ready", "w")
signal.sigwait(signals)
time.sleep(5)
shutil.copyfile(sys.argv[1] + "/beat", sys.argv[1] + "/r/logs/heartbeat-rank-0.json")
"""


def test_a_restart_that_cannot_be_prepared_ends_with_the_failure_before_it(tmp_path, capsys):
    """The file for the ranks needs the disk; at the first start its error is the answer."""
    config = RunConfig.model_validate({"run": {"runs_dir": str(tmp_path), "name": "r", "max_restarts": 3}})
    (tmp_path / "r/logs").mkdir(parents=True)
    commands = [[sys.executable, "-c", "raise SystemExit(8)"]]

    def make(_):
        if not commands:
            raise MachineError("the disk is full")
        return commands.pop()

    assert supervise(config, make, dict(os.environ)) == 8
    assert "not started again: the disk is full" in capsys.readouterr().err
    with pytest.raises(MachineError, match="the disk is full"):
        supervise(config, make, dict(os.environ))


@pytest.fixture
def play(tmp_path):
    """play(ends, **fields) supervises starts that end so.

    (code, resume, micro-batch and accumulation of every start, restarts.jsonl)
    """

    def run(ends, health=None, train=None, **fields):
        settings = {"name": "r", "runs_dir": str(tmp_path), "restart_backoff_seconds": 0.01, **fields}
        config = RunConfig.model_validate({"run": settings, "health": health or {}, "train": train or {}})
        folder = tmp_path / "r"
        for name in ("checkpoints", "logs"):
            (folder / name).mkdir(parents=True)
        (folder / "plan").write_text(json.dumps(ends))
        command = [sys.executable, "-c", PROGRAM, str(folder)]

        def make(changed):
            train = changed.train
            assert not train.auto_micro_batch
            return [*command, changed.run.resume, str(train.micro_batch_size), str(train.gradient_accumulation_steps)]

        code = supervise(config, make, dict(os.environ))
        restarts = folder / "logs/restarts.jsonl"
        recorded = restarts.read_text().splitlines() if restarts.exists() else []
        return code, [json.loads(line) for line in (folder / "starts").read_text().splitlines()], recorded

    return run


def test_a_failure_is_started_again_from_the_newest_checkpoint(play, capsys):
    ends = [{"code": 247, "checkpoint": 3, "step": 5}, {"code": 8, "checkpoint": 6, "step": 5}, {"code": 0}]
    code, starts, restarts = play(ends, max_restarts=5, resume="none")
    assert code == 0 and starts == [["none", "1", "1"], ["auto", "1", "1"], ["auto", "1", "1"]]
    found = [json.loads(line) for line in restarts]
    assert [(r["restart"], r["exit_code"], r["step"], r["checkpoint"]) for r in found] == [
        (1, 247, 5, "step-00000003"),
        (2, 8, 5, "step-00000006"),
    ]
    assert "restart 2 of 5 in 0.02 s, from step-00000006, after step 5" in capsys.readouterr().err


def test_row_22_a_crash_loop_stops_without_progress_and_at_the_limit(play, capsys):
    code, starts, _ = play([{"code": 1, "step": 5}] * 9, max_restarts=9)
    assert code == 1 and len(starts) == 2
    assert "no progress: the run failed twice at step 5 from the same checkpoint (none)" in capsys.readouterr().err


def test_row_22_the_limit(play):
    code, starts, _ = play([{"code": 1, "step": step} for step in range(9)], max_restarts=3)
    assert code == 1 and len(starts) == 4


@pytest.mark.parametrize("code", [2, 3, 4, 5, 7, 75])
def test_what_will_not_change_by_itself_is_not_tried_again(play, code):
    found, starts, restarts = play([{"code": code}, {"code": 0}], max_restarts=3)
    assert found == code and len(starts) == 1 and not restarts


def test_nothing_is_started_again_unless_asked(play):
    assert play([{"code": 1}, {"code": 0}])[:2] == (1, [["auto", "1", "1"]])


def test_row_36_out_of_memory_halves_the_micro_batch_without_counting_as_a_restart(play, capsys):
    batch = {"micro_batch_size": 6, "gradient_accumulation_steps": 2}
    code, starts, _ = play([{"code": 6}, {"code": 6}, {"code": 6}], {"out_of_memory": "halve"}, batch)
    assert code == 6  # a micro-batch of one row cannot be halved
    assert [words[1:] for words in starts] == [["6", "2"], ["3", "4"], ["1", "12"]]
    assert "starting again with --batch-size 3 --grad-accum 4, the same rows per step" in capsys.readouterr().err


def test_out_of_memory_ends_the_run_by_default(play):
    assert play([{"code": 6}, {"code": 0}], train={"micro_batch_size": 4})[:2] == (
        6,
        [["auto", "4", "1"]],
    )


def test_a_signal_ends_the_wait_for_a_restart(play):
    sender = threading.Timer(1.0, os.kill, (os.getpid(), 15))
    sender.start()
    started = time.monotonic()
    code, starts, _ = play([{"code": 1}, {"code": 0}], max_restarts=3, restart_backoff_seconds=60)
    assert code == 75 and len(starts) == 1 and time.monotonic() - started < 20


def test_ranks_whose_runner_died_of_the_same_signal_are_waited_for(tmp_path, capsys):
    (tmp_path / "r/logs").mkdir(parents=True)
    code = CheckpointError.exit_code
    beat = Beat("life", 0, 1, "host", 0.0, 1, 7, "save", 5.0, 9, end_code=code, end_reason="the disk is full")
    (tmp_path / "beat").write_text(json.dumps(asdict(beat)))
    config = RunConfig.model_validate({"run": {"name": "r", "runs_dir": str(tmp_path)}})
    command = [sys.executable, "-c", SIGNALLED, str(tmp_path), RANK]
    assert supervise(config, lambda config: command, dict(os.environ)) == code
    assert "anything to save" not in capsys.readouterr().err
    # The same without a rank.
    alone = "import os, signal; os.kill(os.getppid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)"
    (tmp_path / "r/logs/heartbeat-rank-0.json").unlink()
    assert supervise(config, lambda config: [sys.executable, "-c", alone], dict(os.environ)) == 75
    assert "stopped by a signal before there was anything to save" in capsys.readouterr().err


def test_what_lost_its_parents_is_ended_too():
    orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    mark = Path(__file__).name
    psutil.Popen([sys.executable, "-c", orphan], env=os.environ | {START_MARK: mark}).wait()
    assert end_marked(mark) == 1 and end_marked(mark) == 0
