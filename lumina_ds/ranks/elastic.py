"""`lumina train --elastic MIN:MAX`: which of the ranks that could run now do, and when others should.

Before each start the hosts are looked at, and as many ranks are taken as share the run's steps equally and have the memory
for their plan. While they train the hosts are looked at every now and then: where other ranks should run, the present
ones are asked to save and end, through a file in the run folder, which reaches them on any host.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lumina_ds.config.elastic import describe_layout
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError, Interrupted, LuminaError, MachineError
from lumina_ds.logs import tell
from lumina_ds.plan.elastic import Choice, largest_choice, memory_fault, possible_choices
from lumina_ds.ranks.hosts import Hosts, arguments_for, check_elastic_runner, present_hosts
from lumina_ds.ranks.runner import Signals, complete_runner_arguments, planned_world_size
from lumina_ds.text import counted
from lumina_ds.train.run_folder import RunFolder

# Between two looks while there are too few ranks to start.
_POLL_SECONDS = 5.0
# ssh itself would wait for hours for a host that is gone.
_SSH_NOTICES = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"


@dataclass(frozen=True)
class Start:
    """`num_ranks` that a start would have, and the configuration that they would train."""

    num_ranks: int
    config: RunConfig


def planned_start(config: RunConfig, runner: Sequence[str], check_memory: bool = True) -> Start:
    """What `lumina train` would start now; of an elastic run without enough hosts, what it waits for: its fewest ranks.

    Raises ConfigError, of an elastic run also where its fewest ranks lack the memory to go on, unless this is no machine
    of the run (`check_memory`).
    """
    if config.run.elastic_range is None:
        return Start(planned_world_size(complete_runner_arguments(list(runner))), config)
    fleet = Fleet(config, runner)
    present, fewest = fleet.present(), config.run.elastic_range[0]
    if check_memory:
        fleet.possible(present)
        choice = fleet.choose(config, present) if present.num_ranks >= fewest else fleet.any_choice(fewest)
    else:
        choice = fleet.any_choice(max(fewest, present.num_ranks))
    return Start(choice.num_ranks, choice.config)


class Fleet:
    """The ranks of an elastic run that `lumina train` starts."""

    def __init__(self, config: RunConfig, runner: Sequence[str]) -> None:
        """`runner`: the user's arguments of the deepspeed runner. ConfigError where nobody could choose hosts for all."""
        from lumina_ds.model.device import device_and_precision

        check_elastic_runner(runner)
        self.device, self.precision, _ = device_and_precision(config.train.precision, config.model)
        self.folder = RunFolder.of(config)
        self.in_use = Hosts({})
        self._settings, self._config = config.run, config
        self._runner = list(runner)
        self._first_host: str | None = None
        self._asked = False

    @classmethod
    def of(cls, config: RunConfig, runner: Sequence[str]) -> Fleet | None:
        """None for a run with one number of ranks. Says which numbers this one may have."""
        if config.run.elastic_range is None:
            return None
        fleet = cls(config, runner)
        possible, lacking = fleet.possible(fleet.present())
        tell(f"elastic {config.run.elastic}: {'; '.join(describe_layout(config, number) for number in possible)}")
        for reason in lacking:
            tell(f"not used: {reason}")
        if not config.run.max_restarts:
            tell("a lost host ends this run, as --max-restarts is 0; with --max-restarts N it goes on with the others")
        return fleet

    @property
    def num_ranks(self) -> int:
        """Of the present start, or the last."""
        return self.in_use.num_ranks

    def runner_arguments(self) -> list[str]:
        """The deepspeed runner's, for the ranks that were settled."""
        assert self._first_host is not None
        file = self.folder.logs / "hostfile"
        try:
            return complete_runner_arguments(arguments_for(self.in_use, self._runner, file, self._first_host))
        except OSError as error:
            raise MachineError(f"{file} cannot be written: {error.strerror}; free some space") from error

    def environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        """For the runner: ssh gives up a host that is gone."""
        name = "PDSH_SSH_ARGS_APPEND"
        return {**environment, name: f"{environment.get(name, '')} {_SSH_NOTICES}".strip()}

    def settle(self, config: RunConfig, signals: Signals) -> bool:
        """Choose the ranks of the next start, and wait for hosts where there are too few. False, which is told, when a
        signal came or the wait was in vain. `config`: what it will train."""
        self._config = config
        deadline, told = time.monotonic() + self._settings.elastic_wait_seconds, False
        while True:
            try:
                present = self.present()
                choice = self.choose(config, present)
            except ConfigError as error:
                reason = str(error)
            else:
                self._take(present, choice)
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                tell(f"{reason}; start the same command again when there are more")
                return False
            if not told:
                tell(f"{reason}; waiting up to {self._settings.elastic_wait_seconds:g} s for more")
            told = True
            if signals.wait(min(left, _POLL_SECONDS)):
                tell("stopped by a signal before the ranks were started; start the same command again to go on")
                return False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around a start of ranks: ask them to end where others should run."""
        self._asked = False
        self.folder.stop_request.unlink(missing_ok=True)
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), name="hosts", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.folder.stop_request.unlink(missing_ok=True)

    def ended_to_change(self, code: int) -> bool:
        """Whether the last start ended because it was asked to: no failure, and to be started with other ranks."""
        return self._asked and code == Interrupted.exit_code

    def may_go_on(self, code: int) -> bool:
        """Whether an end that is final on the same hosts need not be on others: ranks were told to stop where this
        process was not, as on a host that shuts down, or hosts are gone that they would have met."""
        if code == Interrupted.exit_code:
            return True
        with contextlib.suppress(LuminaError):
            return code == MachineError.exit_code and not self.present().hold(self.in_use)
        return False

    def present(self, in_use: Sequence[str] = ()) -> Hosts:
        """The hosts as they are now."""
        return present_hosts(self._runner, in_use)

    def possible(self, present: Hosts) -> tuple[list[int], list[str]]:
        """(numbers of ranks that can train the run, why others lack the memory); ConfigError where the fewest do."""
        return possible_choices(self._config, lambda config, number: self._fault(config, number, present))

    def choose(self, config: RunConfig, present: Hosts) -> Choice:
        """As many of `present` as can train; ConfigError with the reason when too few can."""
        try:
            return largest_choice(
                config, present.num_ranks, lambda layout, number: self._fault(layout, number, present)
            )
        except ConfigError as error:
            raise ConfigError(f"{error}{present.without}") from None

    def any_choice(self, available: int) -> Choice:
        """Of so many ranks, whatever memory they have."""
        return largest_choice(self._config, available, lambda *_: None)

    def _fault(self, layout: RunConfig, number: int, present: Hosts) -> str | None:
        from lumina_ds.engine.resources import memory_of_rank

        limit = memory_of_rank(self.device, present.first(number).most_on_one)
        return memory_fault(layout, number, self.precision, self.device, limit)

    def _take(self, present: Hosts, choice: Choice) -> None:
        self.in_use = present.first(choice.num_ranks)
        if self._first_host is None:
            self._first_host = next(iter(self.in_use.slots))
        idle = present.num_ranks - choice.num_ranks
        spare = f"; {idle} more could run: {choice.why_not_more}" if idle and choice.why_not_more else ""
        tell(f"elastic: {describe_layout(self._config, choice.num_ranks)} on {self.in_use}{spare}{present.without}")

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(self._settings.elastic_check_seconds):
            try:
                # Those that train show it; the others are asked before anything is stopped for them.
                present = self.present(list(self.in_use.slots))
                choice = self.choose(self._config, present)
            except LuminaError:
                # Such as a host file that is being written, or too few hosts: what runs goes on.
                continue
            if not ended.is_set() and (choice.num_ranks != self.num_ranks or not present.hold(self.in_use)):
                self._ask(choice.num_ranks)

    def _ask(self, num_ranks: int) -> None:
        """Rank 0 removes a request that it finds when it starts, so it is made again until the ranks have ended."""
        if not self._asked:
            tell(
                f"elastic: {counted(num_ranks, 'rank')} can run now instead of {self.num_ranks}; these save and end "
                "for it, and the run goes on"
            )
        self._asked = True
        with contextlib.suppress(OSError):
            self.folder.stop_request.touch()
