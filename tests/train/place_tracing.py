"""Where a rank is, told to the process that will kill it: a small file per rank that outlives the rank.

install() hooks into the rank's own training; $LUMINA_TEST_PLACES is the folder of the files. The first 64 bytes are what
the training thread does, the next 64 what the save does, if any.
"""

import os
from pathlib import Path

WIDTH = 64


def install():
    Tracing(place_file(os.environ["LUMINA_TEST_PLACES"], int(os.environ["RANK"])))


def place_file(folder, rank):
    return Path(folder) / f"place-{rank}"


def read_place(folder, rank):
    """(what it trains, what it saves), empty where it does nothing yet, as it was when last told."""
    try:
        text = place_file(folder, rank).read_text()
    except OSError:
        return "", ""
    return text[:WIDTH].strip(), text[WIDTH:].strip()


class Tracing:
    def __init__(self, path):
        from lumina_ds.checkpoint import saver
        from lumina_ds.model.transformer import CausalLM
        from lumina_ds.train import guarded_step

        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.step = self.micro_batch = 0
        self._wrap(guarded_step, "run_step", self._around_step)
        self._wrap(CausalLM, "forward", self._around_forward)
        self._wrap(saver._Save, "begin", self._around_begin)
        self._wrap(saver._Save, "write", self._around_write)
        self._wrap(saver, "publish", self._around_publish)

    def _wrap(self, owner, name, wrapper):
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))

    def tell(self, place, slot=0):
        os.pwrite(self.file, place.ljust(WIDTH).encode(), slot * WIDTH)

    def _around_step(self, original, *args, **kwargs):
        self.step, self.micro_batch = self.step + 1, 0
        outcome = original(*args, **kwargs)
        self.tell("between steps")
        return outcome

    def _around_forward(self, original, model, *args, **kwargs):
        self.micro_batch += 1
        self.tell(f"micro-batch {self.micro_batch} forward of this life's step {self.step}")
        found = original(model, *args, **kwargs)
        self.tell(f"micro-batch {self.micro_batch} backward of this life's step {self.step}")
        return found

    def _around_begin(self, original, *args, **kwargs):
        self.tell("save begins", 1)
        return original(*args, **kwargs)

    def _around_write(self, original, *args, **kwargs):
        self.tell("save writes", 1)
        try:
            return original(*args, **kwargs)
        finally:
            self.tell("", 1)

    def _around_publish(self, original, *args, **kwargs):
        self.tell("save publishes", 1)
        return original(*args, **kwargs)
