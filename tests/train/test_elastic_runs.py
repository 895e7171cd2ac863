"""Elastic runs of real ranks, whose hosts are lines of a host file: some are killed and taken out, and come back.

Row 30 of the fault matrix, while the run trains: every sample exactly once and in the order of the uninterrupted run, and
the same losses but for the order in which they are summed. test_fault_rows.py has the shorter one of one and two ranks.
"""

import pytest
from two_rank_run import Run

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STEPS = 16
OPTIONS = ["--elastic", "2:4", "--grad-accum", "1", "--max-steps", str(STEPS), "--save-every-n-batches", "2"]
# Time to notice that hosts are back.
PACE = [{"kind": "slow loader", "rank": 0, "step": step, "seconds": 0.7} for step in range(1, STEPS + 1)]


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
