"""`lumina train`: resolve the configuration, prepare the data once, and start the deepspeed runner.

Started by a launcher (deepspeed, torchrun, srun, mpirun), or through launch/train.py, the same options
train as one rank.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from lumina_ds.cli.config_options import ConfigCommand, config_options, resolve
from lumina_ds.cli.main import run_command
from lumina_ds.config.checks import device_faults, world_faults
from lumina_ds.config.load import ResolvedConfig
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import CheckpointError, ConfigError, MachineError

EXAMPLES = """Examples:

\b
  lumina train --config debug --train-data chats.jsonl --tokenizer auto
  lumina train --config b1 --data shards/train --eval-shards shards/eval --zero 2 -- --num_gpus 8
  lumina train --config b7 --data shards/train --zero 3 --expert-parallel 8 -- --hostfile hostfile
  deepspeed --num_gpus 2 launch/train.py --config debug --data shards/train
"""


@click.command(cls=ConfigCommand, epilog=EXAMPLES)
@config_options
@click.option("--dry-run", is_flag=True, help="show configuration, DeepSpeed JSON, plan and command; start nothing")
@click.option("--json", "as_json", is_flag=True, help="with --dry-run: one JSON document")
@click.option("--local_rank", type=int, hidden=True, help="given by the deepspeed runner; the environment has it too")
@click.pass_context
def command(ctx: click.Context, dry_run: bool, as_json: bool, local_rank: int | None, **_: Any) -> int:
    """Train a model. Arguments after -- go to the deepspeed runner (--num_gpus, --hostfile, ...).

    Any field of the configuration can be set as --SECTION.FIELD VALUE, for instance --model.num_experts 8.
    """
    from lumina_ds.engine.world import launched_world
    from lumina_ds.ranks.runner import complete_runner_arguments

    resolved = resolve(ctx)
    runner: list[str] = ctx.meta["runner_arguments"]
    if dry_run:
        from lumina_ds.cli.dry_run import show_dry_run

        show_dry_run(resolved, complete_runner_arguments(runner), ctx.meta["arguments"], as_json)
        return 0
    if as_json:
        raise click.UsageError("--json goes with --dry-run; a run's figures are in its metrics.jsonl")
    world = launched_world(os.environ)
    if (ctx.obj or {}).get("rank") or (world is not None and not runner):
        _train_as_rank(resolved.config, 0 if world is None else world[0])
    return _launch(resolved, runner, ctx.meta["arguments"])


def main() -> None:
    """Entry point of launch/train.py: always trains as a rank; without a launcher, as the only one."""
    sys.exit(run_command(command, prog_name="train.py", obj={"rank": True}))


def _launch(resolved: ResolvedConfig, runner: list[str], arguments: list[str]) -> int:
    from lumina_ds.train.stop import ending_when_told

    with ending_when_told():
        from lumina_ds.ranks.runner import complete_runner_arguments, runner_command
        from lumina_ds.ranks.supervise import supervise

        arguments = _prepare_start(resolved.config, runner, arguments)
        environment = rank_environment()
    return supervise(
        resolved.config,
        lambda more: runner_command(complete_runner_arguments(runner), [*arguments, *more]),
        environment,
    )


def _prepare_start(config: RunConfig, runner: list[str], arguments: list[str]) -> list[str]:
    """Refuse what cannot train, and make run folder, shards and plan; the options that the ranks are given."""
    from lumina_ds.data.shards.folder import ShardFolder
    from lumina_ds.engine.world import check_deepspeed_version
    from lumina_ds.logs import configure_logging
    from lumina_ds.ranks.runner import complete_runner_arguments, planned_world_size
    from lumina_ds.train.run_folder import RunFolder

    check_deepspeed_version()
    check_run(config, planned_world_size(complete_runner_arguments(runner)))
    if config.run.resume not in ("auto", "none") and not Path(config.run.resume).is_dir():
        raise CheckpointError(
            f"{config.run.resume} is neither a run folder nor a checkpoint (step-XXXXXXXX); give --resume one of them"
        )
    RunFolder.of(config).create()
    configure_logging()
    data = _prepare(config)
    # A plan for a new row length is made once here, not by every rank at the same time.
    ShardFolder.open(data.shards, config.data.force_streaming).packing(config.seq_length)
    if config.data.train_data:
        # The ranks get the finished shards; naming their source as well would be a contradiction.
        arguments = [*arguments, "--data.train_data", "[]", "--data", str(data.shards)]
    if data.eval_shards is not None and config.data.eval_shards is None:
        arguments = [*arguments, "--eval-shards", str(data.eval_shards)]
    return arguments


def rank_environment() -> dict[str, str]:
    """Ours, and on a machine without a GPU DeepSpeed's accelerator by name, so that it does not search and warn."""
    import torch

    return dict(os.environ) if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", **os.environ}


def check_run(config: RunConfig, world_size: int) -> tuple[str, str, str]:
    """Refuse everything that can be refused before a rank starts; (device, precision, why that precision)."""
    from lumina_ds.config.deepspeed.compose import compose_deepspeed
    from lumina_ds.engine.kernel_choice import choose_kernels
    from lumina_ds.model.attention_backends import choose_attention
    from lumina_ds.model.device import device_and_precision
    from lumina_ds.monitor.trackers import missing_trackers

    device, precision, reason = device_and_precision(config.train.precision, config.model)
    faults = world_faults(config, world_size) + device_faults(config, device, precision)
    if faults:
        raise ConfigError.from_faults(faults)
    if missing := missing_trackers(config.run):
        raise MachineError("; ".join(missing))
    compose_deepspeed(config, world_size, precision)
    choose_attention(config, device, precision)
    choose_kernels(config, device, precision, compares=False)
    return device, precision, reason


def _prepare(config: RunConfig) -> Any:
    from preprocess.prepare import prepare_training_data

    return prepare_training_data(config, Path(config.run.runs_dir) / ".data")


def _train_as_rank(config: RunConfig, rank: int) -> None:
    from lumina_ds.train.stop import ending_when_told

    with ending_when_told(rank):
        from lumina_ds.train.start import run_rank

        data = _prepare(config)
        run_rank(config, data.shards, data.eval_shards)


if __name__ == "__main__":
    main()
