"""`lumina plan --model`: counts against transformers, states against real DeepSpeed engines, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.tensors import num_parameters
from lumina_ds.export.count_foreign import model_of
from lumina_ds.export.planned_config import planned_model
from lumina_ds.plan.foreign_states import filled_in, foreign_states

LLAMA = {
    "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_31 = LLAMA | {"rope_theta": 5e5, "max_position_embeddings": 131072, "vocab_size": 128256} | {
    "rope_scaling": {**LLAMA_3, "original_max_position_embeddings": 8192}
}  # fmt: skip
QWEN = LLAMA | {
    "model_type": "qwen3",
    "head_dim": 128,
    "vocab_size": 151936,
    "attention_bias": False,
    "sliding_window": None,
}
QWEN_MOE = QWEN | {
    "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}


def shape(layers: int, width: int, heads: int, kv_heads: int, inner: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": inner, **more,
    }  # fmt: skip


# Published shapes, with the parameters that their makers tell, in billions, as far as they are rounded there.
PUBLISHED = {
    "Llama-2-7b": (LLAMA | shape(32, 4096, 32, 32, 11008, vocab_size=32000), 6.74),
    "Llama-2-13b": (LLAMA | shape(40, 5120, 40, 40, 13824, vocab_size=32000), 13.02),
    "Llama-2-70b": (LLAMA | shape(80, 8192, 64, 8, 28672, vocab_size=32000), 68.98),
    "Llama-3.1-8B": (LLAMA_31 | shape(32, 4096, 32, 8, 14336), 8.03),
    "Llama-3.1-70B": (LLAMA_31 | shape(80, 8192, 64, 8, 28672), 70.6),
    "Llama-3.1-405B": (LLAMA_31 | shape(126, 16384, 128, 8, 53248), 406),
    "Llama-3.2-1B": (LLAMA_31 | shape(16, 2048, 32, 8, 8192, head_dim=64, tie_word_embeddings=True), 1.24),
    "Llama-3.2-3B": (LLAMA_31 | shape(28, 3072, 24, 8, 8192, head_dim=128, tie_word_embeddings=True), 3.21),
    "Mistral-7B-v0.1": (LLAMA | shape(32, 4096, 32, 8, 14336, vocab_size=32000, model_type="mistral", sliding_window=4096), 7.24),
    "Mistral-Nemo": (LLAMA | shape(40, 5120, 32, 8, 14336, head_dim=128, vocab_size=131072, model_type="mistral"), 12.2),
    "Mixtral-8x7B": (MIXTRAL | shape(32, 4096, 32, 8, 14336, vocab_size=32000), 46.7),
    "Mixtral-8x22B": (MIXTRAL | shape(56, 6144, 48, 8, 16384, vocab_size=32768), 141),
    "Qwen3-0.6B": (QWEN | shape(28, 1024, 16, 8, 3072, tie_word_embeddings=True), 0.596),
    "Qwen3-1.7B": (QWEN | shape(28, 2048, 16, 8, 6144, tie_word_embeddings=True), 1.72),
    "Qwen3-4B": (QWEN | shape(36, 2560, 32, 8, 9728, tie_word_embeddings=True), 4.02),
    "Qwen3-8B": (QWEN | shape(36, 4096, 32, 8, 12288), 8.19),
    "Qwen3-14B": (QWEN | shape(40, 5120, 40, 8, 17408), 14.8),
    "Qwen3-32B": (QWEN | shape(64, 5120, 64, 8, 25600), 32.8),
    "Qwen3-30B-A3B": (QWEN_MOE | shape(48, 2048, 32, 4, 6144, moe_intermediate_size=768), 30.5),
    "Qwen3-235B-A22B": (QWEN_MOE | shape(94, 4096, 64, 4, 12288, moe_intermediate_size=1536), 235),
}  # fmt: skip

TINY = shape(2, 64, 4, 2, 96, vocab_size=320, max_position_embeddings=128)
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
# Families that are not ours, small: biases, two norms a block, soft caps, experts beside a shared one, latent attention.
FOREIGN = {
    "qwen2": TINY,
    "gemma2": {**TINY, "head_dim": 16, "tie_word_embeddings": True},
    "olmo2": TINY,
    "phi3": {**TINY, "pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320},
    "qwen2_moe": {**TINY, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 96},
    "olmoe": {**TINY, "num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {**TINY, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 16, "attention_bias": True},
    "deepseek_v3": {
        **TINY, **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
    },
    "stablelm": {**TINY, "use_qkv_bias": True},
}  # fmt: skip


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def counted_here(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """What count_foreign prints, without a process of its own for each."""
    pytest.importorskip("transformers")
    from lumina_ds.export.count_foreign import tensors_of

    return lambda name, config: tensors_of(str(write(tmp_path_factory.mktemp("counted") / name, config)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_count_as_transformers_counts_them(name: str, tmp_path: Path, counted_here: Any) -> None:
    config, billions = PUBLISHED[name]
    found = planned_model(write(tmp_path / name, config))
    assert found.model is not None and found.name == name
    ours = num_parameters(found.model)
    assert ours == sum(prod(shape) for _, shape, _ in counted_here(name, config)["tensors"])
    assert ours / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_native_family_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", PUBLISHED["Llama-3.1-8B"][0])
    script = (
        "import sys; from lumina_ds.cli.main import cli, run_command\n"
        f"assert run_command(cli, ['plan', '--model', {str(folder)!r}, '--gpus', '8', '--zero', '3']) == 0\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'pyarrow'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "m: 8.03B parameters" in done.stdout and "1 x 4096 tokens" in done.stdout.replace("\n", " ")
    assert "takes no memory, and lumina train does not compute it: rope_scaling {" in done.stderr


def on_two_ranks(script: Path, result: Path, cases: Path) -> Any:
    """What rank 0 of the script wrote. Ranks of their own: transformers in a process forked with torch in it stands still
    where OpenMP has threads."""
    from lumina_ds.engine.world import free_port

    group = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, str(script), str(result), str(cases)]
    ranks = [
        subprocess.Popen(
            words, env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=600)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][-3000:] + said[1][-3000:]
    return json.loads(result.read_text())


@pytest.mark.faults
def test_states_of_other_families_are_those_of_real_engines(tmp_path: Path, counted_here: Any) -> None:
    """To the byte: parameters, master weights, moments and gradients at ZeRO 1 to 3 on two ranks, some parts frozen."""
    cases, planned = [], []
    for number, (family, config) in enumerate(FOREIGN.items()):
        folder = write(tmp_path / family, {"model_type": family, **config})
        assert planned_model(folder).model is None
        whole = model_of(family, family, counted_here(family, {"model_type": family, **config}))
        for stage in (1, 2, 3):
            zero = {
                "stage": stage,
                "reduce_bucket_size": 4096,
                "overlap_comm": False,
                "stage3_param_persistence_threshold": 100,
            }
            embedding = next(tensor.name for tensor in whole.tensors if tensor.kind == "embedding")
            model = whole.frozen_by([embedding] if number % 2 and not whole.tied else [])
            states = foreign_states(model, 2, "bf16", {"zero_optimization": zero})
            planned.append([states.parameters, states.master_weights, states.moments, states.step_gradients])
            plain = [one.name for one in model.tensors if one.kind == "norm" or one.name.endswith("bias")]
            cases.append({"folder": str(folder), "frozen": sorted(model.frozen), "plain": plain, "zero": zero})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("foreign_states_worker.py")
    measured = on_two_ranks(script, tmp_path / "result.json", tmp_path / "cases.json")
    names = [(Path(case["folder"]).name, case["zero"]["stage"]) for case in cases]
    assert dict(zip(names, planned, strict=True)) == dict(zip(names, measured, strict=True))


def test_kinds_and_the_largest_layer(counted_here: Any) -> None:
    found = model_of("x", "qwen2_moe", counted_here("x", {"model_type": "qwen2_moe", **FOREIGN["qwen2_moe"]}))
    experts, shared = 4 * 3 * 64 * 48, 3 * 64 * 96
    assert found.kinds == {
        "embedding": 320 * 64, "head": 320 * 64, "norm": 5 * 64, "experts": 2 * experts, "shared_experts": 2 * shared,
        "router": 2 * (4 * 64 + 64), "attention": 2 * (2 * 64 * 64 + 2 * 64 * 32 + 64 + 2 * 32),
    }  # fmt: skip
    assert found.largest_layer == ("model.layers.0", (found.total - found.kinds["embedding"] - 320 * 64 - 64) // 2)
    half = found.frozen_by(["*.experts.*", "*.shared_expert.*"])
    assert half.trainable == found.total - 2 * (experts + shared)


def test_auto_is_filled_in_as_trainer_does() -> None:
    json = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}}
    assert filled_in(json, 100)["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 10_000,
        "stage3_prefetch_bucket_size": 9_000,
    }


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["meta-llama/Llama-3.1-8B"], 2, "`hf download meta-llama/Llama-3.1-8B config.json --local-dir Llama-3.1-8B`"),
        (["nowhere"], 2, "there is no nowhere; give config.json"),
        (["qwen2", "--seq-length", "128"], 2, "--seq-length: of a qwen2, which lumina does not train, only the states"),
        (["qwen2", "--gpu", "h100", "--micro-batch", "2"], 2, "--gpu, --micro-batch: of a qwen2"),
        (["qwen2", "--zero", "0"], 2, "ZeRO 0 in bf16 is not planned; set --zero to 1 or 2 or 3"),
        (["qwen2", "--zero", "2", "--offload", "optimizer+params"], 2, "set --zero to 3"),
        (["qwen2", "--freeze", "*.expert.*"], 2, "--freeze *.expert.* matches no parameter of qwen2"),
        (["qwen2", "--freeze", "*"], 2, "--freeze * leaves nothing of qwen2 to train"),
        (["llama", "--freeze", "*"], 2, "--freeze: training freezes no part of a llama yet"),
        (["llama", "--write", "out"], 2, "--write goes with --config: run `lumina import"),
        (["unknown"], 2, "transformers cannot build it: ValueError: "),
        (["wrong"], 2, "config.json has hidden_size 'x', and it must be a whole number"),
        (["list"], 2, "has no model_type; give the config.json of a model"),
        (["bert"], 2, "transformers cannot build it"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    words: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    tiny = {**LLAMA, **TINY}
    for name, config in {
        "qwen2": {"model_type": "qwen2", **FOREIGN["qwen2"]}, "llama": tiny, "wrong": tiny | {"hidden_size": "x"},
        "unknown": tiny | {"model_type": "not_a_model"}, "bert": {"model_type": "vit"},
    }.items():  # fmt: skip
        write(tmp_path / name, config)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1]")
    assert run_command(cli, ["plan", "--model", *words]) == code
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error


def test_json_and_the_table(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("transformers")
    folder = write(tmp_path / "x", {"model_type": "qwen2", **FOREIGN["qwen2"]})
    assert run_command(cli, ["plan", "--model", str(folder), "--gpus", "8", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [states["stage"] for states in record["states"]] == [1, 2, 3] and record["activations"] is None
    assert run_command(cli, ["plan", "--model", str(folder), "--gpus", "8", "--precision", "fp32"]) == 0
    printed = capsys.readouterr().out
    assert "counted by" in printed and "ZeRO 0 " in printed and "without activations" in printed
