"""Elastic runs of real ranks, whose hosts are lines of a host file: some are killed and taken out, and come back.

Row 30 of the fault matrix, while the run trains: every sample exactly once and in the order of the uninterrupted run, and
the same losses but for the order in which they are summed. test_fault_rows.py has the shorter one of one and two ranks.
"""

import contextlib
import sys
import time

import psutil
import pytest
from two_rank_run import Run

from lumina_ds.engine.world import free_port

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STEPS = 16
OPTIONS = ["--elastic", "2:4", "--grad-accum", "1", "--max-steps", str(STEPS), "--save-every-n-batches", "2"]
# Time to notice that hosts are back.
PACE = [{"kind": "slow loader", "rank": 0, "step": step, "seconds": 0.7} for step in range(1, STEPS + 1)]
# lumina_ds/engine/rendezvous.py refuses to go without it.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four") / "run"
    run = Run(folder, corpus.shards, options=OPTIONS, runner=("--num_gpus", "4"))
    assert run.wait() == 0, run.printed
    assert len(run.records) == STEPS
    return run.records


def check_equal(records, uninterrupted):
    """The same steps with the same samples, each once, and losses and gradient norms as near as fp32 sums are."""
    assert [(r["step"], r["samples"]) for r in records] == [(r["step"], r["samples"]) for r in uninterrupted]
    for name in ("loss", "grad_norm"):
        found, expected = ([record[name] for record in each] for each in (records, uninterrupted))
        assert found == pytest.approx(expected, rel=1e-4), name
        most = max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))
        print(f"largest relative difference of {name}: {most:.1e}")


def test_row_30_four_ranks_lose_two_and_get_them_back(corpus, tmp_path, uninterrupted):
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=4\n")
    options = [*OPTIONS, "--max-restarts", "3", "--expert-parallel", "4", "--run.elastic_check_seconds", "1"]
    run = Run(tmp_path / "run", corpus.shards, PACE, options, runner=("--hostfile", str(hosts)))
    run.lose_and_regain(hosts, most=4, left=2)
    assert run.wait(300) == 0, run.printed
    check_equal(run.records, uninterrupted)
    assert run.layouts == [(4, 4, 1), (2, 2, 2), (4, 4, 1)], run.printed
    assert [restart["restart"] for restart in run.restarts] == [1]
    assert "elastic: 4 ranks can run now instead of 2" in run.printed


def test_row_30_torchrun_loses_an_agent_and_takes_in_another(corpus, tmp_path, uninterrupted):
    """Two agents with two ranks each, as on two hosts; the second is killed with its ranks, and one in its place comes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "2"]
    torchrun += ["--max-restarts", "9", "--rdzv-backend", "c10d", "--rdzv-id", "r"]
    torchrun += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-conf"]

    def agent(name):
        """The first is where the agents meet, and must stay, as on a cluster the host of --rdzv-endpoint."""
        launcher = [*torchrun, f"last_call_timeout=3,is_host={name == 'first'}"]
        options = [*OPTIONS, "--runs-dir", tmp_path / "first/runs"]
        return Run(tmp_path / name, corpus.shards, PACE, options, launcher=launcher, environment=OWN_STORE)

    first, second = agent("first"), agent("second")
    first.wait_for_step(3)
    kill_all(second)
    wait_for_layouts(first, 2)
    first.wait_for_step(len(first.records) + 1)
    third = agent("third")
    try:
        assert first.wait() == 0, first.printed + third.printed
        assert third.wait(60) == 0, third.printed
    finally:
        kill_all(third)
    check_equal(first.records, uninterrupted)
    assert first.layouts == [(4, 2, 1), (2, 2, 2), (4, 2, 1)], first.printed


def kill_all(run):
    for process in [run.process, *run.family()]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    run.process.wait()


def wait_for_layouts(run, number):
    deadline = time.monotonic() + 150
    while len(run.layouts) < number:
        assert run.process.poll() is None and time.monotonic() < deadline, run.printed
        time.sleep(0.1)
