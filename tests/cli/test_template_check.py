"""`lumina template check` and what refuses without a certificate."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from template_cases import CASES, write_tokenizer

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.errors import DataError
from preprocess.prepare import prepare_training_data

CHATS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello <|im_end|> there"}]},
    {"messages": [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "two", "weight": 0},
        {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"},
    ]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\n\nlate"}]},
]  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(CASES["chatml"], tmp_path / "model")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    return path


class Labels(HTMLParser):
    """The text of every label of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "span" and "y" in (dict(attrs).get("class") or "").split()

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found.append(data)


def test_a_certificate_is_printed_and_shown(
    tokenizer: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["template", "check", "chatml", "--tokenizer", str(tokenizer), "--data", str(chats)]
    assert run_command(cli, [*words, "--html", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert out.count("  proven  ") == 6 and "FAILS" not in out
    assert "[[Five, since 2 + 3 = 5.<|im_end|>]]⏎<|im_start|>user⏎" in out and "a reply ends with <|im_end|>" in out
    assert "refused: your own, 1 conversation: the prompt of turn 2 is no prefix" in out
    page = Labels()
    page.feed((tmp_path / "page.html").read_text())
    assert "four" in page.found and "two" not in page.found and "<|im_end|>" in page.found
    assert "hello <|im_end|> there" in page.found, "text that spells a special token is one run of text"
    assert run_command(cli, [*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["certified"] and found["digest"] in out and found["own"] == {"conversations": 3, "refused": 1}
    assert found["stops"] == ["<|im_end|>"] and all(one["holds"] for one in found["conditions"])


def test_what_is_not_proven_ends_with_3(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jinja").write_text(CASES["chatml"].source.replace("assistant\n' }}", "assistant:' }}"))
    words = ["template", "check", str(tmp_path / "bad.jinja"), "--tokenizer", str(tokenizer)]
    assert run_command(cli, [*words, "--html", str(tmp_path / "page.html")]) == 3
    shown = capsys.readouterr()
    assert "FAILS   prefix" in shown.out and "counterexample, prefix: the prompt of turn 2 is no prefix" in shown.out
    assert "no certificate" in shown.out and "bad.jinja has no certificate for" in shown.err
    assert "Counterexample: prefix" in (tmp_path / "page.html").read_text()
    assert run_command(cli, [*words, "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert not found["certified"] and found["digest"] is None and found["counterexamples"][0]["messages"]


def test_our_own_template(corpus, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    words = ["template", "check", "lumina", "--tokenizer", str(corpus.tokenizer), "--data", str(corpus.eval)]
    assert run_command(cli, words) == 0
    out = capsys.readouterr().out
    assert out.count("  proven  ") == 6 and "lumina-chat-1" in out and "20 of yours" in out


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("chatmll", 2, "did you mean chatml"),
        ("no.jinja", 3, "cannot read no.jinja"),
        ("llama3", 3, "llama3 has no certificate"),
    ],
)
def test_names_that_give_none(
    name: str, code: int, message: str, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(cli, ["template", "check", name, "--tokenizer", str(tokenizer)]) == code
    assert message in capsys.readouterr().err


def test_lines_without_a_proof_are_rejected_and_shards_belong_to_their_template(
    tokenizer: Path, chats: Path, tmp_path: Path, lumina: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tokenizer", tokenizer, "--chat-template", "auto", "--seq-length", 64, "--max-rejected", "50%"]
    lumina("preprocess", chats, *words, "--out", tmp_path / "shards")
    assert "mask not proven" in (tmp_path / "shards" / "rejected.jsonl").read_text()
    folder = ShardFolder.open(tmp_path / "shards")
    assert folder.manifest.totals.rejected_by_rule == {"mask not proven": 1}
    lumina("preprocess", chats, *words, "--out", tmp_path / "shards")
    assert "certificate" in (tmp_path / "shards" / "manifest.json").read_text()
    data = {"shards": str(folder.path), "seq_length": 64}
    for wanted in ("lumina-chat-1", "qwen3"):
        config = RunConfig.model_validate({"data": {**data, "chat_template": wanted}})
        with pytest.raises(DataError, match=f"chat template auto, not {wanted}; set --chat-template auto"):
            prepare_training_data(config, tmp_path / "cache")
    (tmp_path / "own.jinja").write_text(CASES["chatml"].source)
    for wanted in ("auto", str(tmp_path / "own.jinja")):
        config = RunConfig.model_validate({"data": {**data, "chat_template": wanted}})
        assert prepare_training_data(config, tmp_path / "cache").shards == folder.path
    lumina("validate", chats, "--tokenizer", tokenizer, "--chat-template", "lumina")
    assert run_command(cli, ["validate", str(chats), "--tokenizer", str(tokenizer), "--chat-template", "auto"]) == 3
    assert "1 of 3 lines cannot be used: mask not proven" in capsys.readouterr().err
    assert run_command(cli, ["validate", str(chats), "--chat-template", "auto"]) == 2
    lumina("data", "inspect", folder.path)
    assert "four<|im_end|>⟧" in capsys.readouterr().out
    lumina("data", "verify", folder.path)


def test_training_files_are_made_once_with_a_template(tokenizer: Path, chats: Path, tmp_path: Path) -> None:
    data = {
        "train_data": [str(chats)],
        "tokenizer": str(tokenizer),
        "chat_template": "chatml",
        "seq_length": 64,
        "max_rejected": 1,
    }
    config = RunConfig.model_validate({"data": data})
    made = prepare_training_data(config, tmp_path / "cache")
    again = prepare_training_data(config, tmp_path / "cache")
    assert again.reused and again.shards == made.shards and not made.reused
    assert ShardFolder.open(made.shards).manifest.template.version == "chatml"
