"""A trained run through the command line: exported, generated from by transformers, imported, trained further."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lumina_ds.checkpoint.format import find_checkpoint, weight_files
from lumina_ds.checkpoint.manifest import read_manifest
from lumina_ds.cli.main import cli, run_command
from lumina_ds.data.chat_template import encode_conversations
from lumina_ds.data.conversation import Conversation, Turn
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.generate.load import load_model
from lumina_ds.monitor.writers import read_records

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

CHECKOUT = Path(__file__).parents[2]
MODEL = {
    "vocab_size": 408, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts": 4, "moe_intermediate_size": 32, "tie_word_embeddings": True,
}  # fmt: skip


def train(folder: Path, *arguments: object) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "lumina_ds", "train", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_a_run_goes_out_and_comes_back(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    settings = {"micro_batch_size": 2, "max_steps": 6, "learning_rate": 5e-3, "precision": "fp32"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"model": MODEL, "train": settings}))
    data = ("--data", corpus.shards, "--eval-shards", corpus.eval_shards, "--expert-parallel", 2)
    train(tmp_path, "--config", "tiny.yaml", *data, "--zero", 3, "--experiment-name", "first", "--", "--num_gpus", 2)
    before = read_records(tmp_path / "runs/first/evaluations.jsonl")
    assert before[-1]["loss"] < before[0]["loss"]

    assert run_command(cli, ["export", "runs/first", "--out", "out", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["step"] == 6 and shown["family"] == "mixtral" and shown["fast_tokenizer"]
    _logits_agree(tmp_path / "runs/first", tmp_path / "out")

    assert run_command(cli, ["import", "out", "--out", "start"]) == 0
    # One step at a learning rate that moves nothing: training starts at the exported loss, and saves it unchanged.
    train(
        tmp_path, "--config", "start/config.yaml", *data, "--zero", 2, "--experiment-name", "second", "--max-steps", 1,
        "--learning-rate", 1e-30, "--weight-decay", 0, "--precision", "fp32", "--", "--num_gpus", 2,
    )  # fmt: skip
    after = read_records(tmp_path / "runs/second/evaluations.jsonl")
    assert after[0]["step"] == 0
    assert after[0]["loss"] == pytest.approx(before[-1]["loss"], rel=1e-6)
    assert run_command(cli, ["export", "runs/second", "--out", "again"]) == 0
    _every_form_of_the_model_answers_alike(capsys)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def _every_form_of_the_model_answers_alike(capsys) -> None:
    """A run folder, the folder exported from it, and the folder imported from that; one prompt, and a file of them."""
    capsys.readouterr()
    asked = ["--temperature", "0", "--max-new-tokens", "8", "--inference-precision", "fp32"]
    replies = []
    for source in ("runs/first", "out", "start"):
        assert run_command(cli, ["generate", source, "--prompt", "what is 3 plus 4?", *asked, "--json"]) == 0
        replies.append(json.loads(capsys.readouterr().out))
    assert replies[0]["reply"] and {answer["reply"] for answer in replies} == {replies[0]["reply"]}
    assert [answer["step"] for answer in replies] == [6, None, None]
    Path("prompts.jsonl").write_text('{"prompt": "what is 3 plus 4?", "id": 1}\n{"prompt": "and one more?"}\n')
    assert run_command(cli, ["generate", "out", "--prompts", "prompts.jsonl", "--out", "replies.jsonl", *asked]) == 0
    first, second = (json.loads(line) for line in Path("replies.jsonl").read_text().splitlines())
    assert first == {"prompt": "what is 3 plus 4?", "id": 1, "reply": replies[0]["reply"]}
    assert second["prompt"] == "and one more?"


def _logits_agree(run: Path, exported: Path) -> None:
    """Ids, logits and generation of one conversation, by ours and by transformers."""
    checkpoint = find_checkpoint(run)
    shape = read_manifest(checkpoint).shape()
    ours = load_model(shape, weight_files(checkpoint), checkpoint / "tokenizer.model", "fp32")
    turns = (Turn("user", "what is 3 plus 4?"), Turn("assistant", "3 plus 4 is 7. <|end|> is a word"))
    [(ids, _)] = encode_conversations([Conversation(turns)], Tokenizer.load(checkpoint / "tokenizer.model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    assert tokenizer.apply_chat_template(messages, return_dict=False) == ids
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            ours.model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, rtol=1e-5, atol=1e-5
        )
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reply = theirs.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert reply.shape[1] > prompt["input_ids"].shape[1]
