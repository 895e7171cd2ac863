"""lm-eval, as a user runs it, on an exported folder and a task of local files: no network, and numbers that agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lumina_ds.config.schema import ModelConfig
from lumina_ds.export.folder import export_model
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
transformers = pytest.importorskip("transformers")

MODEL = ModelConfig(
    vocab_size=400, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    max_position_embeddings=64, initializer_range=0.2, num_experts=4, moe_intermediate_size=32,
    tie_word_embeddings=True,
)  # fmt: skip
QUESTIONS = [(f"what is {a} plus {a + 1}?", [f" {2 * a + 1}", f" about {a}"]) for a in range(6)]


def write_task(folder: Path) -> None:
    folder.mkdir()
    lines = [json.dumps({"question": asked, "choices": choices, "answer": 0}) for asked, choices in QUESTIONS]
    (folder / "sums.jsonl").write_text("\n".join(lines) + "\n")
    task = {
        "task": "local_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "local_sums.yaml").write_text(yaml.safe_dump(task))


def log_likelihood(network: CausalLM, tokenizer, question: str, choice: str) -> float:
    """Of the choice's tokens after the question's, by our own model."""
    ids = tokenizer(question + choice)["input_ids"]
    begin = len(tokenizer(question)["input_ids"])
    log_p = network(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(float(log_p[place - 1, ids[place]]) for place in range(begin, len(ids)))


@pytest.mark.slow
def test_lm_eval_scores_an_exported_model_as_ours_does(corpus, tmp_path):
    network = CausalLM(MODEL).eval()
    initialize(network, MODEL, seed=1)
    from safetensors.torch import save_file

    weights = tmp_path / "weights"
    weights.mkdir()
    tensors = {name: parameter.detach().contiguous() for name, parameter in network.named_parameters()}
    save_file(tensors, weights / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))
    export_model(MODEL, weights, corpus.tokenizer, tmp_path / "exported")
    write_task(tmp_path / "tasks")
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf"]
    command += ["--model_args", f"pretrained={tmp_path}/exported,dtype=float32"]
    command += ["--device", "cpu", "--include_path", f"{tmp_path}/tasks", "--tasks", "local_sums", "--log_samples"]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")],
        env=os.environ | offline | {"HF_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = (tmp_path / "out").rglob("results_*.json")
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    records = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda each: each["doc_id"])
    right = 0
    with torch.no_grad():
        for (question, choices), record in zip(QUESTIONS, records, strict=True):
            ours = [log_likelihood(network, tokenizer, question, choice) for choice in choices]
            theirs = [float(answer[0]) for answer in record["filtered_resps"]]
            assert theirs == pytest.approx(ours, rel=1e-4)
            right += ours[0] > ours[1]
    accuracy = json.loads(results.read_text())["results"]["local_sums"]["acc,none"]
    assert accuracy == pytest.approx(right / len(QUESTIONS))
