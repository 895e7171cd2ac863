"""Real faults at a chosen place of a real rank, for tests: a kill, a hang, a NaN, a spike, a failed allocation.

install() reads $LUMINA_TEST_FAULTS, a JSON list of {"kind", "rank", "step"} with steps counted from 1, and hooks
into the rank's own training. A test's sitecustomize.py calls it, so that the ranks are those which the deepspeed
runner starts; a worker of run_ranks calls it itself. "marker" names a file that lets a fault happen once only,
also in a run that is started again.
"""

import json
import os
import signal
import time
from pathlib import Path

_taken = []


def install():
    faults = json.loads(os.environ.get("LUMINA_TEST_FAULTS", "[]"))
    mine = [fault for fault in faults if fault["rank"] in (int(os.environ["RANK"]), "all")]
    if mine:
        Injection(mine)


class Injection:
    def __init__(self, faults):
        from lumina_ds.data.loader import PackedRows
        from lumina_ds.model.transformer import CausalLM
        from lumina_ds.train import guarded_step, loop, run, saves

        self.faults = faults
        self.run = None
        self._wrap(run.TrainingRun, "__init__", self._remember)
        self._wrap(loop.TrainingLoop, "micro_batches", self._in_loader)
        self._wrap(CausalLM, "forward", self._in_forward)
        self._wrap(guarded_step, "run_step", self._around_step)
        self._wrap(saves.CheckpointSaver, "save", self._in_save)
        self._wrap(loop.TrainingLoop, "_record", self._in_record)
        for fault in mine_of_kind(faults, "long steps"):
            loop.SLOW_STEP_SECONDS = fault["seconds"]
        self.collate = PackedRows.collate

    def _wrap(self, owner, name, wrapper):
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))

    def _due(self, step, *kinds):
        for fault in self.faults:
            until = fault.get("until", fault["step"])
            if fault["kind"] in kinds and fault["step"] <= step <= until:
                marker = Path(fault["marker"]) if "marker" in fault else None
                if marker is None or not marker.exists():
                    if marker is not None:
                        marker.touch()
                    yield fault

    def _remember(self, original, run, *args, **kwargs):
        self.run = run
        original(run, *args, **kwargs)

    def _in_loader(self, original, loop, step):
        for fault in self._due(step + 1, "hang in loader", "slow loader", "raise in loader"):
            if fault["kind"] == "raise in loader":
                raise OSError(5, "Input/output error", "a shard")
            time.sleep(fault.get("seconds", 3600))
        return original(loop, step)

    def _in_forward(self, original, model, *args, **kwargs):
        step = self.run.state.step + 1
        if not model.training:
            return original(model, *args, **kwargs)
        for fault in self._due(step, "kill in forward", "stop", "busy", "no memory", "raise in forward"):
            if fault["kind"] == "kill in forward":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault["kind"] == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(0.5)  # another thread may take the signal first, and this one would run on a little
            elif fault["kind"] == "no memory":
                _take_away_memory()
            elif fault["kind"] == "raise in forward":
                raise RuntimeError("a bug in the model")
            else:
                _compute_for(fault["seconds"])
        loss, *others = original(model, *args, **kwargs)
        for fault in self._due(step, "nan", "spike", "kill in backward", "gradient spike"):
            if fault["kind"] == "kill in backward":
                loss.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))
            elif fault["kind"] == "gradient spike":
                loss.register_hook(lambda gradient, fault=fault: gradient * fault["times"])
            else:
                loss = loss * (float("nan") if fault["kind"] == "nan" else fault["times"])
        return (loss, *others)

    def _around_step(self, original, engine, *args, **kwargs):
        for _ in self._due(self.run.state.step + 1, "kill in step"):
            engine.optimizer.step = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        return original(engine, *args, **kwargs)

    def _in_record(self, original, loop, *args, **kwargs):
        for _ in self._due(loop.state.step, "raise between steps"):
            raise RuntimeError("a bug between two steps")
        return original(loop, *args, **kwargs)

    def _in_save(self, original, *args, **kwargs):
        for _ in self._due(self.run.state.step, "SIGTERM in save"):
            os.kill(os.getpid(), signal.SIGTERM)
        for _ in self._due(self.run.state.step, "nan in weights"):
            _damage_a_weight(self.run.engine)
        return original(*args, **kwargs)


def mine_of_kind(faults, kind):
    return [fault for fault in faults if fault["kind"] == kind]


def _compute_for(seconds):
    """A slow rank: it works, by its own clock, for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def _damage_a_weight(engine):
    """One element of this rank's optimizer state, as a faulty memory or kernel leaves it."""
    from lumina_ds.checkpoint.pieces import pieces_of_rank

    next(pieces_of_rank(engine, divided=True)).tensors()["weight"][0] = float("nan")


def _take_away_memory():
    """No new memory from the kernel from now on, as when a machine is full; what the process has it keeps.

    A save under way ends first, since what it frees would be room, and what the allocator holds free is taken too.
    """
    import resource
    import threading

    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
    size = 1 << 24
    while size >= 1 << 14:
        try:
            _taken.append(bytearray(size))
        except MemoryError:
            size //= 2
