"""Fused kernels under Triton's interpreter, on CPU tensors: each beside ours, and a model that uses all of Liger's.

Writes {"checks": {name: {precision: fault or None}}, "models": {case: {"reason", "difference"}}}. Needs TRITON_INTERPRET=1.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from lumina_ds.config.load import Override, load_config
from lumina_ds.model.attention_backends import DocumentLayout
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM

# The interpreter cannot multiply in bf16, as Liger's SwiGLU does; the other kernels compute in fp32.
CHECKED = {
    "rms_norm": ("fp32", "fp16", "bf16", "mixed_bf16"),
    "rope": ("fp32", "fp16", "bf16", "mixed_bf16"),
    "swiglu": ("fp32", "fp16"),
    "cross_entropy": ("fp32", "fp16", "bf16", "mixed_bf16"),
    "combine": ("fp32", "fp16", "bf16"),
}
SHAPE = {
    "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "num_hidden_layers": 2,
    "vocab_size": 300, "qk_norm": True, "first_k_dense_layers": 1, "intermediate_size": 40, "num_shared_experts": 1,
}  # fmt: skip


def run_config(**train):
    values = {f"model.{name}": value for name, value in SHAPE.items()} | {
        f"train.{name}": value for name, value in train.items()
    }
    return load_config("debug", [Override(name, value, name) for name, value in values.items()]).config


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


def complete_interpreter():
    """What compiled kernels have and the interpreter lacks: scalars with methods, CUDA's rsqrt, masks of one element."""
    from liger_kernel.ops import rms_norm

    rms_norm.rsqrt = rsqrt
    convert = interpreter._implicit_cvt

    def with_floats(value):
        if not isinstance(value, float):
            return convert(value)
        array = torch.tensor([value], dtype=torch.float32).numpy()
        return tl.tensor(interpreter.TensorHandle(array, tl.float32), tl.float32)

    interpreter._implicit_cvt = with_floats
    splat = interpreter.InterpreterBuilder.create_splat

    def with_masks(self, shape, value):
        handle = splat(self, shape, value)
        if value.data.dtype == bool:
            handle.data = handle.data.astype(bool)
        return handle

    interpreter.InterpreterBuilder.create_splat = with_masks


def define_deepspeed_kernels():
    """DeepSpeed defines its kernels where Triton finds a GPU, at the import; here the interpreter takes its place."""
    from deepspeed.ops.triton_ops import _triton, autoep_fused_token_ops

    _triton._TRITON_AVAILABLE = True
    importlib.reload(autoep_fused_token_ops)


def loss_and_gradients(config, kernels, precision):
    torch.manual_seed(0)
    model = CausalLM(config.model, activation_checkpointing=config.train.activation_checkpointing, kernels=kernels)
    initialize(model, config.model, 0)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    ids = torch.randint(0, 300, (2, 24))
    labels = ids.roll(-1, 1).masked_fill(torch.arange(24) % 5 == 0, -100)
    positions = torch.cat([torch.arange(7), torch.arange(17), torch.arange(20), torch.arange(4)]).view(2, 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed_bf16"):
        loss, *_ = model(ids, positions, DocumentLayout.from_lengths((7, 17, 20, 4)), labels)
    (loss / 100).backward()
    with torch.no_grad():
        evaluated, *_ = model(ids, positions, DocumentLayout.from_lengths((7, 17, 20, 4)), labels)
    return [loss.detach(), evaluated, *(parameter.grad for parameter in model.parameters())]


def model_difference(precision, names="rms_norm,rope,swiglu,cross_entropy", **train):
    from lumina_ds.engine.kernel_choice import choose_kernels
    from lumina_ds.model.kernels import PLAIN

    config = run_config(fused_kernels=names, **train)
    choice = choose_kernels(config, "cpu", precision)
    found = loss_and_gradients(config, choice.kernels, precision)
    expected = loss_and_gradients(config, PLAIN, precision)
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True)]
    return {"reason": choice.reason, "difference": max(float((a - b).norm() / a.norm()) for a, b in pairs)}


def main(result):
    from lumina_ds.engine.kernel_choice import check_kernel

    complete_interpreter()
    define_deepspeed_kernels()
    model, device = run_config().model, torch.device("cpu")
    checks = {
        name: {precision: check_kernel(name, model, precision, device) for precision in precisions}
        for name, precisions in CHECKED.items()
    }
    models = {
        "fp32, recomputed": model_difference("fp32", activation_checkpointing="full"),
        "mixed_bf16": model_difference("mixed_bf16", "rms_norm,rope,cross_entropy"),
    }
    Path(result).write_text(json.dumps({"checks": checks, "models": models}))


if __name__ == "__main__":
    main(sys.argv[1])
