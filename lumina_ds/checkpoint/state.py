"""The files that one rank adds to a checkpoint, and the way back: under the same layout or another.

optimizer-RRRRR.safetensors holds the rank's pieces of every parameter: fp32 weight and moments, 1-D, named
`PARAMETER/KEY`, with the place of each piece in the header (checkpoint/pieces.py says what a piece is). A rank that
reads looks up which files hold the elements it needs, so world size, ZeRO stage and expert-parallel size may change.
"""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_ds.checkpoint.format import BUFFERS_FILE
from lumina_ds.checkpoint.manifest import EngineCounters, Manifest, read_manifest
from lumina_ds.checkpoint.pieces import optimizer_file_name, pieces_of_rank, publish_weights
from lumina_ds.checkpoint.saved_state import PieceRecord, SavedState, pieces_metadata
from lumina_ds.checkpoint.tensor_file import CheckpointFile
from lumina_ds.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def own_files(engine: Any, random: dict[str, Any]) -> Iterator[CheckpointFile]:
    """The files that need no other rank: all but the whole weights. Tensors are views."""
    import torch.distributed as dist

    from lumina_ds.model.balancing import routing_state

    rank = dist.get_rank()
    yield _optimizer_file(engine, rank)
    yield CheckpointFile(f"random-rank-{rank}.pt", content=_bytes_of_random_state(random))
    if rank == 0:
        buffers = routing_state(engine.module)
        if buffers:
            yield CheckpointFile(BUFFERS_FILE, buffers)


def engine_counters(engine: Any) -> EngineCounters:
    """What a checkpoint keeps of DeepSpeed's own numbers."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    plain = {} if scaler is None else {k: v for k, v in vars(scaler).items() if isinstance(v, bool | int | float)}
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    steps = {group["step"] for group in inner.param_groups if isinstance(group.get("step"), int)}
    return EngineCounters(
        skipped_steps=engine.skipped_steps, loss_scaler=plain, group_step=max(steps) if steps else None
    )


def load_checkpoint(engine: Any, folder: Path) -> Manifest:
    """Restore engine and random state from a verified step folder; returns its manifest. A collective.

    The engine may be fresh or have trained, and of any layout.
    """
    import torch.distributed as dist

    manifest = read_manifest(folder)
    restore_engine(engine, folder, manifest)
    restore_random_state(folder, dist.get_rank(), manifest.data.seed)
    return manifest


def restore_engine(engine: Any, folder: Path, manifest: Manifest) -> None:
    """Weights, optimizer state and counters of a verified checkpoint into `engine`. A collective.

    Raises CheckpointError when the files do not cover a parameter.
    """
    import torch

    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()
    saved = SavedState(folder, manifest.files)
    with torch.no_grad():
        for piece in pieces_of_rank(engine, divided=False):
            for key in saved.keys_of(piece.name, piece.shape):
                target, start = piece.room_for(key)
                saved.read_into(target, piece.name, key, start)
            for key, value in saved.scalars_of(piece.name).items():
                piece.set_scalar(key, value)
        publish_weights(engine)
        _restore_routing_state(engine, folder)
    _restore_counters(engine, manifest.step, manifest.engine)
    if engine.fp16_enabled():
        restore_loss_scale(engine.optimizer.loss_scaler, manifest.topology.precision, manifest.engine)


def restore_loss_scale(scaler: Any, saved_in: str, saved: EngineCounters) -> None:
    """The dynamic scale of an fp16 run that goes on in fp16.

    Every other precision has a scaler too, fixed at 1: neither may take the other's numbers.
    """
    if saved_in != "fp16":
        return
    for key, value in saved.loss_scaler.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def restore_random_state(folder: Path, rank: int, seed: int) -> None:
    """The random state that this rank saved; ranks that were not there before start from `seed` and their number."""
    import numpy as np
    import torch

    path = folder / f"random-rank-{rank}.pt"
    if not path.is_file():
        random.seed(f"{seed} {rank}")
        torch.manual_seed(random.getrandbits(63))
        np.random.seed(random.getrandbits(32))
        return
    try:
        set_random_state(torch.load(path, weights_only=True))
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise CheckpointError(f"{path} is no random state of a run, and nothing of it was run: {error}") from error


def random_state() -> dict[str, Any]:
    """The state of every random generator of this process; takes some microseconds."""
    import numpy as np
    import torch

    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    # Restricted unpickling takes tensors but no numpy arrays.
    keys = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    state["numpy"] = {**numpy_state, "state": {**numpy_state["state"], "key": keys}}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to a state that random_state() gave."""
    import numpy as np
    import torch

    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    keys = state["numpy"]["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": keys}})
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _optimizer_file(engine: Any, rank: int) -> CheckpointFile:
    tensors: dict[str, Tensor] = {}
    records: dict[str, PieceRecord] = {}
    for piece in pieces_of_rank(engine, divided=True):
        views = piece.tensors()
        records[piece.name] = PieceRecord(
            shape=list(piece.shape), start=piece.start, numel=piece.numel, keys=list(views), scalars=piece.scalars()
        )
        tensors |= {f"{piece.name}/{key}": view for key, view in views.items()}
    return CheckpointFile(optimizer_file_name(rank), tensors, pieces_metadata(records))


def _restore_routing_state(engine: Any, folder: Path) -> None:
    """What the routers keep beside their parameters; a checkpoint that lacks a part of it is refused."""
    from safetensors import safe_open

    from lumina_ds.model.balancing import routing_state

    state = routing_state(engine.module)
    if not state:
        return
    with safe_open(folder / BUFFERS_FILE, framework="pt") as file:
        for name, tensor in state.items():
            tensor.copy_(file.get_tensor(name))


def _restore_counters(engine: Any, step: int, saved: EngineCounters) -> None:
    engine.skipped_steps = saved.skipped_steps
    engine.global_steps = step
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.global_samples = step * engine.train_batch_size()
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for group in inner.param_groups:
        if saved.group_step is not None:
            group["step"] = saved.group_step


def _bytes_of_random_state(state: dict[str, Any]) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()
