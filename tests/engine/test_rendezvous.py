"""Ranks that miss one another find out within the time given, and say who, where and why. Real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.engine.rendezvous import Arrival, _unreached
from lumina_ds.engine.world import free_port
from lumina_ds.text import ranks_in_runs

WORKER = Path(__file__).parent / "rendezvous_worker.py"


def begin(rank: int, size: int, port: int, seconds: float, torch: str = "", **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(WORKER), str(seconds), torch]
    group = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | group | variables
    pipe = subprocess.PIPE
    # A rank that has met the others stays until its input ends.
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
    out, err = process.communicate(timeout=120)
    assert out, err
    return process.returncode, json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_who_misses_one_another_says_so_within_the_time() -> None:
    """All cases at the same time: a start costs seconds."""
    with socket.create_server(("", 0)) as taken:
        ports = [free_port() for _ in range(7)]
        good = [begin(rank, 2, ports[0], 60) for rank in (0, 1)]
        # Ranks 2 and 3 of 4 never start.
        few = [begin(rank, 4, ports[1], 12) for rank in (0, 1)]
        mixed = [begin(0, 2, ports[2], 60), begin(1, 2, ports[2], 60, "1.13.0")]
        nameless = begin(1, 2, ports[3], 2, MASTER_ADDR="no-such-host.invalid")
        closed = begin(1, 2, ports[3], 2)
        occupied = begin(0, 2, taken.getsockname()[1], 2)
        senseless = begin(0, 2, 0, 2)
        own, other = {"LUMINA_RENDEZVOUS_TOKEN": "run a"}, {"LUMINA_RENDEZVOUS_TOKEN": "run b"}
        # A rank of another run comes to the same port first, for the place of rank 1; and one to a rank 0 of another.
        crowd = [begin(1, 2, ports[4], 60, **other), begin(0, 2, ports[4], 60, **own), begin(1, 2, ports[4], 60, **own)]
        strange = [begin(0, 2, ports[5], 10, **own), begin(1, 2, ports[5], 10)]

        alone = {"total": 2.0, "interface": "lo"}
        assert [end(rank) for rank in good] == [(0, {"rank": rank} | alone) for rank in (0, 1)]
        for rank in (crowd[0], strange[1]):
            code, found = end(rank)
            assert code == 4 and not found["shared"] and "rank 1 on " in found["error"]
            assert (
                "was not let in at 127.0.0.1:" in found["error"] and "rendezvous token is another one" in found["error"]
            )
        assert [end(rank) for rank in crowd[1:]] == [(0, {"rank": rank} | alone) for rank in (0, 1)]
        code, found = end(strange[0])
        assert code == 4 and found["error"].startswith("rank 1 of 2 came with another rendezvous token; all hosts must")
        for rank in few:
            code, found = end(rank)
            assert code == 4 and found["shared"]
            assert found["error"].startswith("ranks 2-3 of 4 did not come within 12 s (here: ")
            assert found["seconds"] < 12 + 30
        for rank in mixed:
            code, found = end(rank)
            assert code == 4 and found["shared"] and "torch 1.13.0, but rank 0's host" in found["error"]
        for rank, *says in (
            (nameless, "could not reach rank 0 at no-such-host.invalid:", "(the name does not resolve)"),
            (closed, "for 2 s (connection refused); check that rank 0's host was started"),
            (occupied, "(address already in use); choose a free --master_port"),
            (senseless, "MASTER_PORT=0 is no port"),
        ):
            code, found = end(rank)
            assert code == 4 and not found["shared"]
            assert all(words in found["error"] for words in says), found


def test_a_host_that_another_cannot_reach_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as open_port:
        heads = [
            Arrival(0, "a", "127.0.0.1", 1, {}),
            Arrival(1, "b", "127.0.0.1", open_port.getsockname()[1], {}),
            Arrival(2, "c", "127.0.0.1", free_port(), {}),
        ]
        [fault] = _unreached(heads[0], heads)
    assert fault == (
        f"a (127.0.0.1) cannot open a connection to c at 127.0.0.1:{heads[2].port} (connection refused); "
        "open the ports between the hosts for one another"
    )


@pytest.mark.parametrize(
    ("ranks", "shown"), [([3], "rank 3"), ([8, 9, 10], "ranks 8-10"), ([0, 2, 3, 7], "ranks 0, 2-3, 7")]
)
def test_ranks_are_told_in_runs(ranks: list[int], shown: str) -> None:
    assert ranks_in_runs(ranks) == shown
