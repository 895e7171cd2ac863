"""Which hosts of a run cannot be reached any more: asked when no rank makes progress, as after a cut network link.

A collective then waits for packets that never come, and no error of TCP's comes for a quarter of an hour. Each host asks
for itself, without a file: what it has of a shared folder may be behind the same link.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

from lumina_ds.engine.rendezvous import Place
from lumina_ds.engine.world import World
from lumina_ds.text import ranks_in_runs

_CONNECT_SECONDS = 5.0
_MAX_AT_ONCE = 64


def lost_hosts(world: World) -> list[str]:
    """`b (10.0.0.2) with ranks 8-15 cannot be reached from a (10.0.0.1): no route to host`, for each of the others."""
    if not world.places:
        return []
    own = world.places[world.rank]
    others = [place for place in dict.fromkeys(world.places) if place != own]
    with ThreadPoolExecutor(_MAX_AT_ONCE) as pool:
        answers = pool.map(_fault, others)
    found = [(place, fault) for place, fault in zip(others, answers, strict=True) if fault]
    return [f"{place} with {_ranks_of(world, place)} cannot be reached from {own}: {fault}" for place, fault in found]


def speaks_for_host(world: World) -> bool:
    """Whether this is the first rank of its host, which tells what they all find."""
    return not world.places or world.places.index(world.places[world.rank]) == world.rank


def _fault(place: Place) -> str | None:
    try:
        socket.create_connection((place.address, place.port), timeout=_CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return None  # its rank has ended, but the host answers
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def _ranks_of(world: World, place: Place) -> str:
    return ranks_in_runs([rank for rank, there in enumerate(world.places) if there == place])
