"""A real step of a given size on this machine, before training, in processes of its own.

Every rank starts a child, and the children form a process group. So nothing of a step that did not fit is left in
memory or in DeepSpeed, and a child that the kernel kills, or that waits for one that is gone, takes no rank with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.world import World, free_port, on_rank_0
from lumina_ds.errors import OutOfMemory, SharedFault
from lumina_ds.ranks.ask import MODULE, Question, question_words

# A rank that has lost another one to the lack of memory gets so long to notice by itself.
_GRACE_SECONDS = 10
_POLL_SECONDS = 0.1
_SIGNS_OF_MEMORY = ("bad_alloc", "cannot allocate memory", "out of memory")


def step_fits(config: RunConfig, world: World, precision: str, logs: Path) -> bool:
    """Whether forward, backward and update of `config`'s micro-batch fit in the memory of every rank. A collective.

    Raises SharedFault when a child fails for another reason; its output is LOGS/probe-rank-N.log.
    """
    import torch.distributed as dist

    port = on_rank_0(world, free_port)
    path = logs / f"probe-rank-{world.rank}.log"
    question = Question("lumina_ds.measure.probe.take_trial_steps", {"precision": precision}, config)
    verdicts: list[Any] = [None] * world.size
    dist.all_gather_object(verdicts, _run_child(question, world, port, path))
    if "memory" in verdicts:
        return False
    if "failed" in verdicts:
        failed = verdicts.index("failed")
        raise SharedFault(
            f"the trial step of rank {failed} failed, and not for memory; see {logs}/probe-rank-{failed}.log, "
            "or give --batch-size a number"
        )
    return True


def _run_child(question: Question, world: World, port: int, path: Path) -> str:
    """fits, memory, failed, or followed: ended because another rank's child did."""
    environment = os.environ | {
        "RANK": str(world.rank),
        "LOCAL_RANK": str(world.local_rank),
        "WORLD_SIZE": str(world.size),
        "MASTER_PORT": str(port),
    }
    # The children meet at a store of rank 0's child, not at torchrun's.
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    with open(path, "wb") as output, tempfile.TemporaryDirectory(prefix="lumina-probe-") as folder:
        words, _ = question_words(question, Path(folder))
        child = subprocess.Popen(
            [sys.executable, "-m", MODULE, *words], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            followed = _wait(child, world, f"lumina-probe-{port}")
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if child.returncode == 0:
        return "fits"
    if followed:
        return "followed"
    # The kernel ends with SIGKILL what takes the last of a host's memory.
    killed = child.returncode in (OutOfMemory.exit_code, -9)
    said = path.read_text(encoding="utf-8", errors="replace").lower()
    if killed or any(sign in said for sign in _SIGNS_OF_MEMORY):
        return "memory"
    return "failed"


def _wait(child: subprocess.Popen[bytes], world: World, key: str) -> bool:
    """Until the child has ended; True when it was ended because another rank's had failed."""
    from torch.distributed import distributed_c10d

    # Not a collective: this rank must learn of the others' while it waits for its own.
    store = distributed_c10d._get_default_store() if world.size > 1 else None
    deadline = None
    while child.poll() is None:
        time.sleep(_POLL_SECONDS)
        if store is not None and deadline is None and store.check([key]):
            deadline = time.monotonic() + _GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            child.kill()
            child.wait()
            return True
    if child.returncode and store is not None:
        store.set(key, str(world.rank))
    return deadline is not None and child.returncode not in (0, OutOfMemory.exit_code)


def take_trial_steps(config: RunConfig, world: World, precision: str) -> None:
    """A step of one row, after which the optimizer has its moments, and one of the full size. A collective."""
    from lumina_ds.config.deepspeed.compose import compose_deepspeed
    from lumina_ds.engine.build import build_engine
    from lumina_ds.measure.steps import random_micro_batch
    from lumina_ds.train.step import StepCounts, run_step

    world = replace(world, sequence_parallel_size=config.deepspeed.sequence_parallel_size)
    config = config.model_copy(deep=True)
    train = config.train
    # A second micro-batch finds the gradients of the first; a third nothing more.
    train.gradient_accumulation_steps = min(2, train.gradient_accumulation_steps)
    train.global_batch_size, train.init_from, train.compile = None, None, "off"
    engine = build_engine(config, world, precision, compose_deepspeed(config, world.size, precision))
    for rows in (1, train.micro_batch_size):
        train.micro_batch_size = rows
        batch = world.share.cut(random_micro_batch(config, world.share.rank))
        num_tokens = rows * config.seq_length * train.gradient_accumulation_steps * world.share.size
        counts = StepCounts(num_tokens, num_tokens, stop_requested=False, save_due=False, failed=False)
        run_step(engine, [batch] * train.gradient_accumulation_steps, counts, config.model, train.max_grad_norm, world)
