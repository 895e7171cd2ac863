"""The deepspeed runner: how many ranks its arguments mean, its command, and signals passed to the ranks themselves.

The runner dies of SIGTERM at once and leaves its ranks behind; its launch module ends them one after the
other, 30 s apart. So the runner gets a session of its own, and the ranks get the signal directly: they agree
on it, save, and end. Where every process gets it, as from SLURM, the runner dies, and its ranks are waited for here.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import IO

import psutil

from lumina_ds.errors import Interrupted
from lumina_ds.ranks.killed import MemoryKills
from lumina_ds.train.stop import heeded
from lumina_ds.train.watch.orphans import START_MARK

# What each signal becomes on its way to the ranks: a closed terminal or Ctrl-C ends a run like SIGTERM does.
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}
# What the runner starts as ranks.
TRAINING_MODULE = "lumina_ds.cli.train"
RANK_MODULES = {TRAINING_MODULE, "lumina_ds.ranks.ask"}
PLACEMENT = {
    "--num_gpus",
    "--num_accelerators",
    "--num_nodes",
    "--hostfile",
    "-H",
    "--include",
    "-i",
    "--exclude",
    "-e",
}


def complete_runner_arguments(given: list[str]) -> list[str]:
    """The user's arguments, with what they leave open: all local devices, a free port, no chatter.

    A port is chosen for one machine only; several must agree on theirs, so they keep --master_port or its default.
    Raises MachineError where the ranks of this host could not have the GPUs that they would be started for.
    """
    from lumina_ds.engine.resources import planned_resources
    from lumina_ds.engine.world import free_port

    names = {argument.split("=")[0] for argument in given}
    arguments = with_placement(given)
    cards_here(arguments)
    if (
        "--master_port" not in names
        and len(planned_resources(arguments)) == 1
        and not names & {"--no_ssh", "--force_multi"}
    ):
        arguments = ["--master_port", str(free_port()), *arguments]
    if not names & {"--quiet", "-q", "--log_level"}:
        # As an error it would report that ranks ended with 75, a clean stop; what fails is said by the ranks and by us.
        arguments = ["--log_level", "critical", *arguments]
    return arguments


def with_placement(given: list[str]) -> list[str]:
    """The user's arguments, for all local devices where they name neither hosts nor a number of ranks."""
    from lumina_ds.engine.resources import num_local_devices

    placed = {argument.split("=")[0] for argument in given} & PLACEMENT
    return list(given) if placed else ["--num_gpus", str(num_local_devices()), *given]


def cards_here(arguments: list[str]) -> list[str]:
    """The GPU of each rank of this host by its name in CUDA_VISIBLE_DEVICES; [] on a CPU, or where ssh starts them."""
    from lumina_ds.engine.cards import check_reach, choose_cards
    from lumina_ds.engine.resources import is_amd, local_slots, num_local_gpus

    slots, by_number = local_slots(arguments)
    if slots is None and num_local_gpus():
        check_reach(os.environ, is_amd())
    if not slots:
        return []
    return choose_cards(os.environ, num_local_gpus(), slots, by_number, is_amd())


def say_cards(given: list[str]) -> None:
    """Print which GPUs the ranks of this host will take, before they are there to say it."""
    if cards := cards_here(complete_runner_arguments(given)):
        print(f"the ranks of this host take, in their order, GPU {', '.join(cards)}", file=sys.stderr, flush=True)


def planned_world_size(arguments: list[str]) -> int:
    """Ranks that the runner will start with these arguments, by DeepSpeed's own reading of them."""
    from lumina_ds.engine.resources import planned_resources

    return sum(len(slots) for slots in planned_resources(arguments).values())


def runner_command(runner: list[str], arguments: list[str], module: str = TRAINING_MODULE) -> list[str]:
    """The deepspeed command that trains with these options, or runs another of RANK_MODULES."""
    return [
        *(sys.executable, "-m", "lumina_ds.ranks.deepspeed_runner"),
        *(*runner, "--module", module, *arguments),
    ]


def rank_environment() -> dict[str, str]:
    """Ours, with DeepSpeed's accelerator by name, the choice of GPUs for the ranks, and nothing of another launcher."""
    from lumina_ds.engine.cards import carry_cards
    from lumina_ds.engine.launchers import drop_stale_variables
    from lumina_ds.engine.resources import is_amd, may_have_gpus, name_accelerator

    environment = dict(os.environ)
    name_accelerator(environment)
    drop_stale_variables(environment, None)
    if may_have_gpus():
        carry_cards(environment, is_amd())
    return environment


def shown_command(command: list[str], environment: Mapping[str, str]) -> str:
    """A line of `runner_command` for a shell, with the variable that says which GPUs its slots stand for."""
    from lumina_ds.engine.cards import CARDS

    cards = [f"{CARDS}={shlex.quote(environment[CARDS])}"] if CARDS in environment else []
    return " ".join([*cards, "deepspeed", shlex.join(command[3:])])


def shown_start(runner: list[str], arguments: list[str]) -> str:
    """The line that trains with these options from here."""
    return shown_command(runner_command(runner, arguments), rank_environment())


@dataclass(frozen=True)
class Ended:
    """How one start of the ranks ended. `started` is in seconds since the epoch; `signalled`: we were told to stop;
    `without_ranks`: the runner died of that signal, so that `code` says nothing of its ranks, which may still save.
    `memory`: in words, how many processes the kernel ended meanwhile for want of it, and the limit."""

    code: int
    signalled: bool
    started: float
    without_ranks: bool = False
    memory: tuple[str, ...] = ()


class Signals:
    """Passes what this process is sent on to whichever ranks run, and remembers it. `with Signals() as signals`."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.running: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Signals:
        self._previous = {number: signal.signal(number, self._handle) for number in heeded(FORWARDED)}
        return self

    def __exit__(self, *_: object) -> None:
        if self.received:
            # Another signal, as SLURM sends when a first task has ended, must not change the exit code any more.
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None = None) -> None:
        self.received.append(number)
        self.forward(number)

    def forward(self, number: int) -> None:
        """To the ranks; to the runner before there are any, or when ssh started them, which then tells them."""
        if self.running is None:
            return
        ranks = rank_processes(self.running.pid)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.send_signal(FORWARDED[signal.Signals(number)])
        if not ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.running.pid, signal.SIGTERM)

    def wait(self, seconds: float) -> bool:
        """Sleep; True at once when a signal comes, or came before."""
        end = time.monotonic() + seconds
        while not self.received and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
        return bool(self.received)


def run_until_done(
    command: list[str],
    environment: dict[str, str],
    signals: Signals,
    started: float = 0.0,
    output: IO[str] | None = None,
) -> Ended:
    """Start `command` and wait; the exit status of the ranks as the runner reports it. `output` takes what they
    print, instead of standard output."""
    if signals.received:
        return Ended(Interrupted.exit_code, True, started)
    kills = MemoryKills()
    signals.running = subprocess.Popen(command, env=environment, start_new_session=True, stdout=output)
    try:
        for number in signals.received:  # one that came between the two lines above
            signals.forward(number)
        code = signals.running.wait() % 256
    finally:
        signals.running = None
    signalled = bool(signals.received)
    without_ranks = signalled and code in (-signal.SIGTERM % 256, -signal.SIGUSR1 % 256)
    code = Interrupted.exit_code if without_ranks else code
    return Ended(code, signalled, started, without_ranks, kills.since_then())


def rank_processes(runner_pid: int) -> list[psutil.Process]:
    """Descendants of the runner that train, without its own launch processes in between."""
    try:
        descendants = psutil.Process(runner_pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in descendants if _is_rank(process)]


def marked_processes(mark: str) -> list[psutil.Process]:
    """Whatever has been started with this START_MARK on this host, but this process."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(START_MARK) == mark:
                found.append(process)
    return found


def wait_for_ranks(mark: str) -> bool:
    """Wait until the ranks of a start have ended that their runner left behind; whether there were any.

    They were told to stop, or see that their launcher has gone, and a save may take minutes: no limit but that of
    whoever sent the signal, and of their own watchdogs.
    """
    ranks = [process for process in marked_processes(mark) if _is_rank(process)]
    while any(map(_is_alive, ranks)):
        time.sleep(0.2)
    return bool(ranks)


def _is_alive(process: psutil.Process) -> bool:
    """Not so a zombie, which in many a container nobody collects."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_rank(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return bool(RANK_MODULES & set(words)) and "deepspeed.launcher.launch" not in words
