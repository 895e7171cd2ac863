"""The pool of processes: what calls return and raise, in which order, and whom it outlives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.errors import MachineError
from preprocess.processes import ProcessPool


def slow_square(number: int) -> tuple[int, int]:
    time.sleep(0.02 * (number % 3))
    return number * number, os.getpid()


def fail(number: int) -> bytes:
    if number == 1:
        raise ValueError("one")
    return bytes(number)


def test_calls_return_what_the_function_returns_or_raises() -> None:
    large = 8 << 20  # more than a pipe holds, both ways at once
    with ProcessPool(2) as pool:
        squares: list[Future[Any]] = [pool.submit(slow_square, number) for number in range(20)]
        results = [pool.submit(fail, number) for number in (large, 1, large)]
        found = [square.result(60) for square in squares]
        assert [square for square, _ in found] == [number * number for number in range(20)]
        assert len({process for _, process in found}) == 2 and os.getpid() not in {process for _, process in found}
        with pytest.raises(ValueError, match="one"):
            results[1].result(60)
        assert results[0].result(60) == results[2].result(60) == bytes(large)


class TwoParts(Exception):
    """Can be pickled, but not made again: its arguments are not those of __init__."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def misbehave(how: str) -> Any:
    if how == "exit":
        raise SystemExit(3)
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "error":
        raise TwoParts("left", "right")
    if how == "local error":

        class Local(Exception):
            pass

        raise Local("here")
    return lambda: how


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("exit", r"SystemExit\(3\)"),
        ("interrupt", "KeyboardInterrupt"),
        ("error", "TwoParts: left and right"),
        ("local error", "Local: here"),
        ("answer", "[Pp]ickle"),
    ],
)
def test_what_no_worker_can_send_is_not_called_a_kill(how: str, says: str) -> None:
    with ProcessPool(1) as pool:
        with pytest.raises(Exception, match=says) as raised:
            pool.submit(misbehave, how).result(60)
        assert not isinstance(raised.value, MachineError)
        assert pool.submit(fail, 5).result(60) == bytes(5), "the process goes on"


def test_leaving_does_not_wait_for_a_call() -> None:
    with ProcessPool(1) as pool:
        calls = [pool.submit(time.sleep, 600) for _ in range(3)]
        while not calls[0].running():
            time.sleep(0.01)
    with pytest.raises(MachineError, match="worker was killed"):
        calls[0].result(60)
    assert calls[2].cancelled()


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os\nfrom preprocess.processes import ProcessPool\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPool(1) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        input()\n"
    )
    checkout = Path(__file__).parent.parent.parent
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(checkout)},
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while _is_alive(worker):
        assert time.monotonic() < deadline, "the worker goes on without its parent"
        time.sleep(0.05)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
