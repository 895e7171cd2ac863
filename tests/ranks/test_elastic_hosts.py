"""Which hosts an elastic run takes, waits for, and changes to; programs in place of ranks end as told."""

import json
import os
import sys

import pytest

from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError
from lumina_ds.ranks.elastic import Fleet, planned_start
from lumina_ds.ranks.hosts import Hosts, arguments_for, check_elastic_runner, present_hosts
from lumina_ds.ranks.runner import planned_world_size
from lumina_ds.ranks.supervise import supervise

# One start: writes the next host file, then ends with its code, or, with "asked", when the run is told to change.
PROGRAM = """
import json, os, sys, time
from pathlib import Path
folder, ranks = Path(sys.argv[1]), sys.argv[2]
plan = json.loads((folder / "plan").read_text())
end = plan.pop(0)
(folder / "plan").write_text(json.dumps(plan))
with open(folder / "starts", "a") as stream:
    stream.write(ranks + "\\n")
(folder / "r/metrics.jsonl").write_text(json.dumps({"step": len(plan)}) + "\\n")
if "hosts" in end:
    (folder / "hosts").write_text(end["hosts"])
if end.get("asked"):
    request = folder / "r/logs/stop-request"
    request.unlink(missing_ok=True)  # as rank 0 does when it starts
    deadline = time.monotonic() + 30
    while not request.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
sys.exit(end["code"])
"""
FOUR, THREE, TWO, ONE = (f"localhost slots={number}\n" for number in (4, 3, 2, 1))


@pytest.fixture
def play(tmp_path):
    """play(ends, elastic, **run) supervises starts of an elastic run: (exit code, ranks of every start)."""

    def run(ends, elastic="2:4", **fields):
        (tmp_path / "r/logs").mkdir(parents=True)
        (tmp_path / "r/checkpoints").mkdir()
        (tmp_path / "hosts").write_text(FOUR)
        (tmp_path / "plan").write_text(json.dumps(ends))
        settings = {"name": "r", "runs_dir": str(tmp_path), "restart_backoff_seconds": 0.01, "elastic": elastic}
        settings |= {"elastic_check_seconds": 0.1, "elastic_wait_seconds": 0.5, "max_restarts": 9, **fields}
        model = {"num_experts": 4, "moe_intermediate_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
        config = RunConfig.model_validate({"model": model, "run": settings})
        fleet = Fleet(config, ["--hostfile", str(tmp_path / "hosts")])

        def make(changed):
            assert changed.run.elastic == elastic  # the ranks divide it themselves
            assert planned_world_size(fleet.runner_arguments()) == fleet.num_ranks
            return [sys.executable, "-c", PROGRAM, str(tmp_path), str(fleet.num_ranks)]

        code = supervise(config, make, dict(os.environ), fleet)
        return code, [int(line) for line in (tmp_path / "starts").read_text().split()]

    return run


def test_lost_slots_and_slots_that_are_back(play, capsys):
    lost = {"code": 247, "hosts": TWO}
    back = {"code": 75, "asked": True, "hosts": FOUR}
    assert play([lost, back, {"code": 0}]) == (0, [4, 2, 4])
    printed = capsys.readouterr().err
    assert "restart 1 of 9" in printed and "restart 2" not in printed  # the change back was no failure
    assert "elastic: 2 ranks (--grad-accum 2, --expert-parallel 1) on localhost slots=2" in printed
    assert "elastic: 4 ranks can run now instead of 2; these save and end for it" in printed


def test_slots_taken_out_are_given_back_without_a_failure(play):
    assert play([{"code": 75, "asked": True, "hosts": TWO}, {"code": 0}], max_restarts=0) == (0, [4, 2])


def test_ranks_that_cannot_share_the_steps_stay_idle(play, capsys):
    assert play([{"code": 247, "hosts": THREE}, {"code": 0}]) == (0, [4, 2])
    said = "on localhost slots=2; 1 more could run: 3 ranks cannot share the 4 micro-batches of a step equally"
    assert said in capsys.readouterr().err


def test_too_few_are_waited_for_and_the_run_ends_resumable(play, capsys, tmp_path):
    assert play([{"code": 247, "hosts": ONE}]) == (75, [4])
    printed = capsys.readouterr().err
    assert "--elastic 2:4 needs 2 ranks, and 1 can run; waiting up to 0.5 s for more" in printed
    assert "--elastic 2:4 needs 2 ranks, and 1 can run; start the same command again when there are more" in printed


def test_a_host_file_that_is_gone_is_waited_for(play, tmp_path):
    assert play([{"code": 247, "hosts": "no line of a host file"}]) == (75, [4])


def test_a_loss_counts_as_a_restart_and_a_change_does_not(play):
    change = {"code": 75, "asked": True}
    ends = [change | {"hosts": TWO}, change | {"hosts": FOUR}, {"code": 247, "hosts": TWO}, {"code": 247}]
    assert play(ends, max_restarts=1) == (247, [4, 2, 4, 2])


def test_ranks_that_were_told_to_stop_behind_our_back_are_a_loss(play):
    """As on a host that shuts down: all ranks save and end with 75, and this process was sent nothing."""
    assert play([{"code": 75, "hosts": TWO}, {"code": 0}]) == (0, [4, 2])


def test_hosts_that_go_before_the_ranks_have_met(play):
    assert play([{"code": 4, "hosts": TWO}, {"code": 0}]) == (0, [4, 2])


def test_a_missing_library_is_not_tried_again(play):
    assert play([{"code": 4}, {"code": 0}]) == (4, [4])


def test_the_runner_is_told_the_hosts_that_are_there(tmp_path):
    file, hosts = tmp_path / "chosen", {"a": [0, 1], "b": [0, 1, 2]}
    runner = ["--hostfile", "theirs", "--master_addr", "a", "--include=a@b", "--ssh_port", "7", "--force_multi"]
    everything = arguments_for(Hosts(hosts, over_ssh=True), runner, file, "a")
    assert everything == ["--hostfile", str(file), "--force_multi", "--master_addr", "a", "--ssh_port", "7"]
    assert file.read_text() == "a slots=2\nb slots=3\n"
    # Of b alone, DeepSpeed would start the ranks here; a's address would be that of a host that is gone.
    rest = arguments_for(Hosts({"b": [0, 2]}, over_ssh=True), runner, file, "a")
    assert rest == ["--hostfile", str(file), "--include", "b:0,2", "--force_multi", "--ssh_port", "7"]
    assert planned_world_size(rest) == 2
    assert arguments_for(Hosts({"localhost": [0, 1]}), ["-H", "theirs", "--no_ssh_check"], file, "localhost") == [
        *("--num_gpus", "2", "--no_ssh_check")
    ]
    assert arguments_for(Hosts({"localhost": [1, 3]}), ["-i", "localhost:1,3"], file, "localhost") == [
        *("--include", "localhost:1,3")
    ]


def test_hosts_are_taken_in_order_and_compared_by_slots():
    hosts = Hosts({"a": [0, 1], "b": [0, 1], "c": [0]})
    assert hosts.first(3).slots == {"a": [0, 1], "b": [0]} and hosts.first(9) == hosts
    assert hosts.first(0).num_ranks == 0
    assert (hosts.num_ranks, hosts.most_on_one) == (5, 2)
    assert hosts.hold(hosts.first(3)) and not hosts.first(3).hold(hosts)


def test_a_host_that_ssh_does_not_reach_is_left_out(tmp_path):
    """127.0.0.1 has no ssh server on that port; a host that is in use is not asked."""
    (tmp_path / "hosts").write_text("127.0.0.1 slots=2\nno-such-host.invalid slots=2\n")
    runner = ["--hostfile", str(tmp_path / "hosts"), "--ssh_port", "1"]
    found = present_hosts(runner, in_use=["127.0.0.1"])
    assert (found.slots, found.over_ssh, list(found.silent)) == ({"127.0.0.1": [0, 1]}, True, ["no-such-host.invalid"])
    assert found.without.startswith("; without no-such-host.invalid: ")
    assert present_hosts(runner).slots == {}


def test_where_nobody_could_choose_for_all_hosts_it_is_refused():
    for runner, says in ((["--no_ssh"], "every host would choose"), (["--launcher", "openmpi"], "--launcher openmpi")):
        with pytest.raises(ConfigError, match=says):
            check_elastic_runner(runner)
    check_elastic_runner(["--launcher=pdsh", "--hostfile", "x"])


def test_what_is_planned_is_what_would_start(tmp_path):
    model = {"num_experts": 4, "moe_intermediate_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
    config = RunConfig.model_validate({"model": model, "run": {"elastic": "2:4", "runs_dir": str(tmp_path)}})
    for number, planned in ((1, 2), (3, 2), (4, 4), (9, 4)):
        start = planned_start(config, ["--num_gpus", str(number)])
        assert (start.num_ranks, start.config.train.gradient_accumulation_steps) == (planned, 4 // planned)
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        planned_start(config, ["--hostfile", "nowhere"])
