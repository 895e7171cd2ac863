"""The deepspeed runner's command for other hosts, with every word quoted, and an end of its ranks that lets them save.

DeepSpeed joins its words with blanks (deepspeed/launcher/multinode_runner.py, PDSHRunner): pdsh replaces what follows a
percent sign in them, and the login shell of each host expands the rest, so that a folder's name could run a program.

Told to end, it kills pdsh, has every launch module of this user on those hosts end its ranks one after the other, 30 s
apart, and ends itself with 1 while they save. Here the ranks of this start alone are told, and pdsh brings their code.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import threading
import time
from types import SimpleNamespace
from typing import Any

from lumina_ds.engine.deepspeed.changes import Need, replace

_RUNNERS = "deepspeed.launcher.multinode_runner"
_NODE_RANK = "--node_rank=%n"
_PKILL = "pkill -f "
_AGAIN_SECONDS = 2.0
NEEDS = (
    Need(f"{_RUNNERS}:PDSHRunner.parse_user_args", "self", contains="processed_args"),
    Need(f"{_RUNNERS}:PDSHRunner.get_cmd", "self environment active_resources", contains=_NODE_RANK),
    Need(f"{_RUNNERS}:PDSHRunner.get_cmd", contains="f\"cd {os.path.abspath('.')};\""),
    Need(f"{_RUNNERS}:PDSHRunner.get_cmd", contains='f"source {self.args.venv_script};"'),
    Need(f"{_RUNNERS}:PDSHRunner.get_cmd", contains=f'pdsh_cmd_args + ["{_PKILL}"'),
    Need(f"{_RUNNERS}:MultiNodeRunner.add_export", "self key var"),
    Need("deepspeed.launcher.runner:main", "args", contains="signal.signal(signal.SIGTERM, sigkill_handler)"),
    Need("deepspeed.launcher.runner:main", contains="if result.returncode > 0:"),
)


def remote_word(word: str) -> str:
    """`word` for pdsh, whose remote shell makes the same word of it."""
    return shlex.quote(word).replace("%", "%%")


def run_deepspeed_runner() -> None:
    """The deepspeed runner's own program, with the words of this process; it quotes from now on. For a process of its
    own: it ends by SystemExit, or returns when what it started ended with 0 or by a signal."""
    from deepspeed.launcher import runner
    from deepspeed.launcher.multinode_runner import PDSHRunner

    get_command = PDSHRunner.get_cmd
    add_export = PDSHRunner.add_export

    def quoted_command(self: Any, environment: dict[str, str], active_resources: dict[str, list[int]]) -> Any:
        words, end, environment = get_command(self, environment, active_resources)
        _end_by(_telling_ranks(self, end), environment)
        return _quoted(words, self.args.venv_script), end, environment

    def quoted_export(self: Any, key: str, var: str) -> None:
        if not _is_of_this_process(key, var):
            add_export(self, key, var)  # a line of the user's .deepspeed_env, which is written for a shell
        elif key.isidentifier():
            self.exports[key] = remote_word(var)

    replace(PDSHRunner, "parse_user_args", lambda self: self.args.user_args)
    replace(PDSHRunner, "get_cmd", quoted_command)
    replace(PDSHRunner, "add_export", quoted_export)
    # Its handlers are those that end everything at once.
    replace(runner, "signal", SimpleNamespace(**{**vars(signal), "signal": lambda number, handler: None}))
    runner.main()


def _quoted(words: list[str], venv_script: str | None) -> list[str]:
    """What follows `cd` and `source` is quoted here, and the exports were before."""
    folder = os.path.abspath(".")
    start, node_rank = words.index(f"cd {folder};"), words.index(_NODE_RANK)
    source = f"source {venv_script};"
    before = [f"source {remote_word(str(venv_script))};" if word == source else word for word in words[:start]]
    after = [word if at == node_rank else remote_word(word) for at, word in enumerate(words[start + 1 :], start + 1)]
    return [*before, f"cd {remote_word(folder)};", *after]


def _telling_ranks(runner: Any, end: list[str]) -> list[str]:
    """pdsh's command that sends SIGTERM to the ranks of this start: its last word is of no other one, and their launch
    module has --module where they have -m."""
    pdsh = end[: end.index(_PKILL)]
    rank = " .*".join(re.sub(r"([][.*+?^${}()|\\])", r"\\\1", word) for word in _first_and_last(runner))
    return [*pdsh, "pkill", "-f", remote_word(f"[-]m {rank}$")]


def _first_and_last(runner: Any) -> list[str]:
    return [runner.user_script, *runner.user_arguments[-1:]]


def _end_by(command: list[str], environment: dict[str, str]) -> None:
    """On SIGTERM, tell the ranks, again until every host had some: they may not have started yet."""

    def tell() -> None:
        while subprocess.run(command, env=environment, capture_output=True).returncode:
            time.sleep(_AGAIN_SECONDS)

    def told(number: int, frame: Any) -> None:
        threading.Thread(target=tell, daemon=True).start()

    signal.signal(signal.SIGTERM, told)


def _is_of_this_process(key: str, value: str) -> bool:
    """DeepSpeed puts its folder before PYTHONPATH (deepspeed/launcher/runner.py, main)."""
    own = os.environ.get(key)
    with_folder = ":".join([os.path.abspath("."), *([own] if own is not None else [])])
    return value == own or (key == "PYTHONPATH" and value == with_folder)
