"""The meeting of all ranks before the process group: who is missing, who cannot reach whom, whose versions differ.

Without it the first sign of a wrong address, a closed port or a host that never started is a time-out of half an
hour, or a hang inside gloo. Here every rank arrives at rank 0's TCP store, the hosts try one another, and rank 0
tells all of them the verdict, within `seconds`. The process group then uses the same store.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from lumina_ds import __version__
from lumina_ds.errors import MachineError, SharedFault

if TYPE_CHECKING:
    from torch.distributed import Store

RENDEZVOUS_SECONDS = 60.0
# Between two looks at what has not come yet.
_POLL_SECONDS = 0.1
# Of one connection between two hosts; a firewall that drops packets answers nothing at all.
_PEER_SECONDS = 5.0
_LOOPBACK = ("127.", "::1", "localhost")


@dataclass(frozen=True)
class Arrival:
    """What a rank says of itself. `address` is the one by which it reaches rank 0; `port` is open for other hosts; `card`
    is the identity of its GPU, empty on a CPU."""

    rank: int
    host: str
    address: str
    port: int
    versions: dict[str, str]
    card: str = ""

    @property
    def place(self) -> tuple[str, str]:
        """The host: machines may share a name, and network namespaces an address."""
        return self.host, self.address


def meet(rank: int, size: int, seconds: float = RENDEZVOUS_SECONDS, card: str = "") -> Store:
    """Wait at MASTER_ADDR:MASTER_PORT until all `size` ranks are there; the store they met at. A collective.

    On several hosts it also chooses GLOO_SOCKET_IFNAME where the host's own name leads nowhere (Debian's 127.0.1.1).

    Raises:
        MachineError: rank 0 cannot be reached or its port is taken; ranks are missing; versions differ; a host
            cannot open a connection to another one. What concerns all ranks is a SharedFault on all of them.
    """
    deadline = time.monotonic() + seconds
    master, port = os.environ["MASTER_ADDR"], _master_port()
    if rank == 0:
        store = _open_store(rank, size, master, port, seconds)
        address = _address_towards(master, port) or master
    else:
        address = _reach(rank, master, port, deadline, seconds)
        store = _open_store(rank, size, master, port, seconds)
    with _listener() as listener:
        own = Arrival(rank, socket.gethostname(), address, listener.getsockname()[1], _versions(), card)
        store.set(f"arrival/{rank}", json.dumps(asdict(own)))
        try:
            faults, heads = _judge(store, size, deadline, seconds) if rank == 0 else _hear(store, own, seconds)
        except (RuntimeError, OSError) as error:
            raise MachineError(
                f"rank {rank} on {own.host} lost rank 0 at {master}:{port} while the ranks met "
                f"({_first_line(error)}); its own message says why"
            ) from None
    if faults:
        raise SharedFault("; ".join(faults))
    if len(heads) > 1:
        _choose_interface(own.address)
    return store


def _master_port() -> int:
    text = os.environ["MASTER_PORT"]
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise MachineError(f"MASTER_PORT={text} is no port; set it to a free one, 1024 to 65535")
    return int(text)


def _reach(rank: int, master: str, port: int, deadline: float, seconds: float) -> str:
    """Connect to rank 0's store as soon as it listens; the local address of that connection."""
    reason = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((master, port), timeout=_PEER_SECONDS) as connection:
                return str(connection.getsockname()[0])
        except socket.gaierror:
            reason = "the name does not resolve"
        except TimeoutError:
            reason = "no answer, a firewall may drop it"
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
        time.sleep(_POLL_SECONDS)
    raise MachineError(
        f"rank {rank} on {socket.gethostname()} could not reach rank 0 at {master}:{port} for {seconds:.0f} s "
        f"({reason}); check that rank 0's host was started, MASTER_ADDR, MASTER_PORT, and the firewall"
    )


def _open_store(rank: int, size: int, master: str, port: int, seconds: float) -> Store:
    from datetime import timedelta

    from torch.distributed import DistError, PrefixStore, TCPStore

    is_master = rank == 0 and not shares_agent_store()
    # Rank 0 need not go through its own public address to talk to itself.
    host = "127.0.0.1" if is_master else master
    try:
        store = TCPStore(host, port, size, is_master, timeout=timedelta(seconds=seconds), wait_for_workers=False)
    except (DistError, RuntimeError, ValueError) as error:
        raise MachineError(
            f"rank {rank} on {socket.gethostname()} could not open the store at {master}:{port} "
            f"({_first_line(error)}); choose a free --master_port and an address of rank 0's host"
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


def _judge(store: Store, size: int, deadline: float, seconds: float) -> tuple[list[str], list[Arrival]]:
    """Rank 0: wait for the others, have the first rank of each host try the other hosts, and tell all the verdict."""
    missing = _wait_for_arrivals(store, size, deadline)
    arrivals = [_arrival(store, rank) for rank in range(size) if rank not in missing]
    first_of_host: dict[tuple[str, str], Arrival] = {}
    for arrival in arrivals:
        first_of_host.setdefault(arrival.place, arrival)
    heads = list(first_of_host.values())
    if missing:
        hosts = ", ".join(dict.fromkeys(arrival.host for arrival in arrivals))
        faults = [
            f"{_ranks(missing)} of {size} did not come within {seconds:.0f} s (here: {hosts}); check that every host "
            "of the hostfile was started, with the same number of ranks and the same master address"
        ]
    else:
        store.set("heads", json.dumps([asdict(head) for head in heads]))
        faults = [*_differences(arrivals), *_card_faults(arrivals), *_unreached(heads[0], heads)]
        for head in heads[1:]:
            faults += json.loads(store.get(f"reached/{head.rank}"))
    store.set("verdict", json.dumps(faults))
    if faults:
        # The store goes with this rank: let the others read it first.
        _poll(lambda: int(store.add("heard", 0)) >= len(arrivals) - 1, time.monotonic() + _PEER_SECONDS)
    return faults, heads


def _wait_for_arrivals(store: Store, size: int, deadline: float) -> list[int]:
    """Ranks that had not come when the time was up."""
    missing = list(range(size))

    def all_there() -> bool:
        missing[:] = [rank for rank in missing if not store.check([f"arrival/{rank}"])]
        return not missing

    _poll(all_there, deadline)
    return missing


def _hear(store: Store, own: Arrival, seconds: float) -> tuple[list[str], list[Arrival]]:
    """Another rank: try the other hosts when this is the first rank of its own, and hear rank 0's verdict."""
    heads: list[Arrival] = []
    # Rank 0 may have come later, and then it waits longer.
    deadline = time.monotonic() + 2 * seconds
    _poll(lambda: store.check(["heads"]) or store.check(["verdict"]), deadline)
    if store.check(["heads"]):
        heads = [Arrival(**head) for head in json.loads(store.get("heads"))]
        if own in heads:
            store.set(f"reached/{own.rank}", json.dumps(list(_unreached(own, heads))))
    faults = json.loads(store.get("verdict"))
    store.add("heard", 1)
    return faults, heads


def _poll(done: Callable[[], bool], deadline: float) -> None:
    while not done() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _arrival(store: Store, rank: int) -> Arrival:
    return Arrival(**json.loads(store.get(f"arrival/{rank}")))


def _unreached(own: Arrival, heads: Sequence[Arrival]) -> Iterator[str]:
    for other in heads:
        if other.place == own.place:
            continue
        try:
            socket.create_connection((other.address, other.port), timeout=_PEER_SECONDS).close()
        except OSError as error:
            yield (
                f"{own.host} ({own.address}) cannot open a connection to {other.host} at {other.address}:{other.port} "
                f"({(error.strerror or 'no answer').lower()}); open the ports between the hosts for one another"
            )


def _differences(arrivals: Sequence[Arrival]) -> list[str]:
    first, faults = arrivals[0], []
    for there in arrivals:
        wrong = [name for name, value in first.versions.items() if there.versions[name] != value]
        if wrong:
            found = ", ".join(f"{name} {there.versions[name]}" for name in wrong)
            wanted = ", ".join(f"{name} {first.versions[name]}" for name in wrong)
            faults.append(f"{there.host} has {found}, but rank 0's host {first.host} has {wanted}")
    # Once a host, not once a rank.
    return [f"{fault}; install the same versions" for fault in dict.fromkeys(faults)]


def _card_faults(arrivals: Sequence[Arrival]) -> Iterator[str]:
    """NCCL refuses two ranks on one GPU, in words of its own and not on every rank; ranks without one use gloo."""
    without = [there.rank for there in arrivals if not there.card]
    if 0 < len(without) < len(arrivals):
        hosts = ", ".join(dict.fromkeys(there.host for there in arrivals if not there.card))
        yield f"{_ranks(without)} on {hosts} see no GPU, and the others do; check CUDA_VISIBLE_DEVICES and the driver there"
    ranks: dict[tuple[str, str, str], list[int]] = {}
    for there in arrivals:
        if there.card:
            ranks.setdefault((*there.place, there.card), []).append(there.rank)
    for (host, _, card), together in ranks.items():
        if len(together) > 1:
            yield f"{_ranks(together)} on {host} have the same GPU {card}; start one rank per visible GPU"


def _versions() -> dict[str, str]:
    """Those that must be the same everywhere. Python's patch level may differ."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "torch": version("torch"), "deepspeed": version("deepspeed"), "lumina-ds": __version__}


@contextlib.contextmanager
def _listener() -> Iterator[socket.socket]:
    """A port for the other hosts to try; the kernel accepts for it."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both) as listener:
        yield listener


def _address_towards(host: str, port: int) -> str | None:
    """This host's own address on the way to `host`; None when there is no way."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=_PEER_SECONDS) as connection:
        return str(connection.getsockname()[0])
    return None


def _choose_interface(address: str) -> None:
    """Tell gloo the interface of `address` when this host's own name gives it a loopback address or none.

    gloo listens at the address of the host's name; on a loopback address the other hosts wait for it for ever.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    with contextlib.suppress(OSError):
        if not socket.gethostbyname(socket.gethostname()).startswith(_LOOPBACK):
            return
    import psutil

    for interface, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = interface


def _ranks(ranks: Sequence[int]) -> str:
    """[3] is "rank 3", [8, 9, 10] is "ranks 8-10"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _first_line(error: Exception) -> str:
    """torch's own messages end in "message: address already in use", or go on for a page of frames."""
    return str(error).splitlines()[0].rpartition("message: ")[2]
