"""A stop that comes in the middle of a long micro-batch: the state before the step is saved while it goes on.

The training thread is then inside a forward or backward pass, perhaps in a collective, and cannot be called back. It
need not be: parameters and moments stay as they are until the optimizer's update. So another thread of every rank
holds the update back, writes the state of before the step, and ends the process. Nothing of it passes through the
training's groups; ranks agree through the store by which they met, where each says once per round which step it
holds. All hold the same one, or nobody does anything and the stop waits for the next chance.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from lumina_ds.engine.world import World
from lumina_ds.errors import LuminaError
from lumina_ds.train.ending import end_at_once

log = logging.getLogger(__name__)

# Where batches end sooner than that, the ranks stop between them (run.py), and no thread interferes.
PATIENCE_SECONDS = 5.0
_POLL_SECONDS = 0.1
_NOT_HELD = "none"


class UpdateGuard:
    """While the training thread is inside `unchanged`, another one may keep it from leaving, and so from updating."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._state: tuple[int, dict[str, Any]] | None = None
        self._held = False

    @contextlib.contextmanager
    def unchanged(self, step: int, random: dict[str, Any]) -> Iterator[None]:
        """For the training thread: the state is that after `step`, and `random` its random state, until `leave`."""
        with self._condition:
            self._state = (step, random)
        try:
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        """From now on the state may change. Waits, perhaps for ever, while another thread holds it."""
        with self._condition:
            self._condition.wait_for(lambda: not self._held)
            self._state = None

    def hold(self) -> tuple[int, dict[str, Any]] | None:
        """For another thread: keep the state as it is, and say which it is; None when it may be changing."""
        with self._condition:
            self._held = self._state is not None
            return self._state

    def let_go(self) -> None:
        """Let the training thread go on."""
        with self._condition:
            self._held = False
            self._condition.notify_all()


class LongStepStop:
    """Watches for stops that the training thread does not get to. `beat` is called about once a second."""

    def __init__(
        self,
        guard: UpdateGuard,
        world: World,
        life: str,
        waiting_seconds: Callable[[], float],
        save: Callable[[int, dict[str, Any]], LuminaError],
    ) -> None:
        """`waiting_seconds()`: for how long a stop has been asked for. `save(step, random)` saves the state that `guard`
        holds, in another thread, and says what the run ends with. `life` is common to the ranks of this start."""
        import torch.distributed as dist

        self._guard = guard
        self._world = world
        self._waiting_seconds = waiting_seconds
        self._save = save
        self._store = dist.PrefixStore(f"stop-{life}", dist.distributed_c10d._get_default_store())
        self._round = 0
        self._lock = threading.Lock()  # close() meets no thread that is made and not started
        self._closed = False
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Take part in a round that any rank has called for; call for one where a stop has waited long enough.

        In a thread of its own: across a cut link the store answers nothing, and the watchdog must go on.
        """
        with self._lock:
            if self._closed or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(target=self._look, name="stop in a long step", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """The training loop is left: no rank shall wait for this one."""
        with self._lock:
            self._closed = True
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(RuntimeError):
            self._say(_NOT_HELD)

    def _look(self) -> None:
        # Without the first rank there is no store, and no run for long.
        with contextlib.suppress(RuntimeError):
            if self._waiting_seconds() > PATIENCE_SECONDS:
                self._store.set(f"{self._round}-called", "")
            if self._store.check([f"{self._round}-called"]):
                self._take_part()

    def _take_part(self) -> None:
        held = self._guard.hold()
        try:
            self._say(_NOT_HELD if held is None else str(held[0]))
            if held is not None and self._all_hold(held[0]):
                self._save_and_end(*held)
        except Exception:
            log.exception("the stop in a long step failed")
        self._round += 1
        self._guard.let_go()

    def _say(self, word: str) -> None:
        self._store.set(f"{self._round}-{self._world.rank}", word)

    def _all_hold(self, step: int) -> bool:
        """Whether every rank holds the state after `step`. All who hold one get the same answer."""
        waiting = list(range(self._world.size))
        while waiting:
            if not self._store.check([f"{self._round}-{waiting[0]}"]):
                time.sleep(_POLL_SECONDS)
            elif self._store.get(f"{self._round}-{waiting.pop(0)}").decode() != str(step):
                return False
        return True

    def _save_and_end(self, step: int, random: dict[str, Any]) -> None:
        with _beside_the_device(self._world.torch_device):
            error = self._save(step, random)
        end_at_once(self._world.rank, error)


def _beside_the_device(device: Any) -> contextlib.AbstractContextManager[Any]:
    """On a card, a stream of its own: copies do not wait for what the training has queued."""
    import torch

    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()
