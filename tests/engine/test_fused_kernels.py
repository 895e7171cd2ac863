"""Which fused kernels a run takes, and each of them against ours: on a GPU, or under Triton's interpreter."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from lumina_ds.config.load import Override, load_config
from lumina_ds.config.schema import FusedKernel
from lumina_ds.engine import kernel_choice
from lumina_ds.engine.kernel_choice import check_kernel, choose_kernels
from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.model import fused_kernels
from lumina_ds.model.kernels import PLAIN
from lumina_ds.model.loss import chunked_cross_entropy
from lumina_ds.model.rope import rotate_queries_and_keys

NAMES = get_args(FusedKernel)
CPU = torch.device("cpu")
LIBRARIES = all(importlib.util.find_spec(name) for name in ("triton", "liger_kernel"))
WITH_LIBRARIES = pytest.mark.skipif(not LIBRARIES, reason="needs triton and liger-kernel (extra: fused)")


def config(preset="debug", **values):
    fields = {name.replace("__", "."): value for name, value in values.items()}
    return load_config(preset, [Override(name, value, name) for name, value in fields.items()]).config


@pytest.mark.slow
@WITH_LIBRARIES
def test_every_kernel_computes_what_ours_does_under_the_interpreter(tmp_path):
    worker, result = Path(__file__).with_name("fused_kernels_worker.py"), tmp_path / "result.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(worker), str(result)], env=environment, check=True, timeout=600)
    found = json.loads(result.read_text())
    assert set(found["checks"]) == set(NAMES)
    assert {fault for of_name in found["checks"].values() for fault in of_name.values()} == {None}
    assert found["models"]["fp32, recomputed"]["difference"] < 1e-5
    # Two layers round at other places; gradients of single norms differ most.
    assert found["models"]["mixed_bf16"]["difference"] < 5e-2
    reason = "rms_norm, rope, swiglu, cross_entropy, which compute here what plain PyTorch does"
    assert found["models"]["fp32, recomputed"]["reason"] == reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@WITH_LIBRARIES
@pytest.mark.parametrize("precision", ["fp32", "bf16", "mixed_bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_computes_what_ours_does_on_a_gpu(name, precision):
    model = config("b1", model__qk_norm=True, model__num_shared_experts=1).model
    assert check_kernel(name, model, precision, torch.device("cuda")) is None


def wrong_rope(q, k, cos, sin):
    return rotate_queries_and_keys(q, k, cos, -sin)


def wrong_weight_gradient(x, weight, eps):
    return PLAIN.rms_norm(x, weight.detach() * 1.0 + 0.0 * weight, eps)


def mean_loss(hidden, weight, labels, chunk):
    return chunked_cross_entropy(hidden, weight, labels, chunk) / len(labels)


def other_type(gate, up):
    return (F.silu(gate) * up).float()


def failing(gate, up):
    raise RuntimeError("no kernel image is available\nfor this card")


@pytest.mark.parametrize(
    "name, function, fault",
    [
        ("rope", wrong_rope, "differs from plain PyTorch by .* in torch.bfloat16, above 1e-02"),
        ("rms_norm", wrong_weight_gradient, "differs from plain PyTorch by 1.0e"),
        ("cross_entropy", mean_loss, "differs from plain PyTorch by 9.8e-01"),
        ("swiglu", other_type, "differs from plain PyTorch by inf"),
        ("swiglu", failing, "it failed in torch.bfloat16: RuntimeError: no kernel image is available$"),
    ],
)
def test_the_check_finds_what_is_wrong(monkeypatch, name, function, fault):
    monkeypatch.setattr(fused_kernels, f"liger_{name}", function)
    model = config(model__first_k_dense_layers=1, model__intermediate_size=64).model
    assert re.search(fault, check_kernel(name, model, "bf16", CPU) or "nothing")


def test_the_check_passes_what_is_right(monkeypatch):
    for name in ("rms_norm", "rope", "swiglu", "cross_entropy"):
        monkeypatch.setattr(fused_kernels, f"liger_{name}", getattr(PLAIN, name))
        for precision in ("fp32", "bf16", "mixed_bf16"):
            assert check_kernel(name, config(model__num_shared_experts=1).model, precision, CPU) is None


@pytest.fixture
def gpu_with_libraries(monkeypatch):
    """A machine with a card, Triton and Liger as far as the choice can see; the check finds what `faults` says."""
    found, faults = {"triton": object(), "liger_kernel": object()}, {}
    monkeypatch.setattr(kernel_choice.importlib.util, "find_spec", lambda name: found.get(name))
    monkeypatch.setattr(kernel_choice, "check_kernel", lambda name, *_: faults.get(name))
    return found, faults


def test_automatic_choice(gpu_with_libraries):
    found, faults = gpu_with_libraries
    assert choose_kernels(config(), "cpu", "fp32").reason == "none, because they are for CUDA GPUs"
    off = choose_kernels(config(train__fused_kernels="off"), "cuda", "bf16")
    assert (off.names, off.reason) == ((), "none, because of train.fused_kernels off")
    # debug has neither a dense layer nor shared experts, so no SwiGLU of ours.
    choice = choose_kernels(config(), "cuda", "bf16")
    assert choice.names == ("rms_norm", "rope", "cross_entropy", "combine")
    assert choice.kernels.rope is fused_kernels.liger_rope and choice.kernels.swiglu is PLAIN.swiglu
    faults["rope"] = "it differs from plain PyTorch by 1.0e+00 in torch.bfloat16, above 1e-02"
    choice = choose_kernels(config(train__loss_chunk_tokens=64), "cuda", "bf16")
    assert choice.names == ("rms_norm", "combine") and choice.kernels.rope is PLAIN.rope
    assert choice.reason == (
        "rms_norm, combine, which compute here what plain PyTorch does; rope plain: it differs from plain PyTorch by "
        "1.0e+00 in torch.bfloat16, above 1e-02"
    )
    found["liger_kernel"] = None
    choice = choose_kernels(config(model__num_shared_experts=1), "cuda", "bf16")
    assert choice.names == ("combine",)
    assert "rms_norm, rope, swiglu, cross_entropy plain: the package liger-kernel is not installed" in choice.reason


def test_the_compiler_fuses_by_itself(gpu_with_libraries):
    assert "torch.compile" in choose_kernels(config(train__compile="on"), "cuda", "bf16").reason
    named = config(train__compile="on", train__fused_kernels="rope")
    assert choose_kernels(named, "cuda", "bf16").names == ("rope",)


def test_what_was_asked_for_and_is_not_possible_ends_the_run(gpu_with_libraries):
    found, faults = gpu_with_libraries
    with pytest.raises(MachineError, match="kernel rope is not possible: it needs a CUDA GPU and this run is on cpu;"):
        choose_kernels(config(train__fused_kernels="rope"), "cpu", "fp32")
    faults["rms_norm"] = "it differs from plain PyTorch by 3.0e-01 in torch.bfloat16, above 1e-02"
    with pytest.raises(MachineError, match="rms_norm is not possible: it differs from plain PyTorch by 3"):
        choose_kernels(config(train__fused_kernels="on"), "cuda", "bf16")
    assert choose_kernels(config(train__fused_kernels="rope,combine"), "cuda", "bf16").names == ("rope", "combine")
    found["triton"] = None
    with pytest.raises(MachineError, match=r"Triton is not installed \(pip install triton\)"):
        choose_kernels(config(train__fused_kernels=["combine"]), "cuda", "bf16", compares=False)


def test_the_field_takes_words_and_names():
    for given, read in ((True, "on"), (False, "off"), ("auto", "auto"), ("rope", ["rope"])):
        assert config(train__fused_kernels=given).train.fused_kernels == read
    with pytest.raises(ConfigError, match="rmsnorm"):
        config(train__fused_kernels="rope,rmsnorm")
    with pytest.raises(ConfigError, match=r"cuts its chunks itself, and train\.loss_chunk_tokens is 64"):
        config(train__fused_kernels="cross_entropy", train__loss_chunk_tokens=64)
    config(train__fused_kernels="rope", train__loss_chunk_tokens=64)
