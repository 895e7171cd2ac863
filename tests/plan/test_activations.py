"""The activation formulas against the bytes that are really alive after a forward pass, and at a loss's peak."""

from __future__ import annotations

import weakref

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from lumina_ds.config.schema import ModelConfig  # noqa: E402
from lumina_ds.model import cpu_products  # noqa: E402
from lumina_ds.model.attention_backends import DocumentLayout  # noqa: E402
from lumina_ds.model.init import initialize  # noqa: E402
from lumina_ds.model.loss import LanguageHead  # noqa: E402
from lumina_ds.model.transformer import CausalLM  # noqa: E402
from lumina_ds.plan.activations import RANDOM_STATE_BYTES, activation_bytes, recomputed_layers  # noqa: E402
from lumina_ds.plan.loss_memory import fused_chunk_tokens  # noqa: E402
from lumina_ds.plan.shape import Shape  # noqa: E402

DENSE = ModelConfig(
    vocab_size=512, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=700,
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are alive: now, and the most so far."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.known.setdefault(tensor.untyped_storage(), 0)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known[storage] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size):
        self.now -= size


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("mode, interval", [("none", 1), ("full", 1), ("attention", 1), ("experts", 1), ("full", 2)])
def test_activations_equal_what_is_alive_after_the_forward(precision, mode, interval):
    model = CausalLM(DENSE, activation_checkpointing=mode, checkpoint_interval=interval).to(DTYPES[precision])
    ids, positions = torch.zeros(2, 256, dtype=torch.long), torch.arange(256).expand(2, 256)
    documents = DocumentLayout.from_lengths((128, 128, 128, 128))
    with LiveBytes() as live:
        hidden, _ = model.model(ids, positions, documents)
    planned = activation_bytes(DENSE, Shape(512, precision, mode, interval, device="cpu"))
    # The states of random numbers are made out of this mode's sight.
    parts = len(recomputed_layers(DENSE, mode, interval))
    total = planned.attention + planned.feed_forward + planned.other - RANDOM_STATE_BYTES * parts
    assert live.now == pytest.approx(total, rel=0.001)
    del hidden


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("num_experts, top_k, width", [(4, 2, 100), (16, 2, 104), (4, 1, 304)])
def test_activations_of_experts_equal_what_is_alive(precision, num_experts, top_k, width):
    shape = {"num_experts": num_experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width}
    mixture = ModelConfig.model_validate(DENSE.model_dump() | shape)
    model = CausalLM(mixture)
    initialize(model, mixture, seed=0)
    model = model.to(DTYPES[precision])
    ids, positions = torch.arange(512).view(2, 256), torch.arange(256).expand(2, 256)
    with LiveBytes() as live:
        outputs = model.model(ids, positions, DocumentLayout.from_lengths((128, 128, 128, 128)))
    planned = activation_bytes(mixture, Shape(512, precision, device="cpu"))
    assert live.now == pytest.approx(planned.attention + planned.feed_forward + planned.other, rel=0.002)
    del outputs


def test_the_loss_that_may_be_fused_counts_the_larger_one():
    """By hand: with as many ids as the model is wide, Liger takes all rows at once: 2 r d T + (4 + b) V d + b V T."""
    square = DENSE.model_copy(update={"vocab_size": 256})
    assert activation_bytes(square, Shape(64, "bf16", fused_loss=True)).loss == (
        2 * 2 * 256 * 64 + 6 * 256 * 256 + 2 * 256 * 64
    )
    # In mixed_bf16 a copy of the states and its gradient, and one of the weight.
    assert activation_bytes(square, Shape(64, "mixed_bf16", fused_loss=True)).loss == (
        2 * (4 + 2) * 256 * 64 + 2 * 256 * 256 + 6 * 256 * 256 + 2 * 256 * 64
    )
    wide = DENSE.model_copy(update={"vocab_size": 32_000})
    plain = activation_bytes(wide, Shape(4096, "bf16")).loss
    assert activation_bytes(wide, Shape(4096, "bf16", fused_loss=True)).loss == plain
    # 125 parts of 4096 rows are 33, rounded up to a power of two.
    assert fused_chunk_tokens(wide, 4096) == 64


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("chunk", [0, 64, 200, 4096])
def test_the_loss_peaks_where_the_plan_says(precision, chunk, monkeypatch):
    # Not the plan's subject: some CPUs multiply in fp32 and copy the weight for it.
    monkeypatch.setattr(cpu_products, "_fp32_is_faster", lambda: False)
    model = DENSE.model_copy(update={"vocab_size": 1000})
    head = LanguageHead(256, 1000, chunk).to(DTYPES[precision])
    hidden = torch.randn(2, 256, 256, dtype=DTYPES[precision]).requires_grad_()
    labels = torch.randint(1000, (2, 256))
    with LiveBytes() as live:
        head(hidden, labels).backward()
    planned = activation_bytes(model, Shape(512, precision, loss_chunk=chunk, device="cpu")).loss
    assert live.peak == pytest.approx(planned, rel=0.02 if chunk else 0.06), (live.peak, planned)
