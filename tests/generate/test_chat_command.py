"""`lumina chat` with a model of no training: what it answers is nonsense, what it is asked is watched."""

import io
import sys

import pytest

from lumina_ds.cli import chat as chat_command
from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.schema import ModelConfig
from lumina_ds.data.conversation import Turn
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import ConfigError
from lumina_ds.export.folder import export_model
from lumina_ds.generate import chat
from lumina_ds.generate.history import History
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM

CONFIG = ModelConfig(
    vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, num_experts=2, moe_intermediate_size=8, qk_norm=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(corpus, tmp_path_factory):
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("model")
    model = CausalLM(CONFIG)
    initialize(model, CONFIG, seed=0)
    (folder / "ours").mkdir()
    save_file(dict(model.named_parameters()), folder / "ours/model.safetensors")
    export_model(CONFIG, folder / "ours", corpus.tokenizer, folder / "out")
    return folder / "out"


@pytest.fixture
def talk(exported, monkeypatch, capsys):
    """talk(*lines) gives each prompt that the model got, the replies, and what else was said."""
    asked = []
    real = chat.stream_reply

    def watched(loaded, turns, settings):
        asked.append([(turn.role, turn.content) for turn in turns])
        yield from real(loaded, turns, settings)

    monkeypatch.setattr(chat, "stream_reply", watched)

    def run(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        words = ["chat", str(exported), "--max-new-tokens", "1", "--seed", "1", *options]
        assert run_command(cli, words) == 0
        printed = capsys.readouterr()
        return asked, printed.out.splitlines(), printed.err

    return run


def test_commands_are_never_sent_to_the_model(talk):
    asked, replies, said = talk("/help", "/reset", "/nonsense", "hi", "/exit", "after the end")
    assert asked == [[("user", "hi")]] and len(replies) == 1
    for command in chat_command.COMMANDS:
        assert f"{command:<7} " in said
    assert "there is no command /nonsense" in said and "the conversation is forgotten" in said


@pytest.mark.parametrize("word", ["exit", "quit", "Quit", "/exit", "/quit"])
def test_words_that_end(talk, word):
    asked, replies, said = talk("hi", word, "after the end")
    assert asked == [[("user", "hi")]] and len(replies) == 1
    assert ("ends the chat, as /" in said) is (not word.startswith("/"))


def test_a_message_may_begin_with_a_slash_and_hold_exit(talk):
    asked, _, _ = talk("/etc/hosts is what?", "exit code 2?", "")
    assert [turns[-1][1] for turns in asked] == ["/etc/hosts is what?", "exit code 2?"]


def test_reset_keeps_the_system_turn(talk):
    asked, _, _ = talk("what is 1", "/reset", "what is 2", options=["--system", "sums"])
    assert asked == [[("system", "sums"), ("user", f"what is {number}")] for number in (1, 2)]


def test_a_long_message_says_what_it_drops_and_is_answered(talk):
    long = "what is 3 plus 4? " * 3
    asked, _, said = talk("hi", long.strip())
    assert asked[-1] == [("user", long.strip())]
    assert "1 old exchange is forgotten" in said


def test_a_message_beyond_the_context_leaves_the_history_alone(talk):
    asked, replies, said = talk("hi", "what is 3 plus 4? " * 40, "and")
    assert "tokens with its markers and the model's context is 64; say it shorter" in said
    assert len(asked) == 2 and len(replies) == 2
    assert [content for role, content in asked[-1] if role == "user"] == ["hi", "and"]


def test_the_oldest_exchanges_go_first(corpus):
    tokenizer = Tokenizer.load(corpus.tokenizer)
    history = History(tokenizer, 64)
    dropped = []
    for number in range(6):
        dropped.append(history.ask(f"what is {number} plus 1?"))
        history.answer(f"{number + 1}.")
    assert dropped[0] == 0 and sum(dropped) > 0
    assert history.turns[-2:] == [Turn("user", "what is 5 plus 1?"), Turn("assistant", "6.")]
    assert len(history.turns) == 2 * (6 - sum(dropped))
    before = list(history.turns)
    with pytest.raises(ConfigError, match="say it shorter"):
        history.ask("what is 3 plus 4? " * 40)
    assert history.turns == before
