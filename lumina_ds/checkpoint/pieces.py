"""What of the training state lies on this rank, by parameter name: views into DeepSpeed's flat optimizer buffers.

Every ZeRO stage keeps a rank's share of a parameter as one contiguous piece of it, flattened; expert parallelism
keeps a range of the experts, which is contiguous too. So (name, first element, number of elements) says which part
of the whole parameter a piece is, under any layout, and a checkpoint written in these terms can be read under any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT = "weight"
MOMENTUM = "momentum_buffer"


@dataclass(frozen=True)
class MomentumPlace:
    """Muon's momentum of a whole parameter (this rank's experts of it): `numel` elements at `offset` of the group's
    buffer of `size`. `start` is its first element in the parameter with all experts.

    Every rank that holds a piece of the parameter keeps all of it (deepspeed/runtime/zero/stage_1_and_2.py,
    _muon_momentum_buffer), since it orthogonalises the whole matrix.
    """

    size: int
    offset: int
    numel: int
    start: int


@dataclass(frozen=True)
class Piece:
    """Elements start .. start+numel of the flattened parameter `name` of `shape` (all experts), and their place.

    The fp32 value and the optimizer's moments lie at `offset` of tensors that are laid out like `flat`, the
    tensor by which `optimizer` (torch's or DeepSpeed's own kind) knows them.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: Tensor
    offset: int
    optimizer: Any
    momentum: MomentumPlace | None = None

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of the flat tensor; empty before the first step."""
        return self.optimizer.state[self.flat]

    def view(self, flat: Tensor) -> Tensor:
        """This piece of a tensor laid out like `flat`."""
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)

    def tensors(self) -> dict[str, Tensor]:
        """Views [numel] of the fp32 weight and of every optimizer tensor, by key."""
        found = {WEIGHT: self.view(self.flat)}
        for key, value in self.state.items():
            if self.momentum is not None and key == MOMENTUM:
                begin = self.momentum.offset + self.start - self.momentum.start
                found[key] = value.narrow(0, begin, self.numel)
            elif _is_like(value, self.flat):
                found[key] = self.view(value)
        return found

    def scalars(self) -> dict[str, float]:
        """The optimizer's numbers for this piece, such as Adam's step count."""
        return {key: float(value) for key, value in self.state.items() if key not in self.tensors()}

    def room_for(self, key: str) -> tuple[Tensor, int]:
        """(1-D view to write `key` into, the element of the parameter that it begins with).

        Made as zeros where the optimizer has not stepped yet.
        """
        if key == WEIGHT:
            return self.view(self.flat), self.start
        if self.momentum is not None and key == MOMENTUM:
            place = self.momentum
            if key not in self.state:
                self.state[key] = torch.zeros(place.size, dtype=self.flat.dtype, device=self.flat.device)
            return self.state[key].narrow(0, place.offset, place.numel), place.start
        if key not in self.state:
            self.state[key] = torch.zeros_like(self.flat.detach())
        return self.view(self.state[key]), self.start

    def set_scalar(self, key: str, value: float) -> None:
        """Set a number in the form in which this optimizer keeps it."""
        group = self.optimizer.param_groups[0]
        # Muon hands its other parameters to an AdamW inside.
        counting = getattr(self.optimizer, "aux_optimizer", None) or self.optimizer
        if isinstance(counting, torch.optim.Optimizer) and type(counting).__module__.startswith("torch."):
            on_device = group.get("fused") or group.get("capturable")
            device = self.flat.device if on_device else torch.device("cpu")
            self.state[key] = torch.tensor(value, dtype=torch.float32, device=device)
        else:
            self.state[key] = int(value)


def optimizer_file_name(rank: int) -> str:
    """The file of a checkpoint that holds a rank's pieces."""
    return f"optimizer-{rank:05d}.safetensors"


def pieces_of_rank(engine: Any, divided: bool) -> Iterator[Piece]:
    """This rank's pieces in the model's order. At stage 0 every replica holds all; `divided` deals it out.

    Over all ranks the pieces of a parameter cover it once: with `divided`, at every stage.
    """
    stage = engine.zero_optimization_stage()
    zero = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        shape, first = _whole(parameter)
        if stage == 3:
            piece: Piece | None = _stage3_piece(zero, name, parameter, shape, first)
        elif stage > 0 or hasattr(zero, "bf16_groups"):
            piece = _flat_piece(zero, name, parameter, shape, first)
        else:
            piece = _replicated_piece(zero, name, parameter, shape, first, divided)
        if piece is not None and piece.numel > 0:
            yield piece


def publish_weights(engine: Any) -> None:
    """Bring the parameters that the model computes with up to the fp32 weights just written. A collective."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        _publish_stage3(zero)
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()


def _is_like(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


def _whole(parameter: Any) -> tuple[tuple[int, ...], int]:
    """Shape with all experts, and the first element of it that this rank's experts hold."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if getattr(parameter, "allreduce", True):
        return shape, 0
    import torch.distributed as dist
    from deepspeed.utils import groups

    group = groups._get_expert_parallel_group(parameter.group_name)
    return (shape[0] * dist.get_world_size(group), *shape[1:]), dist.get_rank(group) * prod(shape)


def _flat_piece(zero: Any, name: str, parameter: Any, shape: tuple[int, ...], first: int) -> Piece | None:
    """ZeRO 1 and 2, and the bf16 optimizer: DeepSpeed's own mapping (deepspeed/utils/tensor_fragment.py)."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    place = mapping.get_hp_fragment_address()
    [flat] = zero.optimizer.param_groups[mapping.param_group_index]["params"]
    start = first + mapping.lp_fragment_address.start
    momentum = _momentum_place(zero, mapping.param_group_index, parameter, first)
    return Piece(name, shape, start, place.numel, flat, place.start, zero.optimizer, momentum)


def _momentum_place(zero: Any, group: int, parameter: Any, first: int) -> MomentumPlace | None:
    if not zero.optimizer.param_groups[group].get("use_muon"):
        return None
    offset = size = 0
    for other in zero.params_in_partition[group]:
        if other is parameter:
            offset = size
        size += other.numel()
    return MomentumPlace(size, offset, parameter.numel(), first)


def _stage3_piece(zero: Any, name: str, parameter: Any, shape: tuple[int, ...], first: int) -> Piece:
    """ZeRO-3 splits every parameter evenly and fills up the last share."""
    sub_group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    begin = zero._get_param_partition_rank(parameter) * size
    numel = max(0, min(size, parameter.ds_numel - begin))
    return Piece(
        name, shape, first + begin, numel, zero.fp32_partitioned_groups_flat[sub_group], offset, zero.optimizer
    )


def _replicated_piece(
    optimizer: Any, name: str, parameter: nn.Parameter, shape: tuple[int, ...], first: int, divided: bool
) -> Piece:
    numel = parameter.numel()
    begin, end = 0, numel
    if divided:
        rank, size = _replica(parameter)
        begin, end = rank * numel // size, (rank + 1) * numel // size
    return Piece(name, shape, first + begin, end - begin, parameter, begin, optimizer)


def _replica(parameter: Any) -> tuple[int, int]:
    """This rank's number among those that hold the same values, and how many there are."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    if getattr(parameter, "allreduce", True):
        return dist.get_rank(), dist.get_world_size()
    group = groups._get_expert_data_parallel_group(parameter.group_name)
    return dist.get_rank(group), dist.get_world_size(group)


def _publish_stage3(zero: Any) -> None:
    """As the end of deepspeed/runtime/zero/stage3.py's _rigid_load_state_dict, which rebuilds every partition."""
    for number, master in enumerate(zero.fp32_partitioned_groups_flat):
        if master.numel():
            zero.fp16_partitioned_groups_flat[number].data.copy_(master.data)
        updated = zero.unflatten(zero.fp16_partitioned_groups_flat[number], zero.fp16_partitioned_groups[number])
        for partition, values in zip(zero.fp16_partitioned_groups[number], updated, strict=True):
            partition.data = values.data
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
    zero.checkpoint_event_epilogue()
