"""What faulthandler's dump says about a rank, and what is made of the ranks' places."""

import faulthandler
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from lumina_ds.train.watch.heartbeat import Beat, Heartbeat, cause_of_end, read_beats
from lumina_ds.train.watch.stacks import call_of, is_waiting, read_stacks, stacks_path
from lumina_ds.train.watch.watchdog import find_straggler, stall_lines

DUMP = """Thread 0x00000000000000aa (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait
  File "/venv/torch/distributed/distributed_c10d.py", line 5140 in all_to_all_single
  File "/venv/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/venv/deepspeed/comm/comm.py", line 129 in log_wrapper
  File "/src/lumina_ds/train/step.py", line 100 in run_step

Current thread 0x00000000000000bb (most recent call first):
  File "/src/lumina_ds/train/watch/watchdog.py", line 150 in _end_stalled_run
"""
LOADING = """Thread 0x00000000000000cc (most recent call first):
  File "/src/lumina_ds/data/shards/folder.py", line 99 in document
  File "/usr/lib/python3.11/concurrent/futures/thread.py", line 58 in run
  File "/usr/lib/python3.11/concurrent/futures/thread.py", line 83 in _worker

Thread 0x00000000000000aa (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait
  File "/src/lumina_ds/data/loader.py", line 44 in take
"""


def beat(rank, phase="the training step", pid=None, **fields):
    pid = pid or os.getpid()
    return Beat(
        "life", rank, pid, os.uname().nodename, psutil.Process(pid).create_time(), 0xAA, 7, phase, 60.0, 5, **fields
    )


def test_the_line_names_who_is_waited_for_first(tmp_path):
    for rank, dump in enumerate((DUMP, LOADING, DUMP)):
        stacks_path(tmp_path, rank).write_text(dump)
    beats = [beat(0), beat(1, "the data loader"), beat(2)]
    assert stall_lines(beats, set(), tmp_path) == [
        "rank 1 is in document (data/shards/folder.py:99) in the data loader of step 7",
        "ranks 0, 2 wait in all_to_all_single in the training step of step 7",
    ]


def test_a_stopped_process_and_one_that_is_gone(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        process.send_signal(19)
        stopped = beat(0, pid=process.pid)
        deadline = time.monotonic() + 5
        while not stopped.is_stopped and time.monotonic() < deadline:
            time.sleep(0.01)
        expected = "rank 0 was stopped by a signal, last seen in the training step of step 7"
        assert stall_lines([stopped], {0}, tmp_path) == [expected]
    finally:
        process.kill()
        process.wait()
    assert stall_lines([stopped], {0}, tmp_path)[0].startswith("rank 0 is gone")


def test_the_dump_of_this_very_process(tmp_path):
    path = tmp_path / "stacks"
    with open(path, "w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    frames = read_stacks(path)[threading.main_thread().ident]
    assert frames[0].function == "test_the_dump_of_this_very_process" and frames[0].file == __file__
    assert call_of(read_stacks(path), threading.main_thread().ident, False).startswith("is in test_the_dump")
    assert not is_waiting(sys._current_frames()[threading.main_thread().ident])
    assert read_stacks(tmp_path / "none") == {}


def test_beats_outlive_their_process(tmp_path):
    heart = Heartbeat(tmp_path, 3, "life")
    heart.enter("evaluation", 9)
    heart.write()
    heart.write(7, "diverged")
    Path(tmp_path / "heartbeat-rank-4.json").write_text("{")
    (found,) = read_beats(tmp_path)
    assert (found.rank, found.step, found.phase, found.count) == (3, 9, "evaluation", 2)
    assert (found.end_code, found.end_reason, found.is_here, found.is_stopped) == (7, "diverged", True, False)
    assert read_beats(tmp_path, "another life") == []


def test_the_cause_is_who_says_why_then_who_was_killed_then_who_failed_for_another():
    closed = "RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer"
    mourner, killed, bug = (
        beat(0, end_code=1, end_reason=closed),
        beat(1),
        beat(2, end_code=1, end_reason="KeyError: x"),
    )
    full, fine = beat(3, end_code=6), beat(4, end_code=0)
    assert cause_of_end([mourner, killed, bug, full, fine]) == full
    assert cause_of_end([mourner, killed, bug]) == bug
    assert cause_of_end([mourner, killed, fine]) == killed
    agreed = beat(5, end_code=3, end_reason="another rank failed (see its line)")
    assert cause_of_end([agreed, bug]) == bug
    assert cause_of_end([fine]) is None and cause_of_end([mourner]) == mourner


def test_the_slowest_rank_by_hand():
    assert find_straggler({0: 0.2, 1: 1.0}) == {"rank": 1, "ratio": 5.0}
    assert find_straggler({0: 0.5, 1: 0.9, 2: 0.4, 3: 0.45}) == {"rank": 1, "ratio": 2.0}
    assert find_straggler({0: 1.0}) == {}
