"""Whole weights between files: ours to published names and back, one output file in memory at a time.

Every tensor is planned from the headers before one is read, so a missing, foreign, empty or misshapen one is
refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_ds import foreign_files
from lumina_ds.config.schema import ModelConfig
from lumina_ds.config.tensors import num_parameters, parameter_tensors
from lumina_ds.errors import CheckpointError, DataError, MachineError
from lumina_ds.export.hugging_face import SELECTION_BIAS
from lumina_ds.files import (
    WEIGHTS_INDEX,
    file_of,
    read_weights_index,
    weights_index,
    write_atomically,
)
from lumina_ds.text import counted, format_count, shortened

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
MAX_FILE_BYTES = 2 << 30
# Bytes of one value, by the name in a safetensors header.
VALUE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
MAX_FAULTS = 8
# So many missing ones are found one by one without a wait.
_FEW_TENSORS = 5000


@dataclass(frozen=True)
class Part:
    """A tensor of a file, or one row of it: where it lies and its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    row: int | None = None


@dataclass(frozen=True)
class Planned:
    """A tensor to write: one part as it is, or several stacked; then `num_added_rows` rows at their mean."""

    name: str
    parts: tuple[Part, ...]
    stacked: bool = False
    num_added_rows: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.parts[0].shape
        if self.stacked:
            return (len(self.parts), *shape)
        return (shape[0] + self.num_added_rows, *shape[1:])


def check_declared(folder: Path, model: ModelConfig, found: Mapping[str, Part]) -> None:
    """Refuse a model far beyond its files before anything of its size is built. CheckpointError.

    What is nearer, `coverage_faults` names tensor by tensor.
    """
    held = sum(prod(part.shape) for part in found.values())
    declared = num_parameters(model)
    num_experts = model.num_experts * (model.num_hidden_layers - model.first_k_dense_layers)
    num_tensors = len(parameter_tensors(model)) + 3 * max(0, num_experts)
    if declared > 2 * held or num_tensors > len(found) + _FEW_TENSORS:
        shape = f"num_hidden_layers {model.num_hidden_layers}, hidden_size {model.hidden_size}"
        if model.num_experts:
            shape += f", {model.num_experts} experts"
        raise CheckpointError(
            f"{folder} declares {format_count(declared)} parameters ({shape}), and its weights hold {format_count(held)} "
            f"in {counted(len(found), 'tensor')}; take the configuration and the weights from one source again"
        )


def model_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that inference needs: parameters in the model's order, without a tied head, and
    selection biases of routers."""
    import torch

    from lumina_ds.model.balancing import selection_biases
    from lumina_ds.model.transformer import CausalLM

    with torch.device("meta"):
        network = CausalLM(model)
    tensors = dict(network.named_parameters()) | selection_biases(network)
    return {name: tuple(parameter.shape) for name, parameter in tensors.items()}


def read_headers(folder: Path) -> dict[str, Part]:
    """Every tensor of a folder's safetensors files by name, from the index where there is one.

    Raises CheckpointError when there is no such file, one is damaged, or the index names what is not there.
    """
    from safetensors import SafetensorError, safe_open

    files = _listed_files(folder)
    found: dict[str, Part] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    tensor = opened.get_slice(name)
                    if name in found:
                        raise CheckpointError(f"{name} stands in both {found[name].file} and {file}; keep one of them")
                    found[name] = Part(file, name, tuple(tensor.get_shape()), tensor.get_dtype())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is missing or damaged ({error}); copy the folder again") from error
    return found


def coverage_faults(found: Mapping[str, Part], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps `found` from being exactly `expected`: names and shapes, one line each."""
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not part of this model" for name in found if name not in expected]
    for name, shape in expected.items():
        part = found.get(name)
        if part is not None and part.shape != shape:
            faults.append(f"{name} has shape {list(part.shape)} instead of {list(shape)}")
        elif part is not None and part.dtype not in VALUE_BYTES:
            faults.append(f"{name} holds {part.dtype} values; only {', '.join(VALUE_BYTES)} are taken")
    return faults


def refuse(folder: Path, faults: Sequence[str]) -> None:
    """Raise CheckpointError with the first of `faults`, if there is one."""
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise CheckpointError(f"the weights in {folder} do not fit: {'; '.join(faults[:MAX_FAULTS])}{more}")


def read_weights(planned: Sequence[Planned]) -> dict[str, torch.Tensor]:
    """All of `planned` in memory, by name. Raises CheckpointError for values that are not finite."""
    reader = _Reader()
    return {one.name: reader.read(one, None) for one in planned}


def write_weights(
    planned: Sequence[Planned], out: Path, dtype: torch.dtype | None, max_file_bytes: int = MAX_FILE_BYTES
) -> int:
    """Write `planned` as safetensors with Hugging Face's file names and index; returns the bytes of the values.

    dtype None keeps each tensor's own. Raises CheckpointError for values that are not finite, MachineError when
    the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    groups = list(_groups(planned, dtype, max_file_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    reader = _Reader()
    for number, group in enumerate(groups, 1):
        name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {one.name: reader.read(one, dtype) for one in group}
        seen: set[tuple[Part, ...]] = set()
        for one in group:
            if one.parts in seen:  # a tied head; safetensors does not write tensors that share memory
                tensors[one.name] = tensors[one.name].clone()
            seen.add(one.parts)
        try:
            save_file(tensors, out / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise MachineError(f"cannot write {out / name} ({error}); free space or choose another --out") from error
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, name)
    write_atomically(out / WEIGHTS_INDEX, weights_index(weight_map, {"total_size": total}))
    return total


def _listed_files(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    if index.exists():
        try:
            return [folder / name for name in sorted(set(read_weights_index(folder).values()))]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{index} is damaged ({error}); copy the folder again") from error
    try:
        files = [file_of(folder, path.name) for path in sorted(folder.glob("*.safetensors"))]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{error}; copy the folder again") from error
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors weights; save the model in that format first")
    return files


def _written_dtype(planned: Planned, dtype: torch.dtype | None) -> torch.dtype | None:
    """A selection bias keeps its own type: published ones are fp32, and bf16 would lose its small steps."""
    return None if planned.name.endswith(SELECTION_BIAS) else dtype


def _groups(planned: Sequence[Planned], dtype: torch.dtype | None, max_file_bytes: int) -> Iterator[list[Planned]]:
    group: list[Planned] = []
    size = 0
    for one in planned:
        written = _written_dtype(one, dtype)
        value_bytes = written.itemsize if written is not None else VALUE_BYTES[one.parts[0].dtype]
        num_bytes = prod(one.shape) * value_bytes
        if group and size + num_bytes > max_file_bytes:
            yield group
            group, size = [], 0
        group.append(one)
        size += num_bytes
    yield group


class _Reader:
    """Reads parts, keeping the last file open: the plan follows the files' order."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._opened: Any = None

    def read(self, planned: Planned, dtype: torch.dtype | None) -> torch.Tensor:
        import torch

        parts = [self._part(part) for part in planned.parts]
        tensor = torch.stack(parts) if planned.stacked else parts[0]
        if planned.num_added_rows:
            mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(planned.num_added_rows, *tensor.shape[1:])])
        tensor = tensor.to(_written_dtype(planned, dtype) or tensor.dtype).contiguous()
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{planned.name} holds values that are not finite; use an earlier checkpoint")
        return tensor

    def _part(self, part: Part) -> torch.Tensor:
        from safetensors import safe_open

        if part.file != self._file:
            self._opened, self._file = safe_open(part.file, framework="pt"), part.file
        if part.row is None:
            return self._opened.get_tensor(part.name)
        return self._opened.get_slice(part.name)[part.row]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder; DataError when it is missing or something else."""
    try:
        content = foreign_files.read_json(file_of(path.parent, path.name))
    except (OSError, ValueError) as error:
        reason = f" ({shortened(' '.join(str(error).split()), 200)})" if isinstance(error, ValueError) else ""
        raise DataError(f"{path} is missing or no JSON{reason}; give a folder in Hugging Face's format") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object; give a folder in Hugging Face's format")
    return content
