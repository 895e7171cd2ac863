"""Rows of the fault matrix that concern running ranks: the real fault, two ranks of the real deepspeed runner.

Checked after each: losses and gradient norms hex-identical to an uninterrupted run (I1), every sample exactly once
(I2), an exit within a bounded time that leaves no process behind (I4). Those marked `faults` run by
`python -m pytest -m faults`.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from kill_trials import LAUNCHERS, SECONDS_TO_END, Trials, wait_for_nobody
from two_rank_run import CHECKOUT, CONFIG, Run

from lumina_ds.checkpoint.format import checkpoint_faults
from lumina_ds.checkpoint.manifest import read_manifest
from lumina_ds.monitor.writers import read_records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("uninterrupted") / "run", corpus.shards)
    assert run.wait() == 0, run.printed
    assert len(run.exact) == 10
    return run.exact


@pytest.fixture
def start(corpus, tmp_path):
    return lambda *args, **kwargs: Run(tmp_path / "run", corpus.shards, *args, **kwargs)


def test_rows_1_and_20_one_after_the_other(start, uninterrupted):
    faults = [{"kind": "kill in backward", "rank": 1, "step": 4}, {"kind": "stop", "rank": 1, "step": 6}]
    run = start(faults, ["--max-restarts", "5"])
    assert run.wait(400) == 0, run.printed
    assert run.exact == uninterrupted
    killed, stopped = run.restarts
    assert "rank 1 was killed" in killed["reason"] and killed["checkpoint"] == "step-00000002"
    assert stopped["exit_code"] == 8
    assert "rank 1 was stopped by a signal where it is in _in_forward (tests/train/fault_inj" in stopped["reason"]
    assert "rank 0 waits in all_" in stopped["reason"]
    for rank in (0, 1):
        assert (run.path / f"logs/stacks-rank-{rank}.txt").exists()


@pytest.mark.faults
def test_row_23_a_loader_that_hangs_is_named(start, uninterrupted):
    run = start([{"kind": "hang in loader", "rank": 1, "step": 6}], ["--max-restarts", "2"])
    assert run.wait() == 0, run.printed
    assert run.exact == uninterrupted
    (hung,) = run.restarts
    assert hung["exit_code"] == 8
    assert "is in _in_loader (tests/train/fault_injection.py:" in hung["reason"]
    assert "in the data loader of step 6" in hung["reason"]
    assert "rank 0 waits in all_reduce in the training step of step 6" in hung["reason"]


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["kill in forward", "kill in step"])
@pytest.mark.parametrize("rank", [0, 1])
def test_row_1_killed(start, uninterrupted, kind, rank):
    run = start([{"kind": kind, "rank": rank, "step": 5}], ["--max-restarts", "2"])
    assert run.wait() == 0, run.printed
    assert run.exact == uninterrupted and len(run.restarts) == 1


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("receiver", ["launcher", "one rank", "all", "every process"])
def test_rows_13_and_14_signals(start, uninterrupted, number, receiver):
    slow = [{"kind": "slow loader", "rank": 0, "step": step, "seconds": 0.5} for step in range(1, 11)]
    run = start(slow, ["--max-restarts", "2"])
    run.wait_for_step(3)
    targets = {"launcher": [run.process], "one rank": run.ranks()[1:], "all": [run.process, *run.ranks()]}
    # As SLURM does when it preempts a job: the runner and its launch module too.
    targets["every process"] = run.family()
    sent = time.monotonic()
    for process in targets[receiver]:
        process.send_signal(number)
    assert run.wait() == 75, run.printed
    assert time.monotonic() - sent < 30 and not run.restarts
    again = start()
    assert again.wait() == 0, again.printed
    assert again.exact == uninterrupted


def stopped_in_a_long_micro_batch(run, receivers):
    """Rank 1 computes for a minute in a micro-batch of step 4; the seconds from the signal to the end of the run."""
    run.wait_for_step(3)
    time.sleep(1)
    sent = time.monotonic()
    for process in receivers(run):
        process.send_signal(signal.SIGTERM)
    assert run.wait() == 75, run.printed
    assert "stopped by a signal at step 3 of 10; the checkpoint is saved" in run.printed
    return time.monotonic() - sent


def test_row_13_a_signal_inside_a_micro_batch(start, uninterrupted):
    """To rank 0 alone, which waits in a collective for rank 1: Python does not get to its handler there."""
    run = start([{"kind": "busy", "rank": 1, "step": 4, "seconds": 60}], ["--health.stall_timeout_seconds", "100"])
    assert stopped_in_a_long_micro_batch(run, lambda run: run.ranks()[:1]) < 30
    assert checkpoint_faults(run.path / "checkpoints/step-00000003") == []
    again = start()
    assert again.wait() == 0, again.printed
    assert again.exact == uninterrupted


@pytest.mark.faults
def test_row_13_a_signal_between_the_micro_batches_of_a_long_step(start, uninterrupted):
    """In a step of twice two seconds, whose first micro-batch is given up."""
    slow = [{"kind": "busy", "rank": rank, "step": step, "seconds": 2} for rank in (0, 1) for step in (6, 7)]
    run = start([{"kind": "long steps", "rank": "all", "step": 0, "seconds": 0}, *slow])
    run.wait_for_step(5)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75, run.printed
    assert "stopped by a signal at step 5 of 10; the checkpoint is saved" in run.printed
    again = start()
    assert again.wait() == 0, again.printed
    assert again.exact == uninterrupted


def files_without_random_states(step):
    files = read_manifest(step).files
    return {name: entry for name, entry in files.items() if not name.startswith("random")}


@pytest.mark.faults
@pytest.mark.parametrize(
    "layout",
    ["--zero 3 --precision bf16", "--zero 1 --expert-parallel 1 --precision mixed_bf16", "--zero 0", "--zero 2 of 1"],
)
def test_row_13_what_is_saved_inside_a_long_micro_batch_is_what_is_saved_between_steps(corpus, tmp_path, layout):
    """All files but the random states, which no two runs share, bit for bit; and the resumed run ends as the other."""
    words, alone, _ = layout.partition(" of 1")
    options = [*words.split(), "--health.stall_timeout_seconds", "100"]
    options += ["--expert-parallel", "1", "--grad-accum", "4"] if alone else []
    runner = ("--num_gpus", "1" if alone else "2")
    whole = Run(tmp_path / "whole", corpus.shards, (), [*options, "--stop-at-step", "3"], runner)
    assert whole.wait() == 0, whole.printed
    expected = files_without_random_states(whole.path / "checkpoints/step-00000003")
    whole = Run(tmp_path / "whole", corpus.shards, (), options, runner)
    assert whole.wait() == 0, whole.printed
    fault = {"kind": "busy", "rank": 0 if alone else 1, "step": 4, "seconds": 60}
    run = Run(tmp_path / "run", corpus.shards, [fault], options, runner)
    assert stopped_in_a_long_micro_batch(run, lambda run: [run.process]) < 30
    assert files_without_random_states(run.path / "checkpoints/step-00000003") == expected
    again = Run(tmp_path / "run", corpus.shards, (), options, runner)
    assert again.wait() == 0, again.printed
    assert again.exact == whole.exact


@pytest.mark.faults
@pytest.mark.parametrize(("victim", "number"), [("runner", signal.SIGTERM), ("lumina train", signal.SIGKILL)])
def test_row_13_ranks_whose_launcher_is_gone_save_and_end(start, uninterrupted, victim, number):
    slow = [{"kind": "slow loader", "rank": 0, "step": step, "seconds": 0.5} for step in range(1, 11)]
    run = start(slow)
    run.wait_for_step(3)
    runner = psutil.Process(run.process.pid).children()[0]
    ranks = run.ranks()
    (runner if victim == "runner" else run.process).send_signal(number)
    _, alive = psutil.wait_procs([runner, *ranks], timeout=30)
    assert not alive
    run.wait()
    assert "has gone, so this run saves and ends" in run.printed and "stopped by a signal at step" in run.printed
    again = start()
    assert again.wait() == 0, again.printed
    assert again.exact == uninterrupted


def test_a_kill_of_lumina_train_while_its_ranks_start_ends_them(start):
    """At the moment that the first of them is there, and long before it has read anything."""
    run = start(options=["--max-steps", "100000"])
    while not run.has_ranks():
        assert run.process.poll() is None, run.printed
        time.sleep(0.02)
    run.process.kill()
    assert wait_for_nobody(run) < SECONDS_TO_END
    assert run.wait() == -signal.SIGKILL and not (run.path / "metrics.jsonl").exists()
    assert "has gone before there was anything to save, so this run ends" in run.printed


@pytest.mark.faults
@pytest.mark.timeout(5400)
def test_thirty_kills_of_launchers_over_all_phases_leave_no_rank_and_lose_no_step(corpus, uninterrupted, tmp_path):
    options = ("--max-steps", "10", "--save-every-n-batches", "4")
    trials = Trials(tmp_path, corpus.shards, uninterrupted, seed=11, options=options, victims=LAUNCHERS)
    trials.run(30)
    assert len(trials.kills) == 30 and not trials.losses
    assert {kill["moment"] for kill in trials.kills} >= {"start-up", "between steps", "in a micro-batch"}


@pytest.mark.faults
def test_an_error_on_one_rank_between_two_steps_is_saved_before_it_is_reported(start, uninterrupted):
    run = start([{"kind": "raise between steps", "rank": 1, "step": 5}])
    assert run.wait() == 1, run.printed
    assert "RuntimeError: a bug between two steps" in run.printed
    assert "another rank failed (see its line); stopped at step 5, which is saved" in run.printed
    again = start()
    assert again.wait() == 0, again.printed
    assert "step-00000005" in again.printed and again.exact == uninterrupted


def test_rows_1_and_2_kills_at_random_moments(corpus, uninterrupted, tmp_path):
    """One of the trials of kill_trials.py, which makes as many as it is told."""
    options = ("--max-steps", "10", "--save-every-n-batches", "2")
    trials = Trials(tmp_path, corpus.shards, uninterrupted, seed=3, options=options)
    trials.run(1)
    assert len(trials.kills) == 1 and len(trials.finished) == 1


@pytest.mark.faults
def test_row_15_a_second_sigterm_in_the_save(start, uninterrupted):
    run = start([{"kind": "SIGTERM in save", "rank": "all", "step": 4}] * 2)
    assert run.wait() == 75, run.printed
    again = start()
    assert again.wait() == 0, again.printed
    assert again.exact == uninterrupted


@pytest.mark.faults
def test_ranks_that_all_stand_still_and_go_on_are_not_stalled(start, uninterrupted):
    """What a batch system does when it suspends a job, for longer than a stall may last."""
    run = start([{"kind": "slow loader", "rank": 0, "step": step, "seconds": 0.5} for step in range(1, 11)])
    run.wait_for_step(4)
    ranks = run.ranks()
    for process in ranks:
        process.suspend()
    time.sleep(15)
    for process in ranks:
        process.resume()
    assert run.wait() == 0, run.printed
    assert run.exact == uninterrupted


@pytest.mark.faults
def test_row_19_weights_that_are_no_numbers_are_not_published(start):
    """One element on one rank, as step 4 is saved."""
    run = start([{"kind": "nan in weights", "rank": 1, "step": 4}], ["--stop-at-step", "4"])
    assert run.wait() == 7, run.printed
    assert "holds values that are not finite" in run.printed
    assert [folder.name for folder in (run.path / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert (run.path / "checkpoints/latest").read_text() == "step-00000002"


def test_row_30_a_rank_is_lost_with_its_slot_and_comes_back(start, uninterrupted, tmp_path):
    """With four ranks: test_elastic_runs.py."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    pace = [{"kind": "slow loader", "rank": 0, "step": step, "seconds": 0.6} for step in range(1, 11)]
    options = ["--elastic", "1:2", "--max-restarts", "3", "--run.elastic_check_seconds", "0.5"]
    run = start(pace, options, runner=("--hostfile", str(hosts)))
    run.lose_and_regain(hosts, most=2, left=1)
    assert run.wait() == 0, run.printed
    assert run.layouts == [(2, 2, 2), (1, 1, 4), (2, 2, 2)], run.printed
    assert [(record[0], record[3]) for record in run.exact] == [(record[0], record[3]) for record in uninterrupted]
    for place, name in ((1, "loss"), (2, "grad_norm")):
        expected = [float.fromhex(record[place]) for record in uninterrupted]
        assert [record[name] for record in run.records] == pytest.approx(expected, rel=1e-4)
    # The change back was no failure.
    assert [restart["restart"] for restart in run.restarts] == [1]
    assert "elastic: 2 ranks can run now instead of 1" in run.printed
    # The folder's own configuration is the one that was asked for, whatever the last life had.
    written = yaml.safe_load((run.path / "config.yaml").read_text())
    assert written["deepspeed"]["expert_parallel_size"] == 2 and written["run"]["elastic"] == "1:2"


@pytest.mark.faults
def test_row_34_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(corpus, start, uninterrupted):
    first = start([{"kind": "slow loader", "rank": 0, "step": step, "seconds": 0.5} for step in range(1, 11)])
    first.wait_for_step(2)
    ranks = first.ranks()
    for process in ranks:
        process.suspend()
    folder = first.path.parents[1]
    (folder / "second").mkdir()
    second = Run(folder / "second", corpus.shards, options=["--runs-dir", folder / "runs"])
    assert second.wait() == 2, second.printed
    assert "another run is training in" in second.printed
    for process in ranks:
        process.resume()
    assert first.wait() == 0, first.printed
    assert first.exact == uninterrupted


@pytest.mark.faults
def test_row_21_a_slow_rank_is_named(start):
    faults = [{"kind": "busy", "rank": 1, "step": step, "seconds": 0.5} for step in range(1, 31)]
    options = ["--health.straggler_window_seconds", "4", "--max-steps", "30", "--save-every-n-batches", "0"]
    run = start(faults, options)
    assert run.wait() == 0, run.printed
    assert "rank 1 is slow: it works" in run.printed
    measured = [r for r in run.records if "straggler_ratio" in r]
    assert measured[-1]["slowest_rank"] == 1 and measured[-1]["straggler_ratio"] > 2


@pytest.mark.faults
def test_row_22_the_same_failure_twice_ends_the_run(start):
    run = start([{"kind": "raise in loader", "rank": 0, "step": 5}] * 3, ["--max-restarts", "9"])
    code = run.wait()
    assert code not in (0, 75) and len(run.restarts) == 1, run.printed
    assert "no progress: the run failed twice at step" in run.printed


@pytest.mark.faults
def test_row_23_a_loader_that_raises_is_started_again(start, uninterrupted):
    run = start([{"kind": "raise in loader", "rank": 1, "step": 5}], ["--max-restarts", "2"])
    assert run.wait() == 0, run.printed
    assert run.exact == uninterrupted


@pytest.mark.faults
def test_row_36_out_of_memory_goes_on_with_half_the_micro_batch(start, uninterrupted):
    # Every block above 16 KiB comes from the kernel, which gives this process no more from step 5 on.
    run = start(
        [{"kind": "no memory", "rank": 1, "step": 5}],
        ["--health.out_of_memory", "halve"],
        environment={"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TOP_PAD_": "0"},
    )
    assert run.wait() == 0, run.printed
    assert "rank 1 ran out of memory" in run.printed
    assert "starting again with --batch-size 1 --grad-accum 4, the same rows per step" in run.printed
    assert [record[3] for record in run.exact] == [record[3] for record in uninterrupted]
    losses = [record["loss"] for record in run.records]
    assert losses == pytest.approx([float.fromhex(record[1]) for record in uninterrupted], rel=1e-4)


@pytest.mark.faults
def test_a_taken_port_ends_the_run_and_leaves_nobody(start):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        run = start(runner=("--num_gpus", "2", "--master_port", port))
        assert run.wait() not in (0, 75), run.printed
        assert "EADDRINUSE" in run.printed or port in run.printed


@pytest.mark.faults
def test_a_full_dev_shm_is_no_fault(corpus, tmp_path, uninterrupted):
    """In a mount namespace of its own, whose /dev/shm is one page that is full."""
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("unshare -rm is not allowed here")
    script = 'mount -t tmpfs -o size=4k tmpfs /dev/shm; head -c 4096 /dev/zero > /dev/shm/full; exec "$@"'
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    words = [sys.executable, "-m", "lumina_ds", "train", "--config", folder / "config.yaml", "--data", corpus.shards]
    words += ["--experiment-name", "r", "--", "--num_gpus", "2"]
    finished = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *map(str, words)],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert len(read_records(folder / "runs/r/metrics.jsonl")) == len(uninterrupted)
