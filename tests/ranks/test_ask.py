"""The one entry of processes that are asked something: what goes in, what comes out, and how it fails."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lumina_ds.config.load import load_config
from lumina_ds.errors import DataError
from lumina_ds.ranks.ask import MODULE, Question, ask_ranks, question_words, read_answer
from lumina_ds.ranks.runner import RANK_MODULES

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Reply:
    name: str
    seed: int


def reply(config, seed):
    return Reply(config.run_name, seed)


def share(world, factor):
    return [world.rank, world.size, factor * world.size]


def refuse(world=None):
    raise DataError("there is nothing to read")


@pytest.fixture(autouse=True)
def here_on_the_path(monkeypatch):
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def run_alone(question, folder):
    words, answered = question_words(question, folder)
    done = subprocess.run([sys.executable, "-m", MODULE, *words], capture_output=True, text=True, timeout=120)
    return done, answered


def test_a_process_alone_answers_with_a_dataclass(tmp_path):
    config = load_config("debug").config
    done, answered = run_alone(Question("test_ask.reply", {"seed": 7}, config, forms_group=False), tmp_path)
    assert done.returncode == 0, done.stderr
    assert Reply(**read_answer(answered)) == Reply("debug", 7)
    assert Question.read(tmp_path / "question.json").config == config


def test_a_users_mistake_there_is_one_line_and_its_code(tmp_path):
    done, answered = run_alone(Question("test_ask.refuse", forms_group=False), tmp_path)
    assert (done.returncode, done.stderr) == (DataError.exit_code, "error: there is nothing to read\n")
    assert not answered.exists()


@pytest.mark.slow
def test_ranks_answer_as_one_or_fail_with_their_code(capfd):
    assert ask_ranks(Question("test_ask.share", {"factor": 3}), ["--num_gpus", "2"]) == ([0, 2, 6], 0)
    assert ask_ranks(Question("test_ask.refuse"), ["--num_gpus", "1"]) == (None, DataError.exit_code)
    out, err = capfd.readouterr()
    assert "error: there is nothing to read\n" in err and out == ""
    assert MODULE in RANK_MODULES
