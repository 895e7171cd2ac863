"""Where ranks meet: rank 0's TCP store, on no other address than the one that is needed, and values that prove a token.

torch's store knows no authentication: whoever reaches its port may read and write all of it. So it listens where
MASTER_ADDR says and nowhere else, and what ranks tell one another there before they form a group is sealed with a
token that all ranks of a run have and others do not: who has none is not let in, and is not believed.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import ipaddress
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_ds.errors import MachineError
from lumina_ds.files import write_atomically

if TYPE_CHECKING:
    from torch.distributed import Store

# The token, for ranks that no `lumina train` starts; it goes before the run folder's.
TOKEN = "LUMINA_RENDEZVOUS_TOKEN"
TOKEN_FILE = "rendezvous-token"
# Between two looks at what has not come yet.
POLL_SECONDS = 0.1
# Of one connection between two hosts; a firewall that drops packets answers nothing at all.
PEER_SECONDS = 5.0
_PATIENCE_SECONDS = 10.0


def common_token(folder: Path) -> str:
    """The token in `folder`, which all ranks of a run see: of whoever made it first, readable by this user alone.

    Empty where no file can be written; the run is then refused for that.
    """
    path = folder / TOKEN_FILE
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            own = folder / f".{TOKEN_FILE}.{socket.gethostname()}.{os.getpid()}"
            write_atomically(own, secrets.token_hex(16), mode=0o600)
            with contextlib.suppress(FileExistsError):
                os.link(own, path)
            own.unlink()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        # A network file system may show another host's new file late.
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return path.read_text(encoding="ascii").strip()
    return ""


class Sealed:
    """Texts in a store that prove who has `token`. `context` ties one to this meeting, so that an older one is no use."""

    def __init__(self, store: Store, token: str) -> None:
        self.store = store
        self._key = token.encode() or b"none"

    def put(self, name: str, text: str, context: str = "") -> None:
        self.store.set(name, self._seal(name, text, context) + text)

    def take(self, name: str, context: str = "") -> str | None:
        """None when whoever wrote it has another token or context. Waits for it as long as the store does."""
        value = self.store.get(name).decode(errors="replace")
        text = value[64:]
        return text if hmac.compare_digest(value[:64].encode(), self._seal(name, text, context).encode()) else None

    def _seal(self, name: str, text: str, context: str) -> str:
        parts = (part.encode() for part in (name, context, text))
        return hmac.new(
            self._key, b"".join(len(part).to_bytes(8, "big") + part for part in parts), "sha256"
        ).hexdigest()


def master_address() -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT."""
    text = os.environ["MASTER_PORT"]
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise MachineError(f"MASTER_PORT={text} is no port; set it to a free one, 1024 to 65535")
    return os.environ["MASTER_ADDR"], int(text)


def reach(rank: int, master: str, port: int, deadline: float, seconds: float) -> str:
    """Connect to rank 0's store as soon as it listens; the local address of that connection."""
    reason = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((master, port), timeout=PEER_SECONDS) as connection:
                return str(connection.getsockname()[0])
        except socket.gaierror:
            reason = "the name does not resolve"
        except TimeoutError:
            reason = "no answer, a firewall may drop it"
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
        time.sleep(POLL_SECONDS)
    raise MachineError(
        f"rank {rank} on {socket.gethostname()} could not reach rank 0 at {master}:{port} for {seconds:.0f} s "
        f"({reason}); check that rank 0's host was started, MASTER_ADDR, MASTER_PORT, and the firewall"
    )


def own_address(host: str, port: int) -> str | None:
    """This host's own address on the way to `host`; None when there is no way."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=PEER_SECONDS) as connection:
        return str(connection.getsockname()[0])
    return None


def open_store(rank: int, size: int, master: str, port: int, seconds: float, all_here: bool = False) -> Store:
    """Rank 0's store, opened by rank 0 or reached by another one. `all_here`: every rank is on this host."""
    from datetime import timedelta

    from torch.distributed import DistError, PrefixStore, TCPStore

    is_master = rank == 0 and not shares_agent_store()
    host, listener = master, None
    try:
        if is_master:
            host, listener = _listen(master, port, all_here)
        store = TCPStore(
            *(host, port, size, is_master, timedelta(seconds=seconds)),
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except (DistError, RuntimeError, ValueError, OSError) as error:
        raise MachineError(
            f"rank {rank} on {socket.gethostname()} could not open the store at {master}:{port} "
            f"({first_line(error)}); choose a free --master_port and an address of rank 0's host"
        ) from None
    # A restart under torchrun meets at the agent's store again. Agents that came at different times count differently, so
    # it is no name for ranks that meet at a store of their own.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if shares_agent_store() else 0
    return PrefixStore(f"lumina-{attempt}", store)


def shares_agent_store() -> bool:
    """Whether torchrun's agent listens at MASTER_PORT already, and says so."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def refuse_agent_store() -> None:
    """Raise MachineError where torchrun's agents would leave newcomers of an elastic run waiting: in torch 2.13 rank 0's
    agent says where its store is in its first round only (torch/distributed/elastic/rendezvous/dynamic_rendezvous.py).
    """
    if shares_agent_store():
        raise MachineError(
            "--elastic under torchrun: its agents would not find one another again after a change; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every host"
        )


def _listen(master: str, port: int, all_here: bool) -> tuple[str, socket.socket]:
    """(the address by which rank 0 itself gets there, a socket bound to MASTER_ADDR alone, or to all where it must)."""
    for family, place in _needed_addresses(master, port, all_here):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            return str(place[0]), listener
        except OSError as error:
            listener.close()
            # An address that leads here without being here, as a published port of a container's.
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    # Rank 0 need not go through its own public address to talk to itself.
    return "127.0.0.1", socket.create_server(("", port), family=family, dualstack_ipv6=both)


def _needed_addresses(master: str, port: int, all_here: bool) -> Iterator[tuple[Any, Any]]:
    """What MASTER_ADDR means on this host; not a loopback address of a name that leads other hosts elsewhere, such as
    Debian's own 127.0.1.1 for a host's name."""
    with contextlib.suppress(socket.gaierror):
        for family, _, _, _, place in socket.getaddrinfo(master, port, type=socket.SOCK_STREAM):
            is_name = str(place[0]) != master and master != "localhost"
            loopback = ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback
            if all_here or not (is_name and loopback):
                yield family, place


def first_line(error: Exception) -> str:
    """torch's own messages end in "message: address already in use", or go on for a page of frames."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return (str(error).splitlines() or [type(error).__name__])[0].rpartition("message: ")[2]
