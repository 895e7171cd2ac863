"""How the deepspeed runner's arguments are read, and that signals reach whoever is there."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lumina_ds.errors import ConfigError
from lumina_ds.ranks.runner import complete_runner_arguments, planned_world_size


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        ("--num_gpus 4", 4),
        ("--num_accelerators=3", 3),
        ("--hostfile {hosts}", 6),
        ("-H {hosts} --num_gpus 2", 4),
        ("--hostfile {hosts} --num_nodes 1", 2),
        ("--hostfile {hosts} --include one@two:0,3", 4),
        ("--hostfile {hosts} --exclude two:1", 5),
    ],
)
def test_ranks_are_counted_as_deepspeed_counts_them(arguments, ranks, tmp_path):
    hosts = tmp_path / "hostfile"
    hosts.write_text("one slots=2\ntwo slots=4\n")
    assert planned_world_size(arguments.format(hosts=hosts).split()) == ranks


@pytest.mark.parametrize("arguments", ["--num_gpus two", "--hostfile nowhere", "--include elsewhere:0", "--no-such"])
def test_what_the_runner_would_not_take_is_refused_here(arguments):
    with pytest.raises(ConfigError):
        planned_world_size(arguments.split())


def test_one_machine_gets_a_free_port_and_several_agree_on_theirs(tmp_path):
    alone = complete_runner_arguments(["--num_gpus", "2"])
    assert "--master_port" in alone and alone[:2] == ["--log_level", "critical"]
    assert complete_runner_arguments([])[-2:] == ["--num_gpus", "1"]
    hosts = tmp_path / "hostfile"
    hosts.write_text("one slots=2\ntwo slots=4\n")
    assert "--master_port" not in complete_runner_arguments(["--hostfile", str(hosts)])
    assert complete_runner_arguments(["--num_gpus", "2", "--master_port", "7", "--log_level", "info"]) == [
        *("--num_gpus", "2", "--master_port", "7", "--log_level", "info")
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_any_rank_is_there_ends_the_runner(number):
    code = (
        "import os, signal, sys; from lumina_ds.ranks.runner import Signals, run_until_done\n"
        # A test suite in the background of a shell ignores it, and so would the runner.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with Signals() as signals: ended = run_until_done(sys.argv[1:], dict(os.environ), signals)\n"
        # SLURM sends another one to a task that is about to end.
        "os.kill(os.getpid(), 15); sys.exit(ended.code)"
    )
    child = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    process = subprocess.Popen([sys.executable, "-c", code, *child], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "up\n"
        started = time.monotonic()
        os.kill(process.pid, number)
        assert process.wait(20) == 75
        assert time.monotonic() - started < 10
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
