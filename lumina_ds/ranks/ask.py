"""Measurements on real ranks: what verbs that measure start through the deepspeed runner.

A request goes in and rank 0's result comes out as JSON files. For `lumina bench train` and `lumina profile` each
configuration gets ranks of its own, so that one that fails takes no other with it, and none inherits another's memory.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError

if TYPE_CHECKING:
    from lumina_ds.engine.world import World

MODULE = "lumina_ds.ranks.ask"


def check_measurable(config: RunConfig, runner: Sequence[str]) -> str:
    """The device; refuses before a rank starts what no run could do, or what is not there to be read."""
    from lumina_ds.cli.train import check_run
    from lumina_ds.data.shards.folder import ShardFolder
    from lumina_ds.ranks.runner import complete_runner_arguments, planned_world_size

    if config.data.train_data:
        raise ConfigError(
            "--train-data is not prepared here; give --data with a shard folder, or no data for random tokens"
        )
    device, _, _ = check_run(config, planned_world_size(complete_runner_arguments(list(runner))))
    if config.data.shards is not None:
        # A plan for a new row length is made once here, not by every rank at the same time.
        ShardFolder.open(Path(config.data.shards), config.data.force_streaming).packing(config.seq_length)
    return device


def measure_on_ranks(
    kind: str, config: RunConfig, runner: Sequence[str], **arguments: Any
) -> tuple[dict[str, Any] | None, int]:
    """(rank 0's result, exit code) of `kind`, a key of MEASUREMENTS, with these arguments; no result on a failure."""
    return ask_ranks(MODULE, {"kind": kind, "config": config.model_dump(mode="json"), "arguments": arguments}, runner)


def ask_ranks(module: str, request: Any, runner: Sequence[str]) -> tuple[Any | None, int]:
    """(rank 0's answer, exit code) of ranks that run `module` with two files, the request's and the answer's.

    What the ranks print goes to standard error. Nothing is left running, whatever happens.
    """
    from lumina_ds.cli.train import rank_environment
    from lumina_ds.ranks.runner import Signals, complete_runner_arguments, run_until_done, runner_command
    from lumina_ds.ranks.supervise import end_marked
    from lumina_ds.train.watch.orphans import START_MARK

    mark = uuid.uuid4().hex
    # Else torch's profiler announces its start and end.
    environment = {"KINETO_LOG_LEVEL": "6", **rank_environment(), START_MARK: mark}
    with tempfile.TemporaryDirectory(prefix="lumina-measure-") as folder, Signals() as signals:
        asked, answered = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = runner_command(complete_runner_arguments(list(runner)), [str(asked), str(answered)], module)
        try:
            ended = run_until_done(command, environment, signals, output=sys.stderr)
        finally:
            end_marked(mark)
        if ended.signalled:
            raise KeyboardInterrupt
        if ended.code or not answered.is_file():
            return None, ended.code or 1
        return json.loads(answered.read_text(encoding="utf-8")), 0


def _measure(asked: Path, answered: Path, world: World) -> None:
    from lumina_ds.measure.profile import profile_steps
    from lumina_ds.measure.throughput import measure_throughput

    request = json.loads(asked.read_text(encoding="utf-8"))
    measure: Any = {"throughput": measure_throughput, "profile": profile_steps}[request["kind"]]
    result = measure(RunConfig.model_validate(request["config"]), world, **request["arguments"])
    if world.rank == 0:
        answered.write_text(json.dumps(result), encoding="utf-8")


def main() -> None:
    """Entry point of a rank: the runner gives two files after its own --local_rank."""
    from lumina_ds.logs import configure_logging
    from lumina_ds.train.start import run_as_rank

    asked, answered = (Path(word) for word in sys.argv[-2:])
    configure_logging(int(os.environ.get("RANK", "0")))
    logging.getLogger("lumina_ds").setLevel(logging.WARNING)
    config = RunConfig.model_validate(json.loads(asked.read_text(encoding="utf-8"))["config"])
    run_as_rank(lambda world: _measure(asked, answered, world), config.deepspeed.rendezvous_seconds)


if __name__ == "__main__":
    main()
