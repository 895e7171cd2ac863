"""A terminal that closes under a run: saved, exit code 75; under nohup the run goes on."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time

import psutil
import pytest
import yaml
from two_rank_run import CHECKOUT, CONFIG

from lumina_ds.checkpoint.format import checkpoint_faults, step_folders
from lumina_ds.ranks.runner import Signals
from lumina_ds.train.stop import StopRequest, ending_when_told

LUMINA = [sys.executable, "-m", "lumina_ds", "train"]
SCRIPT = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", str(CHECKOUT / "launch/train.py")]


@pytest.mark.slow
@pytest.mark.parametrize("start", [LUMINA, SCRIPT], ids=["lumina train", "deepspeed launch/train.py"])
def test_the_state_is_saved_when_the_terminal_closes(start, corpus, tmp_path):
    config = CONFIG | {"train": CONFIG["train"] | {"max_steps": 100_000, "save_every_n_batches": 100_000}}
    config = config | {"deepspeed": {"zero_stage": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", "config.yaml", "--data", corpus.shards, "--experiment-name", "r"]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*start, *map(str, words), *(["--", "--num_gpus", "1"] if start is LUMINA else [])],
        cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while not shown.count(b"loss"):
            with contextlib.suppress(OSError):  # EIO once nobody has the other side any more
                shown += os.read(ours, 65536)
            assert process.poll() is None and len(shown) < 3000, shown.decode()
        started = psutil.Process(process.pid).children(recursive=True)
        os.close(ours)
        assert process.wait(60) == (75 if start is LUMINA else -signal.SIGHUP)
        assert psutil.wait_procs(started, timeout=60)[1] == []
    finally:
        process.kill()
        process.wait()
    (saved,) = step_folders(tmp_path / "runs/r/checkpoints")
    assert checkpoint_faults(saved) == []
    assert "Traceback" not in (tmp_path / "runs/r/logs/rank-0.log").read_text()


def test_what_a_process_was_started_to_ignore_stays_ignored():
    """As nohup leaves SIGHUP and a shell's & SIGINT; SIGTERM always ends a run."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        request = StopRequest()
        with Signals() as signals, ending_when_told():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            assert not signals.received and not request.requested
            assert signal.getsignal(signal.SIGHUP) is signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
        request.restore()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
