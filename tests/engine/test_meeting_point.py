"""The store listens where it is needed and nowhere else; what is sealed is believed of those who have the token."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_ds.engine import meeting_point
from lumina_ds.engine.meeting_point import Sealed, common_token
from lumina_ds.engine.world import free_port
from lumina_ds.errors import MachineError

ANY = {"0.0.0.0", "::"}


def listening(port: int) -> set[str]:
    """Local addresses that this machine listens at, with this port."""
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, number = local.partition(":")
            if int(number, 16) == port and state == "0A":
                words = bytes.fromhex(address)
                swapped = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                found.add(socket.inet_ntop(family, swapped))
    return found


def outward() -> str | None:
    """An address of this machine that is no loopback, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def names(monkeypatch: pytest.MonkeyPatch, **known: str) -> None:
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real(known.get(host, host), *rest, **more))


@pytest.mark.parametrize(
    ("master", "all_here", "expected"),
    [
        ("127.0.0.1", False, {"127.0.0.1"}),
        ("127.0.0.2", False, {"127.0.0.2"}),
        ("localhost", False, {"127.0.0.1"}),
        ("::1", False, {"::1"}),
        # A host's name that leads to a loopback address here, and the others elsewhere.
        ("here", False, ANY),
        ("here", True, {"127.0.1.1"}),
        # An address that is not this machine's, and a name that nobody knows here.
        ("192.0.2.7", False, ANY),
        ("no-such-host.invalid", False, ANY),
        ("outward", False, None),
    ],
)
def test_the_store_listens_at_the_address_that_is_needed(
    master: str, all_here: bool, expected: set[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = outward()
    if expected is None:
        if address is None:
            pytest.skip("this machine has no address but the loopback's")
        expected = {address}
    names(monkeypatch, here="127.0.1.1", localhost="127.0.0.1", outward=address or "")
    port = free_port()
    store = meeting_point.open_store(0, 2, master, port, 5, all_here)
    store.set("a", "b")
    assert listening(port) and listening(port) <= expected


def test_a_taken_port_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(MachineError) as error:
        meeting_point.open_store(0, 2, "127.0.0.1", taken.getsockname()[1], 5)
    assert "(address already in use); choose a free --master_port" in str(error.value)


def test_a_text_is_believed_of_who_has_the_token_and_of_this_meeting() -> None:
    from torch.distributed import HashStore

    store = HashStore()
    ours, theirs = Sealed(store, "secret"), Sealed(store, "other")
    ours.put("arrival/1", "text é", "nonce")
    assert ours.take("arrival/1", "nonce") == "text é"
    assert theirs.take("arrival/1", "nonce") is None and Sealed(store, "").take("arrival/1", "nonce") is None
    assert ours.take("arrival/1", "an older nonce") is None
    # Put in another's place, cut, changed, or nothing sealed at all.
    sealed = store.get("arrival/1")
    for name, value in (
        ("arrival/2", sealed), ("arrival/1", sealed[:-1]), ("arrival/1", sealed + b"x"), ("arrival/1", b""),
        ("arrival/1", sealed[:64].upper() + sealed[64:]), ("arrival/1", b"\xff" * 70), ("arrival/1", b"0" * 64),
    ):  # fmt: skip
        store.set(name, value)
        assert ours.take(name, "nonce") is None
    # What stands where may not be moved between name, context and text.
    ours.put("a", "bc", "")
    store.set("ab", store.get("a")[:64] + b"c")
    assert ours.take("ab") is None


def test_all_processes_of_a_folder_have_one_token_that_this_user_alone_can_read(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path\nfrom lumina_ds.engine.meeting_point import common_token\n"
    command = [sys.executable, "-c", program + "print(common_token(Path(sys.argv[1])))", str(tmp_path / "logs")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    tokens = {process.communicate()[0].strip() for process in started}
    assert len(tokens) == 1 and common_token(tmp_path / "logs") in tokens and len(tokens.pop()) == 32
    [file] = (tmp_path / "logs").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert common_token(tmp_path / "other") != common_token(tmp_path / "logs")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert common_token(tmp_path / "closed" / "logs") == ""
