"""Publish two checkpoints without any engine, and die by SIGKILL at the n-th thing done to the disk in the second."""

import os
import signal
import sys
from pathlib import Path

from manifests import make_manifest

from lumina_ds.checkpoint import publish as publishing
from lumina_ds.checkpoint import tensor_file
from lumina_ds.checkpoint.tensor_file import CheckpointFile

PARTS = {"optimizer-00000.safetensors": b"pieces" * 5000, "random-rank-0.pt": b"random", "tokenizer.model": b"words"}


def publish(checkpoints, step, eval_loss):
    staging = publishing.begin(checkpoints, step)
    files = {name: CheckpointFile(name, content=content).write(staging) for name, content in PARTS.items()}
    entries = {name: entry.model_dump() for name, entry in files.items()}
    publishing.publish(staging, make_manifest(step=step, eval_loss=eval_loss, files=entries), keep=1)


def kill_at(number):
    """Count fsync, rename, replace, write and unlink over the whole process; die instead of the `number`-th."""
    done = [0]

    def counted(original):
        def call(*args, **kwargs):
            done[0] += 1
            if done[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "rmdir", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    tensor_file._PIECE_BYTES = 4096
    tensor_file.hashlib.sha256 = counted(tensor_file.hashlib.sha256)


if __name__ == "__main__":
    checkpoints = Path(sys.argv[1])
    publish(checkpoints, 1, 2.0)
    kill_at(int(sys.argv[2]))
    publish(checkpoints, 2, 1.0)
