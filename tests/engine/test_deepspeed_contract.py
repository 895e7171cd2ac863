"""The internals of DeepSpeed that this package leans on. Another version fails here, by name, not in a run."""

import inspect

import pytest

from lumina_ds.engine import world
from lumina_ds.errors import MachineError


def test_the_tested_version_is_installed():
    world.check_deepspeed_version()


@pytest.mark.parametrize("found", ["0.19.7", "0.20.0"])
def test_another_version_is_refused_with_the_remedy(monkeypatch, found):
    monkeypatch.setattr(world, "version", lambda name: found)
    with pytest.raises(MachineError, match=rf"deepspeed {found} is installed.*pip install deepspeed==0.19.8"):
        world.check_deepspeed_version()


def test_autoep_router_and_layer_are_as_expected():
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.ep_experts import GroupedExperts
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter

    assert list(inspect.signature(TokenChoiceTopKRouter.forward).parameters) == ["self", "x", "expert_bias"]
    source = inspect.getsource(AutoEPMoELayer._forward)
    assert "RouterOutput(*self.router(x, self.expert_bias))" in source
    assert [name for name, _ in GroupedExperts(4, 8, 2).named_parameters()] == ["w1", "w2", "w3"]


def test_autoep_sums_experts_as_its_combine_impl_says():
    """What engine/deepspeed/expert_parallel.py switches, and engine/fused_check.py compares."""
    from deepspeed.module_inject import auto_ep_layer
    from deepspeed.ops.triton_ops.autoep_fused_token_ops import fused_weighted_restore

    source = inspect.getsource(auto_ep_layer.AutoEPMoELayer._forward)
    assert 'elif self.combine_impl == "fused_weighted_sum":' in source
    assert auto_ep_layer.resolve_combine_impl("auto") == "weighted_sum"
    names = ["top_scores", "token_indices_sorted", "top_k", "shape"]
    assert list(inspect.signature(fused_weighted_restore).parameters) == ["combined_rows", *names]
    plain = list(inspect.signature(auto_ep_layer.combine_from_routed).parameters)
    assert plain == ["expert_output", *names[:3], "score_apply", "combine_impl", "shape"]


def test_engine_and_group_functions_are_as_expected():
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import groups

    assert "deepspeed_shm_comm" in __compatible_ops__
    assert "scale_wrt_gas=True" in inspect.getsource(deepspeed.DeepSpeedEngine)
    assert callable(groups._get_expert_parallel_group)


def test_optimizer_buffers_are_as_expected():
    """What checkpoint/pieces.py reads to know where a parameter's piece lies."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.tensor_fragment import tensor_fragment

    assert {"lp_fragment_address", "param_group_index"} <= set(tensor_fragment.__dataclass_fields__)
    assert callable(DeepSpeedZeroOptimizer.update_lp_params) and callable(BF16_Optimizer.update_lp_params)
    source = inspect.getsource(DeepSpeedZeroOptimizer_Stage3)
    assert "self.grad_position[param_id] = [int(i), int(current_offset), int(num_elements)]" in source
    for name in ("fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "persistent_parameters"):
        assert f"self.{name}" in source
    assert callable(DeepSpeedZeroOptimizer_Stage3._get_param_partition_rank)


def test_reduction_can_be_left_out_on_one_rank():
    """What engine/deepspeed/one_rank.py leaves out: after it gradients are where they were, and nothing else has been done."""
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    reduce = inspect.getsource(DeepSpeedEngine._backward_epilogue)
    assert "if self.enable_backward_allreduce and not self.inside_no_sync_ctxt:" in reduce
    average = inspect.signature(DeepSpeedZeroOptimizer.average_tensor)
    assert list(average.parameters) == ["self", "tensor", "communication_data_type"]
    fallback = list(inspect.signature(DeepSpeedZeroOptimizer.buffered_reduce_fallback).parameters)
    assert fallback[:5] == ["self", "rank", "grads", "communication_data_type", "elements_per_buffer"]
    source = inspect.getsource(DeepSpeedZeroOptimizer)
    assert source.count("self.buffered_reduce_fallback(") == 1
    assert "self.average_tensor(bucket.buffer[bucket.index].narrow(0, 0, bucket.elements), comm_dtype)" in source
    assert "if gradient_accumulation_dtype != torch.float32 or gradient_accumulation_dtype == self.dtype:" in source


def test_the_norm_is_taken_over_lists_of_gradients_and_parameters():
    """What engine/deepspeed/gradient_norm.py cuts into blocks: only kinds of parameters matter, and paddings are left out."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    norm = DeepSpeedZeroOptimizer.get_grad_norm_direct
    assert list(inspect.signature(norm).parameters) == ["self", "gradients", "params", "norm_type"]
    source = inspect.getsource(norm)
    assert 'param_gradients = (g for g in gradients if not getattr(g, "_zero_padding", False))' in source
    assert "torch.linalg.vector_norm(g.data.to(get_norm_dtype()).detach()," in source


def test_world_is_read_from_every_launcher():
    read = world.launched_world
    assert read({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}) == (3, 1, 4)
    open_mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert read(open_mpi) == (1, 1, 2)
    batch = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    assert read(batch) is None  # a batch script, not a task that srun started
    assert read(batch | {"SLURM_STEP_ID": "0"}) == (5, 1, 8)
    assert read({"RANK": "0"}) is None
    assert read({}) is None
