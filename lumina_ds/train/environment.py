"""environment.json of a run folder: where the latest life of a run trains, and with which versions."""

from __future__ import annotations

import json
import platform
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lumina_ds import __version__
from lumina_ds.engine.world import World
from lumina_ds.files import write_atomically

LIBRARIES = ("torch", "deepspeed", "numpy", "pyarrow", "sentencepiece", "safetensors", "flash-attn")


def write_environment(folder: Path, world: World, num_steps: int) -> None:
    """Write environment.json: versions, hosts with their ranks, devices, the command, and the steps of the whole run.

    A collective: every rank says where it is.
    """
    places: list[Any] = [None] * world.size
    dist.all_gather_object(places, (socket.gethostname(), _device(world)))
    if world.rank != 0:
        return
    hosts = [place[0] for place in places]
    environment = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "num_steps": num_steps,
        "ranks": world.size,
        "hosts": {host: hosts.count(host) for host in dict.fromkeys(hosts)},
        "devices": sorted({place[1] for place in places}),
        "platform": platform.platform(),
        "versions": {"lumina-ds": __version__, "python": platform.python_version(), **_versions()},
    }
    write_atomically(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def _device(world: World) -> str:
    if world.device == "cuda":
        return torch.cuda.get_device_name(world.torch_device)
    return f"CPU, {torch.get_num_threads()} threads a rank"


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
