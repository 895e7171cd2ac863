"""Checks of the machines in a hostfile: each is reached by ssh as the launcher would, and asked for its versions."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lumina_ds import __version__
from lumina_ds.doctor.finding import Finding, Surroundings
from lumina_ds.doctor.software import installed
from lumina_ds.engine.hostfile import ssh_words
from lumina_ds.text import counted

_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 20.0
_MAX_AT_ONCE = 32
# Runs on the other host: versions by metadata, GPUs by nvidia-smi, no library is imported.
_QUESTION = """
import json, platform, subprocess
from importlib.metadata import PackageNotFoundError, version
def of(name):
    try: return version(name)
    except PackageNotFoundError: return None
try: gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10).stdout.count("GPU ")
except Exception: gpus = 0
print(json.dumps({"python": platform.python_version(), "gpus": gpus,
    **{name: of(name) for name in ("torch", "deepspeed", "lumina-ds")}}))
"""


def host_findings(slots: dict[str, int], around: Surroundings) -> Iterator[Finding]:
    """pdsh, then every host with its number of slots; hosts are asked at the same time."""
    yield _pdsh(around, len(slots))
    with ThreadPoolExecutor(_MAX_AT_ONCE) as pool:
        yield from pool.map(lambda item: _host(item[0], item[1], around), slots.items())


def _pdsh(around: Surroundings, num_hosts: int) -> Finding:
    found = around.find("pdsh")
    if found:
        return Finding("pdsh", "ok", found)
    if num_hosts == 1:
        return Finding("pdsh", "ok", "not installed; one host needs none")
    remedy = "apt-get install pdsh, or start every node yourself with --no_ssh --node_rank N"
    return Finding("pdsh", "fault", "not installed, and the deepspeed launcher starts hosts with it", remedy)


def _host(host: str, slots: int, around: Surroundings) -> Finding:
    question = shlex.join([sys.executable, "-c", _QUESTION])
    status, answer, complaint = around.run([*ssh_words(host, _CONNECT_SECONDS), question], _ANSWER_SECONDS)
    name, complaint = f"host {host}", complaint.splitlines()[-1] if complaint else f"status {status}"
    if status in (124, 127, 255):
        if around.find("ssh") is None:
            return Finding(name, "fault", "ssh is not installed", "apt-get install openssh-client")
        # The launcher tests ssh even for a hostfile of one host (deepspeed/launcher/runner.py, main).
        remedy = (
            f"`ssh {host} true` must work without a password (ssh-copy-id {host}), or start each node with --no_ssh"
        )
        return Finding(name, "fault", f"does not answer: {complaint}", remedy)
    try:
        # What a shell prints at its start may come first.
        there = json.loads(answer.splitlines()[-1]) if status == 0 else None
    except (ValueError, IndexError):
        there = None
    if not isinstance(there, dict):
        remedy = f"install Lumina DS there too, at the same path: {sys.executable} is what the launcher calls"
        return Finding(name, "fault", f"cannot run this Python: {complaint}", remedy)
    return _compare(name, there, slots)


def _compare(name: str, there: dict[str, Any], slots: int) -> Finding:
    here = {"torch": installed("torch"), "deepspeed": installed("deepspeed"), "lumina-ds": installed("lumina-ds")}
    shown = ", ".join(f"{key} {there.get(key) or 'missing'}" for key in ("python", *here))
    says = f"{shown}, {counted(there['gpus'], 'GPU')} for {counted(slots, 'slot')}"
    wrong = [key for key, own in here.items() if there.get(key) != own]
    if wrong:
        wanted = ", ".join(f"{key} {here[key]}" for key in wrong)
        return Finding(name, "fault", f"{says}; here it is {wanted}", "install the same versions on every host")
    if 0 < there["gpus"] < slots:
        return Finding(name, "fault", says, f"write slots={there['gpus']} in the hostfile")
    return Finding(name, "ok", says, details=(f"Lumina DS {__version__} here",))
