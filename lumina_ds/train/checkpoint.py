"""Checkpoints in two phases: written and synced under a temporary name, then sealed, renamed, pointed at.

A step folder holds DeepSpeed's own partitioned state, every rank's random state, the whole weights as
safetensors (so that evaluation and generation need no DeepSpeed), the tokenizer, and manifest.json, which is
written last and names every file with size and digest. A folder without a manifest that verifies is not a
checkpoint. DeepSpeed's own `latest` is never written: it is published before other ranks have finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumina_ds.errors import CheckpointError
from lumina_ds.files import file_digest, sync_folder, write_atomically

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS_INDEX = "model.safetensors.index.json"
BUFFERS_FILE = "buffers.safetensors"
BIASES_FILE = "model-routers.safetensors"
MAX_WEIGHT_FILE_BYTES = 4 << 30
STEP_NAME = re.compile(r"step-\d{8}")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def save_checkpoint(engine: Any, checkpoints: Path, manifest: dict[str, Any], tokenizer: Path, keep: int) -> Path:
    """Write and publish the checkpoint of manifest["step"]. A collective; returns its folder.

    `manifest` is what a resumed run must know: step, rows, topology, config, digests of tokenizer and data.
    `tokenizer` is copied under its own name.
    """
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    final = checkpoints / step_name(manifest["step"])
    staging = checkpoints / f"{final.name}.tmp"
    if rank == 0:
        for unfinished in checkpoints.glob("step-*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        staging.mkdir(parents=True)
        shutil.copyfile(tokenizer, staging / tokenizer.name)
    dist.barrier()
    engine.save_checkpoint(str(checkpoints), tag=staging.name, save_latest=False)
    _save_random_state(staging, rank)
    _save_weights(engine, staging)
    dist.barrier()
    digests = _seal_files(staging, rank, world_size)
    if rank == 0:
        sealed = manifest | {"format": FORMAT, "files": digests}
        write_atomically(staging / MANIFEST, json.dumps(sealed | {"digest": _manifest_digest(sealed)}, indent=1))
        for name in ("zero_to_fp32.py", "zero_to_torch.py"):
            # DeepSpeed leaves these beside every save, and neither can read a checkpoint with AutoEP experts.
            (checkpoints / name).unlink(missing_ok=True)
        _publish(staging, final, manifest.get("eval_loss"))
        _prune(checkpoints, keep)
    dist.barrier()
    return final


def load_checkpoint(engine: Any, folder: Path) -> dict[str, Any]:
    """Restore engine and random state from a verified step folder; returns its manifest. A collective."""
    import torch
    import torch.distributed as dist

    # The files need only tensors and DeepSpeed's few plain classes: refuse to unpickle anything else.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(_safe_classes()):
            path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {folder}; resume from another step")
    _load_random_state(folder, dist.get_rank())
    _load_routing_state(engine, folder)
    return read_manifest(folder)


def newest_valid(checkpoints: Path) -> Path | None:
    """The newest step folder that verifies, named by `latest` or not; None when there is no step folder at all.

    Each damaged one is reported in a line. Raises CheckpointError when there are some and none is sound: a
    silent fresh start would hide the loss.
    """
    folders = step_folders(checkpoints)
    for folder in reversed(folders):
        faults = checkpoint_faults(folder)
        if not faults:
            return folder
        logger.warning("%s is damaged and is passed over: %s", folder.name, faults[0])
    if folders:
        raise CheckpointError(
            f"none of the {len(folders)} checkpoints in {checkpoints} is sound; start anew with --resume none "
            "and another --experiment-name"
        )
    return None


def find_checkpoint(path: Path) -> Path:
    """The sound step folder meant by a run folder (its newest) or a step folder; CheckpointError otherwise."""
    if STEP_NAME.fullmatch(path.name):
        faults = checkpoint_faults(path)
        if faults:
            raise CheckpointError(f"{path} cannot be used: {faults[0]}")
        return path
    if not (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path} is neither a run folder nor a checkpoint (step-XXXXXXXX); give one of them")
    found = newest_valid(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint yet; train first")
    return found


def step_folders(checkpoints: Path) -> list[Path]:
    """Published step folders by step, oldest first."""
    return sorted(path for path in checkpoints.glob("step-*") if path.is_dir() and STEP_NAME.fullmatch(path.name))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a step folder; CheckpointError when missing, altered, or of another step or format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or unreadable; the checkpoint was not finished") from error
    if not isinstance(manifest, dict) or manifest.get("digest") != _manifest_digest(manifest):
        raise CheckpointError(f"{path} was altered (its digest differs)")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {manifest['format']}, this version reads {FORMAT}")
    if step_name(manifest["step"]) != folder.name:
        raise CheckpointError(f"{folder} holds the checkpoint of step {manifest['step']}; it was renamed")
    return manifest


def _manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest's content without its own digest, in canonical JSON."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checkpoint_faults(folder: Path) -> list[str]:
    """What is wrong with a step folder: missing, short or altered files. Reads every byte."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    faults = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            faults.append(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif file_digest(path) != entry["sha256"]:
            faults.append(f"{name} was altered (its digest differs)")
    return faults


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with the whole weights of a step folder."""
    index = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _save_random_state(folder: Path, rank: int) -> None:
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
    torch.save(state, folder / f"random-rank-{rank}.pt")


def _load_random_state(folder: Path, rank: int) -> None:
    import numpy as np
    import torch

    state = torch.load(folder / f"random-rank-{rank}.pt", weights_only=True)
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    keys = state["numpy"]["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": keys}})
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _load_routing_state(engine: Any, folder: Path) -> None:
    """DeepSpeed's own files hold these buffers too; a checkpoint that lacks one is refused rather than restarted."""
    from safetensors import safe_open

    from lumina_ds.model.balancing import routing_state

    state = routing_state(engine.module)
    if not state:
        return
    with safe_open(folder / BUFFERS_FILE, framework="pt") as file:
        for name, tensor in state.items():
            tensor.copy_(file.get_tensor(name))


def _save_weights(engine: Any, folder: Path) -> None:
    """Whole weights in files of at most MAX_WEIGHT_FILE_BYTES, with Hugging Face's index. A collective."""
    import torch.distributed as dist
    from safetensors.torch import save_file

    from lumina_ds.engine.consolidate import full_parameters
    from lumina_ds.model.balancing import routing_state, selection_biases

    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_in_files(full_parameters(engine)), start=1):
        if dist.get_rank() == 0:
            name = f"model-{number:05d}.safetensors"
            save_file(tensors, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
    if dist.get_rank() == 0:
        # Alike on all ranks. What inference needs of it belongs to the whole weights, and stands there too.
        state, biases = (
            {name: tensor.cpu() for name, tensor in kind(engine.module).items()}
            for kind in (routing_state, selection_biases)
        )
        if state:
            save_file(state, folder / BUFFERS_FILE, metadata={"format": "pt"})
        if biases:
            save_file(biases, folder / BIASES_FILE, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(biases, BIASES_FILE)
        write_atomically(folder / WEIGHTS_INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))


def _in_files(parameters: Iterator[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """Batches of named tensors below the size of a file; on ranks that receive None, empty batches at the end."""
    batch: dict[str, Any] = {}
    size = 0
    for name, tensor in parameters:
        if tensor is None:
            continue
        num_bytes = tensor.numel() * tensor.element_size()
        if batch and size + num_bytes > MAX_WEIGHT_FILE_BYTES:
            yield batch
            batch, size = {}, 0
        batch[name] = tensor
        size += num_bytes
    yield batch


def _seal_files(staging: Path, rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """Sync and digest every file, the work shared among the ranks; the whole table on every rank."""
    import torch.distributed as dist

    # One rank lists: on a shared file system another one may not see every file yet.
    listed = [sorted(path for path in staging.rglob("*") if path.is_file())]
    dist.broadcast_object_list(listed, src=0)
    mine = {}
    for path in listed[0][rank::world_size]:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        mine[str(path.relative_to(staging))] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, mine)
    return dict(sorted(item for part in gathered for item in part.items()))


def _publish(staging: Path, final: Path, eval_loss: float | None) -> None:
    """Rename, then replace the pointers: each moment of a crash leaves a sound checkpoint to be found."""
    sync_folder(staging)
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        os.rename(final, replaced)
    os.rename(staging, final)
    sync_folder(final.parent)
    write_atomically(final.parent / "latest", final.name)
    if eval_loss is not None and eval_loss < _best_loss(final.parent):
        write_atomically(final.parent / "best", final.name)
    shutil.rmtree(replaced, ignore_errors=True)


def _best_loss(checkpoints: Path) -> float:
    """Evaluation loss of the checkpoint that `best` names; infinite when there is none that can be read."""
    best = pointer_target(checkpoints, "best")
    try:
        loss = read_manifest(best)["eval_loss"] if best is not None else None
    except CheckpointError:
        loss = None
    return math.inf if loss is None else loss


def set_aside_later_steps(checkpoints: Path, step: int) -> None:
    """Rename the steps after `step`, which a run that goes back leaves behind, so that none is resumed from later."""
    for folder in step_folders(checkpoints):
        if folder.name > step_name(step):
            kept = folder.with_name(f"{folder.name}.abandoned")
            shutil.rmtree(kept, ignore_errors=True)
            os.rename(folder, kept)
            logger.warning("%s is of a course that this run leaves; kept as %s", folder.name, kept.name)


def pointer_target(checkpoints: Path, pointer: str) -> Path | None:
    """The step folder that the file `latest` or `best` names; None when absent or not a plain step name."""
    try:
        name = (checkpoints / pointer).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    target = checkpoints / name if STEP_NAME.fullmatch(name) else None
    return target if target is not None and target.is_dir() else None


def _prune(checkpoints: Path, keep: int) -> None:
    kept = {pointer_target(checkpoints, "latest"), pointer_target(checkpoints, "best")}
    for folder in step_folders(checkpoints)[:-keep]:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _safe_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
