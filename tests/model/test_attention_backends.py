"""Every attention kernel against the one with the whole mask, forward and backward, and which one a run gets."""

import pytest
import torch

from lumina_ds.config import attention
from lumina_ds.config.attention import ATTENTION_BACKENDS
from lumina_ds.config.load import Override, load_config
from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.model import attention_backends
from lumina_ds.model.attention_backends import DocumentLayout, choose_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Two rows of 96: a document of one token, neighbours of equal length, padding at the end of a row.
LENGTHS = (1, 40, 40, 15, 70, 26)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def config(*overrides):
    return load_config("debug", [Override(name, value, name) for name, value in overrides]).config


def attend(name, dtype, device="cpu", backward=True, lengths=LENGTHS):
    """Output and gradients of q, k, v for fixed random inputs: 4 query heads, 2 key heads of width 16."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(sum(lengths), heads, 16, generator=generator) for heads in (4, 2, 2, 4)]
    *inputs, upstream = (x.to(device, dtype) for x in drawn)
    for x in inputs:
        x.requires_grad_(backward)
    out = ATTENTION_BACKENDS[name].load()(*inputs, DocumentLayout.from_lengths(lengths, device))
    if not backward:
        return [out]
    out.backward(upstream)
    return [out.detach(), *(x.grad for x in inputs)]


def assert_equals_reference(name, dtype, device="cpu", backward=True):
    expected = attend("reference", torch.float32, device, backward)
    for part, found, wanted in zip("oqkv", attend(name, dtype, device, backward), expected, strict=False):
        assert found.dtype == dtype
        difference = ((found.float() - wanted).norm() / wanted.norm()).item()
        assert difference < TOLERANCE[dtype], (part, difference)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sdpa_equals_the_reference(dtype):
    assert_equals_reference("sdpa", dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_flex_equals_the_reference_forward(dtype):
    assert_equals_reference("flex", dtype, backward=False)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("name", ["flash", "varlen", "flex"])
def test_gpu_kernels_equal_the_reference(name):
    if name == "flash":
        pytest.importorskip("flash_attn", reason="needs flash-attn")
    assert_equals_reference(name, torch.bfloat16, "cuda")


def test_the_reference_itself_by_hand():
    """One head of width one: softmax of q k over the document's earlier tokens, written out."""
    q, k, v = (torch.tensor(values).view(-1, 1, 1) for values in ([2.0, 0.0, 5.0], [1.0, 3.0, 9.0], [10.0, 20.0, 70.0]))
    out = ATTENTION_BACKENDS["reference"].load()(q, k, v, DocumentLayout.from_lengths((2, 1)))
    # Token 0 sees itself; token 1 weighs both alike, since its query is 0; token 2 begins a document.
    assert out.flatten().tolist() == [10.0, 15.0, 70.0]


def test_varlen_is_called_as_each_torch_spells_it(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def early(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False): ...
    def middle(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)): ...
    def late(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False): ...

    wanted = [{"is_causal": True}, {"window_size": (-1, 0)}, {"window_size": (-1, 0), "enable_gqa": True}]
    for function, options in zip((early, middle, late), wanted, strict=True):
        monkeypatch.setattr(varlen, "varlen_attn", function)
        attention_backends.varlen_options.cache_clear()
        assert attention_backends.varlen_options() == options
    attention_backends.varlen_options.cache_clear()


def test_automatic_choice_on_a_cpu():
    assert choose_attention(config(), "cpu", "fp32").reason == "sdpa because rows of 256 tokens are not above 512"
    long = config(("model.max_position_embeddings", 1024))
    choice = choose_attention(long, "cpu", "bf16")
    assert choice.backend == "sdpa" and "needs a CUDA GPU and this run is on cpu" in choice.reason
    off = config(("train.flash_attention", "off"), ("model.max_position_embeddings", 1024))
    assert choose_attention(off, "cuda", "bf16").reason == "sdpa because of --flash-attention off"
    assert choose_attention(config(("train.attention_backend", "reference")), "cpu", "fp32").backend == "reference"


def test_automatic_choice_on_a_gpu(monkeypatch):
    """The rule itself, with a card and packages as they are asked for."""
    found = {"flash_attn": None, "torch.nn.attention.varlen": object(), "triton": object()}
    monkeypatch.setattr(attention, "find_spec", found.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    long = config(("model.max_position_embeddings", 513))
    assert choose_attention(long, "cuda", "bf16").backend == "varlen"
    assert choose_attention(config(("model.max_position_embeddings", 512)), "cuda", "bf16").backend == "sdpa"
    assert "take fp16 or bf16, not fp32" in choose_attention(long, "cuda", "fp32").reason
    assert choose_attention(config(("train.flash_attention", "on")), "cuda", "fp16").backend == "varlen"
    found["flash_attn"] = object()
    assert choose_attention(long, "cuda", "mixed_bf16").backend == "flash"
    assert choose_attention(config(("train.attention_backend", "flex")), "cuda", "fp32").backend == "flex"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0" in choose_attention(long, "cuda", "fp16").reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    wide = config(("model.max_position_embeddings", 513), ("model.head_dim", 320))
    assert "head widths up to 256 that 8 divides, not 320" in choose_attention(wide, "cuda", "bf16").reason


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([("train.flash_attention", "on")], "--flash-attention on is not possible: it needs a CUDA GPU"),
        ([("train.attention_backend", "flash")], "attention_backend flash is not possible: it needs a CUDA GPU"),
        ([("train.attention_backend", "varlen")], "attention_backend varlen is not possible: it needs a CUDA GPU"),
        ([("train.attention_backend", "flex")], "flex_attention has no backward pass on a CPU; use .* auto or sdpa"),
    ],
)
def test_what_cannot_run_here_says_so(overrides, message):
    with pytest.raises(MachineError, match=message):
        choose_attention(config(*overrides), "cpu", "bf16")


def test_contradicting_options_are_refused():
    with pytest.raises(ConfigError, match="attention_backend is sdpa and --flash-attention is on"):
        config(("train.attention_backend", "sdpa"), ("train.flash_attention", "on"))
    config(("train.attention_backend", "varlen"), ("train.flash_attention", "on"))
