"""The meeting of all ranks before the process group: who is missing, who cannot reach whom, whose versions differ.

Without it the first sign of a wrong address, a closed port or a host that never started is a time-out of half an
hour, or a hang inside gloo. Here every rank arrives at rank 0's TCP store, the hosts try one another, and rank 0
tells all of them the verdict, within `seconds`. The process group then uses the same store.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

from lumina_ds import __version__
from lumina_ds.engine.meeting_point import (
    PEER_SECONDS,
    POLL_SECONDS,
    Sealed,
    first_line,
    master_address,
    open_store,
    own_address,
    reach,
)
from lumina_ds.errors import MachineError, SharedFault
from lumina_ds.text import ranks_in_runs

if TYPE_CHECKING:
    from torch.distributed import Store

RENDEZVOUS_SECONDS = 60.0
_LOOPBACK = ("127.", "::1", "localhost")
_SAME_TOKEN = "all hosts must share --runs-dir, or have the same LUMINA_RENDEZVOUS_TOKEN"


class Place(NamedTuple):
    """A host: machines may share a name, and network namespaces an address. `port` is open there for the other hosts, as
    long as there are several: whether it answers says whether the host can be reached."""

    host: str
    address: str
    port: int = 0

    def __str__(self) -> str:
        return f"{self.host} ({self.address})"


@dataclass(frozen=True)
class Arrival:
    """What a rank says of itself. `address` is the one by which it reaches rank 0; `port` is open for other hosts; `card`
    is the identity of its GPU, empty on a CPU; `challenge` is what rank 0 must answer it with."""

    rank: int
    host: str
    address: str
    port: int
    versions: dict[str, str]
    card: str = ""
    challenge: str = ""

    @property
    def place(self) -> tuple[str, str]:
        return self.host, self.address


@dataclass(frozen=True)
class Meeting:
    """The store that the ranks met at, and where every rank is."""

    store: Store
    places: tuple[Place, ...]


@dataclass(frozen=True)
class _Verdict:
    faults: list[str]
    places: tuple[Place, ...] = ()


def meet(
    rank: int,
    size: int,
    seconds: float = RENDEZVOUS_SECONDS,
    card: str = "",
    token: str = "",
    all_here: bool = False,
) -> Meeting:
    """Wait at MASTER_ADDR:MASTER_PORT until all `size` ranks are there. A collective.

    Who has another `token` is neither let in nor believed. `all_here`: every rank is on this host. Chooses
    GLOO_SOCKET_IFNAME: the loopback on one host; on several where the host's own name leads nowhere (Debian's 127.0.1.1).

    Raises:
        MachineError: rank 0 cannot be reached or its port is taken; ranks are missing; versions differ; a host
            cannot open a connection to another one. What concerns all ranks is a SharedFault on all of them.
    """
    deadline = time.monotonic() + seconds
    master, port = master_address()
    if rank == 0:
        store = open_store(rank, size, master, port, seconds, all_here)
        address = own_address(master, port) or master
    else:
        address = reach(rank, master, port, deadline, seconds)
        store = open_store(rank, size, master, port, seconds)
    listener = _listen_for_hosts(address)
    own = Arrival(
        *(rank, socket.gethostname(), address, listener.getsockname()[1], _versions(), card),
        challenge=secrets.token_hex(16),
    )
    try:
        verdict = _judge(store, own, token, size, deadline, seconds) if rank == 0 else _hear(store, own, token, seconds)
    except (RuntimeError, OSError) as error:
        raise MachineError(
            f"rank {rank} on {own.host} lost rank 0 at {master}:{port} while the ranks met "
            f"({first_line(error)}); its own message says why"
        ) from None
    if verdict.faults:
        raise SharedFault("; ".join(verdict.faults))
    several = len(set(verdict.places)) > 1
    if several and verdict.places[rank].port == own.port:
        _kept_open.append(listener)
    else:
        listener.close()
    _choose_interface(own.address, several)
    return Meeting(store, verdict.places)


def stay_alone() -> Meeting:
    """The meeting of a single rank: nobody else is to come, so nothing listens for anybody."""
    from torch.distributed import HashStore

    _choose_interface("", several=False)
    return Meeting(HashStore(), ())


# Of the first rank of each of several hosts, for its whole life.
_kept_open: list[socket.socket] = []


def _judge(store: Store, own: Arrival, token: str, size: int, deadline: float, seconds: float) -> _Verdict:
    """Rank 0: wait for the others, have the first rank of each host try the other hosts, and tell all the verdict."""
    sealed, nonce = Sealed(store, token), secrets.token_hex(16)
    sealed.put("arrival/0", json.dumps(asdict(own)), nonce)
    store.set("nonce", nonce)
    found, strangers = _wait_for_arrivals(sealed, nonce, size, deadline)
    arrivals = list(found.values())
    for there in arrivals:
        sealed.put(f"welcome/{there.rank}", "", nonce + there.challenge)
    first_of_host: dict[tuple[str, str], Arrival] = {}
    for arrival in arrivals:
        first_of_host.setdefault(arrival.place, arrival)
    heads = list(first_of_host.values())
    if len(arrivals) < size:
        hosts = ", ".join(dict.fromkeys(arrival.host for arrival in arrivals))
        faults = (
            [f"{ranks_in_runs(strangers)} of {size} came with another rendezvous token; {_SAME_TOKEN}"]
            if strangers
            else []
        )
        if missing := [rank for rank in range(size) if rank not in found and rank not in strangers]:
            faults.append(
                f"{ranks_in_runs(missing)} of {size} did not come within {seconds:.0f} s (here: {hosts}); check that every host "
                "of the hostfile was started, with the same number of ranks and the same master address"
            )
    else:
        sealed.put("heads", json.dumps([asdict(head) for head in heads]), nonce)
        faults = [*_differences(arrivals), *_card_faults(arrivals), *_unreached(heads[0], heads)]
        for head in heads[1:]:
            faults += json.loads(sealed.take(f"reached/{head.rank}", nonce) or "[]")
    places = tuple(Place(*arrival.place, first_of_host[arrival.place].port) for arrival in arrivals)
    verdict = _Verdict(faults, places)
    sealed.put("verdict", json.dumps(asdict(verdict)), nonce)
    if faults:
        # The store goes with this rank: let the others read it first.
        others = len(arrivals) + len(strangers) - 1
        _poll(lambda: int(store.add("heard", 0)) >= others, time.monotonic() + PEER_SECONDS)
    return verdict


def _wait_for_arrivals(sealed: Sealed, nonce: str, size: int, deadline: float) -> tuple[dict[int, Arrival], list[int]]:
    """(those that have come by the deadline, by their ranks, the ranks whose place somebody without the token holds)."""
    found: dict[int, Arrival] = {}
    strangers: list[int] = []

    def all_there() -> bool:
        strangers.clear()
        for rank in range(size):
            if rank in found or not sealed.store.check([f"arrival/{rank}"]):
                continue
            if (text := sealed.take(f"arrival/{rank}", nonce)) is None:
                strangers.append(rank)
            else:
                found[rank] = Arrival(**json.loads(text))
        return len(found) == size

    _poll(all_there, deadline)
    return dict(sorted(found.items())), strangers


def _hear(store: Store, own: Arrival, token: str, seconds: float) -> _Verdict:
    """Another rank: try the other hosts when this is the first rank of its own, and hear rank 0's verdict."""
    sealed = Sealed(store, token)
    # Rank 0 may have come later, and then it waits longer.
    deadline = time.monotonic() + 2 * seconds
    _poll(lambda: store.check(["nonce"]), deadline)
    nonce = store.get("nonce").decode(errors="replace")
    _arrive(sealed, own, nonce, deadline)
    welcome = f"welcome/{own.rank}"
    if not store.check([welcome]) or sealed.take(welcome, nonce + own.challenge) is None:
        store.add("heard", 1)
        raise MachineError(
            f"rank {own.rank} on {own.host} was not let in at {':'.join(map(str, master_address()))}: its rendezvous token "
            f"is another one, as that of another run is; {_SAME_TOKEN}, and no two runs a port"
        )
    if store.check(["heads"]):
        heads = [Arrival(**head) for head in json.loads(sealed.take("heads", nonce) or "[]")]
        if own in heads:
            sealed.put(f"reached/{own.rank}", json.dumps(list(_unreached(own, heads))), nonce)
    text = sealed.take("verdict", nonce)
    store.add("heard", 1)
    told = json.loads(text) if text is not None else {"faults": ["the verdict of rank 0 was changed on its way"]}
    return _Verdict(told["faults"], tuple(Place(*place) for place in told.get("places", ())))


def _arrive(sealed: Sealed, own: Arrival, nonce: str, deadline: float) -> None:
    """Say that this rank is there, again every few seconds in case that somebody else took its place, until heard."""
    store, polls = sealed.store, itertools.count()

    def heard() -> bool:
        if next(polls) % 20 == 0:
            sealed.put(f"arrival/{own.rank}", json.dumps(asdict(own)), nonce)
        return store.check(["heads"]) or store.check(["verdict"])

    _poll(heard, deadline)


def _poll(done: Callable[[], bool], deadline: float) -> None:
    while not done() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _unreached(own: Arrival, heads: Sequence[Arrival]) -> Iterator[str]:
    for other in heads:
        if other.place == own.place:
            continue
        try:
            socket.create_connection((other.address, other.port), timeout=PEER_SECONDS).close()
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
        yield f"{ranks_in_runs(without)} on {hosts} see no GPU, and the others do; check CUDA_VISIBLE_DEVICES and the driver there"
    ranks: dict[tuple[str, str, str], list[int]] = {}
    for there in arrivals:
        if there.card:
            ranks.setdefault((*there.place, there.card), []).append(there.rank)
    for (host, _, card), together in ranks.items():
        if len(together) > 1:
            yield f"{ranks_in_runs(together)} on {host} have the same GPU {card}; start one rank per visible GPU"


def _versions() -> dict[str, str]:
    """Those that must be the same everywhere. Python's patch level may differ."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "torch": version("torch"), "deepspeed": version("deepspeed"), "lumina-ds": __version__}


def _listen_for_hosts(address: str) -> socket.socket:
    """A port for the other hosts to try, at the address that they will be told; the kernel accepts for it."""
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, 0), family=family, backlog=1024)
    except OSError:  # MASTER_ADDR as rank 0 has it may lead here without being here
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)


def _choose_interface(address: str, several: bool) -> None:
    """Tell gloo the interface of `address` when this host's own name gives it a loopback address or none, and the
    loopback's when all ranks are on this host: nobody else has business there.

    gloo listens at the address of the host's name; on a loopback address the other hosts wait for it for ever.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    if several:
        with contextlib.suppress(OSError):
            if not socket.gethostbyname(socket.gethostname()).startswith(_LOOPBACK):
                return
    import psutil

    wanted, up = (address if several else "127.0.0.1"), psutil.net_if_stats()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(known.address == wanted for known in addresses) and interface in up and up[interface].isup:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
