"""Two hosts on one machine: network namespaces joined by a pair of virtual Ethernet devices (Linux, root, iproute2)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """`enter` are the words that run a command there; `name` is of its namespace and of its device."""

    address: str
    enter: tuple[str, ...] = ()
    name: str = ""


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@contextmanager
def two_namespaces() -> Iterator[list[Host] | None]:
    """None without the right, or the program, to make them."""
    tag = f"lum{os.getpid()}"
    names = [f"{tag}a", f"{tag}b"]
    if shutil.which("ip") is None or not ip("netns", "add", names[0]):
        yield None
        return
    try:
        assert ip("netns", "add", names[1])
        assert ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1],
                  "netns", names[1])  # fmt: skip
        made = [Host(f"10.77.0.{number}", ("ip", "netns", "exec", name), name) for number, name in enumerate(names, 1)]
        for host in made:
            assert ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.name)
            assert set_link(host, "up") and ip("-n", host.name, "link", "set", "lo", "up")
        yield made
    finally:
        for name in names:
            ip("netns", "del", name)


def set_link(host: Host, state: str) -> bool:
    """`up` or `down`: its cable, as both ends see it."""
    return ip("-n", host.name, "link", "set", host.name, state)
