"""A host that cannot be reached any more is named by each of the others, with its ranks; in two network namespaces."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from namespaces import set_link, two_namespaces

from lumina_ds.engine.rendezvous import Place
from lumina_ds.engine.world import World, free_port
from lumina_ds.train.watch.hosts import lost_hosts, speaks_for_host

CHECKOUT = Path(__file__).parents[2]
ASK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from lumina_ds.engine.rendezvous import Place
from lumina_ds.engine.world import World
from lumina_ds.train.watch import hosts
hosts._CONNECT_SECONDS = 1
rank, places = json.loads(sys.argv[2])
print(json.dumps(hosts.lost_hosts(World(rank, 0, len(places), "cpu", places=tuple(Place(*place) for place in places)))))
"""


def test_a_cut_link_is_seen_from_both_ends_and_a_dead_rank_is_none() -> None:
    with two_namespaces() as hosts:
        if hosts is None:
            pytest.skip("needs the right to make network namespaces, and iproute2")
        ends = [("a", hosts[0].address), ("b", hosts[1].address)]
        # Ranks 0 and 1 on a, 2 to 4 on b. Nobody listens: the hosts answer all the same that no rank is there.
        places = [(*ends[number], 4000 + number) for number in (0, 0, 1, 1, 1)]

        def ask(rank: int) -> list[str]:
            command = [*hosts[rank > 1].enter, sys.executable, "-c", ASK, str(CHECKOUT), json.dumps([rank, places])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found: list[str] = json.loads(done.stdout)
            return found

        assert ask(0) == ask(4) == []
        assert set_link(hosts[1], "down")
        [seen], [seen_there] = ask(1), ask(2)
    assert seen.startswith("b (10.77.0.2) with ranks 2-4 cannot be reached from a (10.77.0.1): ")
    assert seen_there.startswith("a (10.77.0.1) with ranks 0-1 cannot be reached from b (10.77.0.2): ")
    assert all(line.rpartition(": ")[2] in ("no route to host", "network is unreachable", "no answer") for line in (seen, seen_there))  # fmt: skip


def test_one_host_and_hosts_that_answer_are_not_lost() -> None:
    with socket.create_server(("127.0.0.2", 0)) as there:
        other = Place("b", "127.0.0.2", there.getsockname()[1])
        places = (Place("a", "127.0.0.1", free_port()), other, Place("c", "127.0.0.3", free_port()), other)
        worlds = [World(rank, 0, 4, "cpu", places=places) for rank in range(4)]
        assert [lost_hosts(world) for world in worlds] == [[]] * 4
    assert [speaks_for_host(world) for world in worlds] == [True, True, True, False]
    assert lost_hosts(World(1, 1, 2, "cpu")) == [] and speaks_for_host(World(1, 1, 2, "cpu"))
    assert lost_hosts(World(1, 1, 2, "cpu", places=(places[0],) * 2)) == []
