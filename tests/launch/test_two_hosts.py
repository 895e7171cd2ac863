"""Training on two hosts under a hostfile, killed and resumed: two network namespaces with one rank each, joined by a
pair of virtual Ethernet devices. Each reaches the other by its address alone; their common host name leads to neither.

Without the right to make namespaces, both ranks start on the loopback device.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lumina_ds.engine.world import free_port
from lumina_ds.monitor.writers import read_records

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
STEPS = 24


@dataclass(frozen=True)
class Host:
    address: str
    enter: tuple[str, ...] = ()


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    tag = f"lum{os.getpid()}"
    names = [f"{tag}a", f"{tag}b"]
    if shutil.which("ip") is None or not ip("netns", "add", names[0]):
        yield [Host("127.0.0.1"), Host("127.0.0.2")]
        return
    try:
        assert ip("netns", "add", names[1])
        assert ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1],
                  "netns", names[1])  # fmt: skip
        made = [Host(f"10.77.0.{number}", ("ip", "netns", "exec", name)) for number, name in enumerate(names, 1)]
        for name, host in zip(names, made, strict=True):
            assert ip("-n", name, "addr", "add", f"{host.address}/24", "dev", name)
            assert ip("-n", name, "link", "set", name, "up") and ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        for name in names:
            ip("netns", "del", name)


def test_a_run_across_hosts_is_killed_on_one_of_them_and_goes_on(
    hosts: list[Host], write_config: Callable[..., Path], tmp_path: Path, environment: dict[str, str]
) -> None:
    hostfile, metrics = tmp_path / "hosts", tmp_path / "runs/two/metrics.jsonl"
    hostfile.write_text("# two hosts\n" + "".join(f"{host.address} slots=1\n" for host in hosts))
    config = write_config(max_steps=STEPS, save_every_n_batches=4, gradient_accumulation_steps=4)
    options = ["--config", config, "--zero", "2", "--expert-parallel", "2", "--experiment-name", "two"]

    first = start(hosts, hostfile, options, environment, tmp_path)
    wait_for(lambda: len(steps(metrics)) >= 6, first, "six steps")
    kill(first[1])
    # The other host's rank loses its peer, and must not hang.
    assert first[0].wait(timeout=120) not in (0, 75)

    again = start(hosts, hostfile, options, environment, tmp_path)
    ends = [process.wait(timeout=240) for process in again]
    log = "".join((tmp_path / f"host-{number}.log").read_text() for number in range(2))
    assert ends == [0, 0], log
    assert "resumed from runs/two/checkpoints/step-" in log and f"ended at step {STEPS} of {STEPS}" in log
    assert steps(metrics) == list(range(1, STEPS + 1))


def start(
    hosts: list[Host], hostfile: Path, options: list[object], environment: dict[str, str], folder: Path
) -> list[subprocess.Popen[bytes]]:
    port, started = str(free_port()), []
    for rank, host in enumerate(hosts):
        variables = {"HOSTFILE": str(hostfile), "NODE_RANK": str(rank), "MASTER_PORT": port}
        command = [*host.enter, "bash", str(CHECKOUT / "launch/multi_node.sh"), *map(str, options)]
        with open(folder / f"host-{rank}.log", "wb") as log:
            started.append(
                subprocess.Popen(
                    command, cwd=folder, env=environment | variables, stdout=log, stderr=log, start_new_session=True
                )
            )
    return started


def kill(launcher: subprocess.Popen[bytes]) -> None:
    """The host loses its power."""
    processes = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    for process in processes:
        process.send_signal(signal.SIGKILL)
    launcher.wait()


def steps(metrics: Path) -> list[int]:
    return [record["step"] for record in read_records(metrics)] if metrics.exists() else []


def wait_for(condition, processes, what) -> None:  # type: ignore[no-untyped-def]
    for _ in range(1800):
        if condition():
            return
        assert all(process.poll() is None for process in processes), f"ended before {what}"
        time.sleep(0.1)
    pytest.fail(f"no {what} in three minutes")
