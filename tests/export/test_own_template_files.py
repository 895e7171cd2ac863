"""A model with a chat template of its own: imported, answered with and exported, its template and special tokens kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from template_cases import CASES, write_tokenizer

from lumina_ds.cli.main import cli, run_command
from lumina_ds.cli.model_source import load_run
from lumina_ds.data.chat_template import encode_prompt
from lumina_ds.data.conversation import Turn
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.export.start_folder import import_model

QUESTION = [Turn("system", "Be brief."), Turn("user", "Who are you? <|im_end|>")]


def _model(folder: Path, name: str, template_in_config: bool = True) -> Path:
    """A tiny Llama that transformers saved, with the tokenizer and template of a case."""
    transformers = pytest.importorskip("transformers")
    path = write_tokenizer(CASES[name], folder)
    config = transformers.LlamaConfig(
        vocab_size=Tokenizer.load(path).without_markers().vocab_size, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    if not template_in_config:
        (folder / "chat_template.jinja").write_text(CASES[name].source)
        written = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**written, "chat_template": None}, indent=3))
    return folder


@pytest.mark.parametrize("template_in_config", [True, False])
def test_an_import_keeps_template_and_special_tokens_and_an_export_writes_them_back(
    template_in_config: bool, tmp_path: Path, lumina: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    source = _model(tmp_path / "source", "qwen-2.5", template_in_config)
    lumina("import", source, "--out", tmp_path / "start")
    assert "its own chat template and special tokens are kept" in capsys.readouterr().out
    made = json.loads((tmp_path / "start" / "import.json").read_text())
    assert made["num_added_rows"] == 0 and made["chat_template_fault"] is None
    assert "chat_template: auto" in (tmp_path / "start" / "config.yaml").read_text()
    lumina("export", tmp_path / "start", "--out", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", *(() if template_in_config else ("chat_template.jinja",))):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    assert (tmp_path / "out" / "chat_template.jinja").exists() is not template_in_config
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / "out" / name).read_text())
        assert ids["eos_token_id"] == tokenizer.special_tokens["<|im_end|>"]


@pytest.mark.parametrize("folder", ["start", "source"])
def test_a_reply_follows_the_models_own_prompt(
    folder: str, tmp_path: Path, lumina: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = _model(tmp_path / "source", "qwen-2.5")
    lumina("import", source, "--out", tmp_path / "start")
    loaded, known = load_run(tmp_path / folder, "fp32")
    end = loaded.tokenizer.special_tokens["<|im_end|>"]
    assert loaded.stop_ids == {end} and known["template"] == "auto"
    prompt = encode_prompt([Turn("user", "Who are you?")], loaded.tokenizer, loaded.template)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(source)
    asked = [{"role": "user", "content": "Who are you?"}]
    assert prompt == theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    spelled = encode_prompt(QUESTION, loaded.tokenizer, loaded.template)
    assert spelled.count(end) == 2, "the one in the text stays text"
    assert run_command(cli, ["generate", str(tmp_path / folder), "--prompt", "hi", "--max-new-tokens", "3"]) == 0


def test_markers_are_added_only_without_a_template(
    tmp_path: Path, lumina: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    source = _model(tmp_path / "source", "chatml")
    (source / "tokenizer_config.json").unlink()
    lumina("import", source, "--out", tmp_path / "start")
    said = capsys.readouterr().out
    assert "grew by 4 rows" in said and "brings no chat template of its own, so training uses lumina-chat-1" in said
    assert not (tmp_path / "start" / "chat_template.json").exists()


def test_a_template_without_a_certificate_is_kept_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lumina: Callable[..., None]
) -> None:
    source = _model(tmp_path / "source", "chatml")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    lumina("import", source, "--out", tmp_path / "start")
    assert "is kept, but cannot be trained with" in capsys.readouterr().out
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": "hi", "completion": "hello"}) + "\n")
    words = [
        "--tokenizer",
        str(tmp_path / "start" / "tokenizer.json"),
        "--seq-length",
        "64",
        "--out",
        str(tmp_path / "out"),
    ]
    assert run_command(cli, ["preprocess", str(chats), *words, "--chat-template", "auto"]) == 3
    assert "has no certificate" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run_command(cli, ["generate", str(source), "--prompt", "hi"]) == 3


def test_an_export_of_ours_comes_back_as_ours(tmp_path: Path) -> None:
    """Its Jinja text is lumina-chat-1 for other programs."""
    from lumina_ds.data.templates.find import find_template
    from lumina_ds.export.chat_template import jinja_chat_template

    source = _model(tmp_path / "source", "chatml")
    (source / "chat_template.jinja").write_text(jinja_chat_template(["<|end|>"], has_bos=False))
    assert import_model(source, tmp_path / "start")["chat_template"] == "lumina-chat-1"
    assert find_template("auto", Tokenizer.load(source / "tokenizer.json")).name == "lumina-chat-1"
