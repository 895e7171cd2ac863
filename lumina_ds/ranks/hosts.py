"""The hosts of an elastic run as they are now: what the host file says, who answers, and the runner's arguments for some.

A host file is read anew at every look: whoever schedules machines takes lines out and puts them back.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lumina_ds.errors import ConfigError
from lumina_ds.files import write_atomically
from lumina_ds.ranks.reach import ask_hosts, check_launcher
from lumina_ds.ranks.runner import PLACEMENT, with_placement

# Of one question to one host; all are asked at the same time.
_ANSWER_SECONDS = 15


@dataclass(frozen=True)
class Hosts:
    """Slots by host, in the order of the host file. `over_ssh`: the runner reaches them so, this one among them;
    `silent` are listed and not reached, with the reason."""

    slots: dict[str, list[int]]
    over_ssh: bool = False
    silent: dict[str, str] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        return sum(map(len, self.slots.values()))

    @property
    def most_on_one(self) -> int:
        """Ranks of the fullest host."""
        return max(map(len, self.slots.values()), default=0)

    def first(self, num_ranks: int) -> Hosts:
        """The first so many slots; hosts without one are left out."""
        taken: dict[str, list[int]] = {}
        for host, slots in self.slots.items():
            if part := slots[: max(0, num_ranks)]:
                taken[host] = part
            num_ranks -= len(part)
        return Hosts(taken, self.over_ssh, self.silent)

    def hold(self, others: Hosts) -> bool:
        """Whether every slot of `others` is here too."""
        return all(set(slots) <= set(self.slots.get(host, ())) for host, slots in others.slots.items())

    @property
    def without(self) -> str:
        """Whom ssh does not reach, for the end of a message; empty where there is none."""
        return "".join(f"; without {host}: {reason}" for host, reason in self.silent.items())

    def __str__(self) -> str:
        return ", ".join(f"{host} slots={len(slots)}" for host, slots in self.slots.items())


def check_elastic_runner(runner: Sequence[str]) -> None:
    """Raise ConfigError for a way of starting ranks in which nobody could choose the hosts for all."""
    if "--no_ssh" in runner:
        raise ConfigError(
            "--elastic and --no_ssh: every host would choose the others for itself; leave --no_ssh out, or start the "
            "ranks by torchrun --nnodes MIN:MAX"
        )
    launcher = _value(runner, "--launcher")
    if launcher not in (None, "pdsh"):
        raise ConfigError(f"--elastic starts ranks here or by pdsh, not by --launcher {launcher}; leave that out")


def present_hosts(runner: Sequence[str], in_use: Collection[str] = ()) -> Hosts:
    """The slots that the runner's arguments mean now, less hosts that ssh does not reach; those `in_use` are not asked.

    On a machine with GPUs no slot is beyond them. Raises ConfigError where arguments or host file cannot be read.
    """
    from lumina_ds.engine.resources import hosts_over_ssh, num_local_gpus, planned_resources

    arguments = with_placement(list(runner))
    slots, remote = planned_resources(arguments), hosts_over_ssh(arguments)
    if remote is None or (remote.launcher is None and all(map(_is_here, slots))):
        gpus = num_local_gpus()
        found = {host: [slot for slot in own if not gpus or slot < gpus] for host, own in slots.items()}
        return Hosts({host: own for host, own in found.items() if own})
    check_launcher("pdsh")
    asked = [host for host in slots if host not in in_use]
    silent = {host: reason for host, (_, reason) in ask_hosts(asked, remote.port, _ANSWER_SECONDS).items() if reason}
    return Hosts({host: own for host, own in slots.items() if host not in silent}, True, silent)


def arguments_for(hosts: Hosts, runner: Sequence[str], file: Path, first_host: str) -> list[str]:
    """The runner's arguments with exactly these hosts instead of the user's choice, which goes into `file` where ssh is
    needed. --master_addr is kept as long as it can be that of `first_host`, the first at the start of the run.
    """
    kept = list(_without(runner, PLACEMENT | {"--force_multi"}))
    every = [f"{host}:{','.join(map(str, slots))}" for host, slots in hosts.slots.items()]
    begins = all(slots == list(range(len(slots))) for slots in hosts.slots.values())
    if not hosts.over_ssh:
        [slots] = hosts.slots.values()
        named = ["--include", f"localhost:{','.join(map(str, slots))}"]
        chosen = ["--num_gpus", str(len(slots))] if begins else named
        return [*chosen, *_without(kept, {"--master_addr"})]
    lines = (f"{host} slots={max(slots) + 1}\n" for host, slots in hosts.slots.items())
    write_atomically(file, "".join(lines))
    if next(iter(hosts.slots)) != first_host:
        # The runner then asks the first host for its address.
        kept = list(_without(kept, {"--master_addr"}))
    # Of one host alone, DeepSpeed would start the ranks here, whichever host that is.
    return ["--hostfile", str(file), *([] if begins else ["--include", "@".join(every)]), "--force_multi", *kept]


def _is_here(host: str) -> bool:
    """Whether a name is this machine's: a socket can be bound to its address."""
    with contextlib.suppress(OSError, UnicodeError):
        for family, _, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as own:
                own.bind((address[0], 0))
                return True
    return host == socket.gethostname()


def _value(arguments: Sequence[str], name: str) -> str | None:
    """What an option is given as `NAME VALUE` or `NAME=VALUE`; the last one counts."""
    found = None
    for place, word in enumerate(arguments):
        if word == name and place + 1 < len(arguments):
            found = arguments[place + 1]
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def _without(arguments: Sequence[str], names: Collection[str]) -> Iterator[str]:
    """The arguments less these options and their values; --force_multi has none."""
    words = iter(arguments)
    for word in words:
        if word.split("=")[0] not in names:
            yield word
        elif word != "--force_multi" and "=" not in word:
            next(words, None)
