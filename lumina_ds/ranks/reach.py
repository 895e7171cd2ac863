"""Whether ssh reaches every host of a run, before anything is prepared: else the runner ends with a traceback, or the ranks
that did start wait for those that did not."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from lumina_ds.engine.hostfile import ssh_words
from lumina_ds.engine.resources import LAUNCHERS, hosts_over_ssh
from lumina_ds.errors import MachineError

_CONNECT_SECONDS = 10
_MAX_AT_ONCE = 32
_ALONE = "or start this on every host yourself, with --no_ssh --node_rank N"


def check_hosts(runner: Sequence[str], seconds: float) -> None:
    """Raise MachineError, a line that names every host that ssh does not reach with these arguments of the runner, and why.

    `seconds` limit the wait for each of them.
    """
    remote = hosts_over_ssh(list(runner))
    if remote is None:
        return
    check_launcher(remote.launcher)
    asked = [] if remote.asked is None or remote.asked in remote.hosts else [remote.asked]
    reasons: dict[str, list[str]] = {}
    for host, (addresses, reason) in ask_hosts([*remote.hosts, *asked], remote.port, seconds).items():
        if reason:
            reasons.setdefault(reason, []).append(host)
        elif host == remote.asked and not addresses:
            raise MachineError(
                f"host {host} does not tell its address (`hostname -I` there); give --master_addr, by which the others reach it"
            )
    if reasons:
        told = "; ".join(f"{', '.join(hosts)}: {reason}" for reason, hosts in reasons.items())
        first = next(iter(reasons.values()))[0]
        raise MachineError(f"ssh does not reach {told}; `ssh {first} true` must work without a password, {_ALONE}")


def check_launcher(launcher: str | None) -> None:
    """Raise MachineError where this launcher of the deepspeed runner is not installed; None starts nothing elsewhere."""
    if (program := LAUNCHERS.get(launcher or "")) and shutil.which(program) is None:
        raise MachineError(f"{program} is not installed, which starts ranks on other hosts; install it, {_ALONE}")


def ask_hosts(hosts: Sequence[str], port: int | None, seconds: float) -> dict[str, tuple[str, str]]:
    """By host, asked at the same time: (what it calls its addresses, why ssh does not reach it; empty where it does)."""
    if hosts and shutil.which("ssh") is None:
        raise MachineError(f"ssh is not installed; apt-get install openssh-client, {_ALONE}")
    with ThreadPoolExecutor(_MAX_AT_ONCE) as pool:
        return dict(zip(hosts, pool.map(lambda host: _ask(host, port, seconds), hosts), strict=True))


def _ask(host: str, port: int | None, seconds: float) -> tuple[str, str]:
    limit = max(1, min(_CONNECT_SECONDS, int(seconds)))
    command = [*ssh_words(host, limit, port), "hostname -I"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=max(seconds, limit + 1), check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer within {seconds:.0f} s"
    complaint = done.stderr.decode(errors="replace").strip().splitlines() or [f"ssh ended with {done.returncode}"]
    # Any other code is that of the command, which ran there.
    return done.stdout.decode(errors="replace").strip(), complaint[-1].strip() if done.returncode == 255 else ""
