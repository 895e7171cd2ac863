"""The internals of DeepSpeed that this package leans on. Another version fails here, by name, not in a run."""

import ast
import inspect
import logging
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest

from lumina_ds.engine import deepspeed as changes_package
from lumina_ds.engine import resources, world
from lumina_ds.engine.deepspeed.changes import Need, existing, replace, replaced
from lumina_ds.engine.deepspeed.linear import own_linear
from lumina_ds.engine.deepspeed.log_level import deepspeed_log_level
from lumina_ds.errors import MachineError

PACKAGE = Path(__file__).parents[2] / "lumina_ds"
FILES = sorted({module.name for module in pkgutil.iter_modules(changes_package.__path__)} - {"changes"})
NEEDS = [(name, need) for name in FILES for need in import_module(f"{changes_package.__name__}.{name}").NEEDS]


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_changes_says_why_and_what_it_needs(file):
    module = import_module(f"{changes_package.__name__}.{file}")
    assert f"| {file} |" in changes_package.__doc__, "the table of engine/deepspeed/__init__.py lacks it"
    assert module.NEEDS and len(module.__doc__.split()) > 10


@pytest.mark.parametrize(("file", "need"), NEEDS, ids=lambda value: value if isinstance(value, str) else value.target)
def test_what_a_change_needs_is_there(file, need):
    assert need.fault() is None


def test_the_gate_of_the_norm_names_its_two_functions():
    named = {need.target.rpartition(".")[2] for file, need in NEEDS if file == "gradient_norm"}
    assert {"scaled_global_norm", "_get_norm_groups", "get_grad_norm_direct"} <= named


def test_what_is_missing_or_different_is_named_in_a_line(monkeypatch):
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    stage_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._get_norm_groups"
    stage_1 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
    assert Need(stage_3).fault() is None
    monkeypatch.delattr(DeepSpeedZeroOptimizer_Stage3, "_get_norm_groups")
    monkeypatch.setattr(DeepSpeedZeroOptimizer, "scaled_global_norm", lambda self, kind: None)
    assert Need(stage_3).fault() == f"{stage_3} is not there"
    assert "takes self kind, not self norm_type" in Need(f"{stage_1}.scaled_global_norm", "self norm_type").fault()
    assert Need(f"{stage_1}.contiguous_gradients").fault() is None, "set by the constructor"
    assert "no longer has `nonsense()`" in Need(f"{stage_1}.step", contains="nonsense()").fault()
    assert "no_module" in Need("deepspeed.no_module:x").fault() and Need("deepspeed:No.x").fault()


def test_a_change_of_what_is_not_there_ends_the_run_with_a_line():
    class Engine:
        def step(self):
            return "deepspeed's"

    engine = Engine()
    with pytest.raises(MachineError, match=r"no norm in Engine .*constraints") as error:
        replace(engine, "norm", None)
    assert "\n" not in str(error.value) and not hasattr(engine, "norm")
    with pytest.raises(MachineError, match="no nothing in pytest"):
        existing(pytest, "nothing")
    with pytest.raises(RuntimeError), replaced(engine, "step", lambda: "ours"):
        assert engine.step() == "ours"
        raise RuntimeError
    assert engine.step() == "deepspeed's" and not vars(engine)
    with replaced(Engine, "step", lambda self: "ours"):
        assert engine.step() == "ours"
    assert engine.step() == "deepspeed's"


def test_nothing_of_theirs_is_replaced_elsewhere():
    """Assignments to attributes of what is imported from torch or deepspeed, and setattr on other things than ours."""
    # The tables of ours that are filled: a module of the model; a saved loss scale.
    ours = {"generate/precision.py: setattr", "checkpoint/state.py: setattr"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "deepspeed" and path.parent.parent.name == "engine":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        place = str(path.relative_to(PACKAGE))
        found |= {f"{place}: {change}" for change in _changes(tree)}
    assert found == ours


def _changes(tree):
    foreign = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).partition(".")[0] in ("torch", "deepspeed")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            yield node.func.id
        targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [getattr(node, "target", None)]
        for target in targets:
            root = target
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            is_foreign = isinstance(root, ast.Name) and root.id in foreign and root is not target
            if is_foreign or (isinstance(target, ast.Attribute) and target.attr == "__class__"):
                yield ast.unparse(target)


def test_the_search_for_changes_finds_them():
    text = "import torch.nn as nn\nfrom deepspeed import ops\nnn.Module._apply = 1\nops.table['x'] = 2\na.__class__ = B"
    assert set(_changes(ast.parse(text + "\nsetattr(a, 'b', 1)\nnn = 3\na.b = 4"))) == {
        "nn.Module._apply", "ops.table['x']", "a.__class__", "setattr",
    }  # fmt: skip


def test_deepspeeds_log_level_comes_back_after_an_error(monkeypatch):
    from deepspeed.ops.op_builder import all_ops
    from deepspeed.utils import logger

    class Refusing:
        def is_compatible(self, verbose):
            raise OSError("no such compiler")

    before = logger.level
    with pytest.raises(ZeroDivisionError), deepspeed_log_level():
        assert logger.level == logging.ERROR
        raise ZeroDivisionError
    monkeypatch.setattr(all_ops, "ALL_OPS", {"refusing": Refusing()})
    with pytest.raises(OSError):
        resources.compatible_ops()
    assert logger.level == before


def test_linear_is_torchs_own_again():
    import torch.nn.functional as F

    linear = F.linear
    with pytest.raises(ZeroDivisionError), own_linear():
        F.linear = None
        raise ZeroDivisionError
    assert F.linear is linear


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
    """What engine/deepspeed/expert_parallel.py switches, and engine/kernel_choice.py compares."""
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
