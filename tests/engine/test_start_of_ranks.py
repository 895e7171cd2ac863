"""Two real ranks of a scheduler that gives RANK, WORLD_SIZE and the address only, in a shell with stale variables; and
one alone. Nobody but this host reaches what they listen at."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lumina_ds.engine.launchers import LOCAL_RANK, LOCAL_WORLD_SIZE
from lumina_ds.engine.world import free_port

RANK = """
import json, os, psutil, torch
from lumina_ds.engine.world import start, stop
world = start(60)
total = torch.ones(1)
torch.distributed.all_reduce(total)
listens = {found.laddr.ip for found in psutil.Process().net_connections("tcp") if found.status == "LISTEN"}
names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CROSS_RANK", "TORCHELASTIC_USE_AGENT_STORE")
print(json.dumps([world.rank, world.local_rank, world.size, total.item(), *map(os.environ.get, names)]))
print(json.dumps(sorted(listens)), flush=True)
stop(0, True)
"""


@pytest.mark.slow
def test_pods_without_a_local_rank_meet_whatever_the_shell_kept() -> None:
    stale = {LOCAL_RANK: "", LOCAL_WORLD_SIZE: "", "CROSS_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], env=os.environ | group | stale | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for number, rank in enumerate(ranks):
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
        found, listens = map(json.loads, out.splitlines()[-2:])
        assert found == [number, 0, 2, 2.0, str(number), "0", "1", None, None]
        assert listens == ["127.0.0.1"]
    alone = {name: value for name, value in os.environ.items() if name not in {*group, "RANK"}}
    done = subprocess.run([sys.executable, "-c", RANK], env=alone | stale, capture_output=True, text=True, timeout=120)
    found, listens = map(json.loads, done.stdout.splitlines()[-2:])
    assert found[:4] == [0, 0, 1, 1.0] and listens == ["127.0.0.1"], done.stderr
