"""Functions that run in other processes, on ranks or beside them: a question goes in and an answer comes out, as JSON.

A question names a function by its dotted path, so that whoever asks need not import it. `ask_ranks` starts ranks
through the deepspeed runner; who starts processes in another way gives them `question_words`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_ds.config.schema import DeepSpeedConfig, RunConfig
from lumina_ds.engine.meeting_point import TOKEN
from lumina_ds.errors import LuminaError
from lumina_ds.train.watch.orphans import start_variables, watch_launchers

if TYPE_CHECKING:
    from lumina_ds.engine.world import World

MODULE = "lumina_ds.ranks.ask"


@dataclass(frozen=True)
class Question:
    """`function` by its dotted path, called with `arguments`, with `config` where a run's configuration is given, and
    with `world` where the processes form a group. What it returns, a dataclass or what JSON holds, is the answer."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    config: RunConfig | None = None
    forms_group: bool = True

    def write(self, path: Path) -> None:
        """Write it as a file that `read` understands."""
        config = None if self.config is None else self.config.model_dump(mode="json")
        path.write_text(json.dumps(vars(self) | {"config": config}), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Question:
        """The question in a file of `write`."""
        values = json.loads(path.read_text(encoding="utf-8"))
        config = None if values["config"] is None else RunConfig.model_validate(values["config"])
        return cls(**{**values, "config": config})

    def answer(self, **world: World) -> Any:
        """Call the function, in this process."""
        module, _, name = self.function.rpartition(".")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        config = {} if self.config is None else {"config": self.config}
        return function(**config, **world, **self.arguments)


def question_words(question: Question, folder: Path) -> tuple[list[str], Path]:
    """(words after `python -m MODULE`, the file that will hold the answer); the question is written into `folder`."""
    asked, answered = folder / "question.json", folder / "answer.json"
    question.write(asked)
    return [str(asked), str(answered)], answered


def ask_ranks(question: Question, runner: Sequence[str]) -> tuple[Any | None, int]:
    """(rank 0's answer, exit code) of ranks started with these arguments of the deepspeed runner; None on a failure.

    What the ranks print goes to standard error. Nothing is left running, whatever happens.
    """
    from lumina_ds.ranks.runner import (
        Signals,
        complete_runner_arguments,
        rank_environment,
        run_until_done,
        runner_command,
    )
    from lumina_ds.ranks.supervise import end_marked

    mark = uuid.uuid4().hex
    # Else torch's profiler announces its start and end.
    environment = {"KINETO_LOG_LEVEL": "6", **rank_environment(), **start_variables(mark), TOKEN: mark}
    with tempfile.TemporaryDirectory(prefix="lumina-ask-") as folder, Signals() as signals:
        words, answered = question_words(question, Path(folder))
        command = runner_command(complete_runner_arguments(list(runner)), words, MODULE)
        try:
            ended = run_until_done(command, environment, signals, output=sys.stderr)
        finally:
            end_marked(mark)
        if ended.signalled:
            raise KeyboardInterrupt
        if ended.code or not answered.is_file():
            return None, ended.code or 1
        return read_answer(answered), 0


def read_answer(path: Path) -> Any:
    """What rank 0 left."""
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Entry point of each process: the launcher gives two files after options of its own."""
    watch_launchers()
    asked, answered = (Path(word) for word in sys.argv[-2:])
    question = Question.read(asked)
    if not question.forms_group:
        try:
            _write_answer(question.answer(), answered)
        except LuminaError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        return
    from lumina_ds.logs import configure_logging
    from lumina_ds.train.start import run_as_rank

    configure_logging(int(os.environ.get("RANK", "0")))
    logging.getLogger("lumina_ds").setLevel(logging.WARNING)

    def body(world: World) -> None:
        answer = question.answer(world=world)
        if world.rank == 0:
            _write_answer(answer, answered)

    settings = DeepSpeedConfig() if question.config is None else question.config.deepspeed
    run_as_rank(body, settings.rendezvous_seconds)


def _write_answer(answer: Any, path: Path) -> None:
    values = asdict(answer) if is_dataclass(answer) and not isinstance(answer, type) else answer
    path.write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    main()
