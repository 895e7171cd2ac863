"""A checkpoint is answered with, evaluated and exported by the chat template that it was trained with."""

import json

import pytest
from manifests import make_manifest
from safetensors.torch import save_file

from lumina_ds.cli.main import cli, run_command
from lumina_ds.cli.model_source import load_run
from lumina_ds.config.chat_templates import TEMPLATES, ChatTemplate, template_digest
from lumina_ds.config.schema import ModelConfig, RunConfig
from lumina_ds.data.conversation import Turn
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import CheckpointError
from lumina_ds.files import file_digest
from lumina_ds.generate import chat
from lumina_ds.generate.chat import stream_reply
from lumina_ds.generate.history import History
from lumina_ds.generate.sampling import SamplingSettings
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM

MODEL = ModelConfig(
    vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, num_experts=2, moe_intermediate_size=8,
)  # fmt: skip
TOY = ChatTemplate(
    before={"system": ("<|system|>",), "user": ("<|end|>", "<|user|>"), "assistant": ("<|end|>", "<|assistant|>")},
    after={"system": (), "user": (), "assistant": ("<|end|>",)},
    bos=False,
)


@pytest.fixture
def step(corpus, tmp_path, monkeypatch):
    """A step folder, without training, of a run with the toy."""
    monkeypatch.setitem(TEMPLATES, "toy", TOY)
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    model = CausalLM(MODEL)
    initialize(model, MODEL, seed=0)
    save_file(dict(model.named_parameters()), folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys((name for name, _ in model.named_parameters()), "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer.model").write_bytes(corpus.tokenizer.read_bytes())
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in sorted(folder.iterdir())
    }
    manifest = make_manifest(
        RunConfig(model=MODEL), files=files, step=1, template={"sha256": template_digest("toy")},
        tokenizer={"sha256": Tokenizer.load(corpus.tokenizer).digest},
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.sealed())
    return folder


def test_a_reply_follows_the_runs_own_prompt(step, monkeypatch):
    loaded, manifest = load_run(step, "fp32")
    assert loaded.template == TOY and manifest["template"] == "toy"
    (content,) = loaded.tokenizer.encode_batch(["what is 1 plus 1?"])
    end, user, assistant = (loaded.tokenizer.ids_of([name])[0] for name in ("<|end|>", "<|user|>", "<|assistant|>"))
    seen = []
    real = chat.generate_ids

    def watched(model, ids, *others):
        seen.append(list(ids))
        return real(model, ids, *others)

    monkeypatch.setattr(chat, "generate_ids", watched)
    script = iter([content[0], end, content[1]])
    monkeypatch.setattr(chat, "sample", lambda logits, settings, generator: next(script))
    reply = "".join(stream_reply(loaded, [Turn("user", "what is 1 plus 1?")], SamplingSettings()))
    assert seen == [[end, user, *content, end, assistant]] and reply == loaded.tokenizer.decode(content[:1])
    history = History(loaded.tokenizer, len(content) + 5, template=TOY)
    history.ask("what is 1 plus 1?")
    assert history.prompt == [Turn("user", "what is 1 plus 1?")]


def test_shards_of_another_template_are_not_evaluated(step, corpus, lumina, tmp_path, capsys):
    words = ["evaluate", str(step), "--inference-precision", "fp32", "--data"]
    assert run_command(cli, [*words, str(corpus.eval_shards)]) == 3
    assert "trained with toy; preprocess it with --chat-template toy" in capsys.readouterr().err
    options = ["--tokenizer", corpus.tokenizer, "--seq-length", 64, "--out", tmp_path / "own"]
    lumina("preprocess", corpus.eval, *options, "--chat-template", "toy")
    assert run_command(cli, [*words, str(tmp_path / "own")]) == 0


def test_an_export_refuses_it_before_it_writes(step, tmp_path, capsys):
    assert run_command(cli, ["export", str(step), "--out", str(tmp_path / "out")]) == 2
    assert "chat template toy, and only lumina-chat-1 can be exported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_template_that_is_gone_is_named(step, monkeypatch, tmp_path, capsys):
    digest = template_digest("toy")
    monkeypatch.delitem(TEMPLATES, "toy")
    with pytest.raises(CheckpointError, match=f"unknown here \\(digest {digest[:12]}\\); add its entry"):
        load_run(step, "fp32")
    assert run_command(cli, ["export", str(step), "--out", str(tmp_path / "out")]) == 5
    assert "unknown here" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_step_with_a_models_own_template_answers_and_exports(step, tmp_path, capsys, lumina):
    """chat_template.json lies in the step folder; without it, or with another, the digest in the manifest is unknown."""
    from lumina_ds.data.templates.find import certified_template, stored_text

    (tmp_path / "own.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = Tokenizer.load(step / "tokenizer.model")
    own = certified_template(str(tmp_path / "own.jinja"), tokenizer)
    manifest = json.loads((step / "manifest.json").read_text())
    (step / "chat_template.json").write_text(stored_text(own.template))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in step.iterdir()}
    del files["manifest.json"]
    sealed = make_manifest(
        RunConfig(model=MODEL), files=files, step=1, template={"sha256": own.digest}, tokenizer=manifest["tokenizer"]
    )
    (step / "manifest.json").write_text(sealed.sealed())
    loaded, known = load_run(step, "fp32")
    assert (
        loaded.template == own.template and loaded.stop_ids == {tokenizer.end_id} and known["template"] == "own.jinja"
    )
    lumina("generate", step, "--prompt", "hi", "--max-new-tokens", "3")
    lumina("export", step, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == own.template.source
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.end_id and config["bos_token_id"] == tokenizer.bos_id
    (step / "chat_template.json").write_text(stored_text(own.template).replace("<|assistant|>", "<|user|>"))
    assert run_command(cli, ["generate", str(step), "--prompt", "hi"]) == 5
    assert "error" in capsys.readouterr().err
