"""`lumina train`: resolve the configuration, prepare the data once, and start the deepspeed runner.

Started by a launcher (deepspeed, torchrun, srun, mpirun), or through launch/train.py, the same options train as one
rank. The ranks that `lumina train` starts get its resolved configuration instead of its options.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NoReturn

import click

from lumina_ds.cli.config_options import ConfigCommand, config_options, resolve
from lumina_ds.cli.main import run_command
from lumina_ds.config.load import ResolvedConfig
from lumina_ds.config.schema import RunConfig
from lumina_ds.export.hugging_face import exportable
from lumina_ds.logs import tell
from lumina_ds.train.watch.orphans import watch_launchers

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
@click.option("--resolved", type=str, nargs=2, hidden=True, help="given by lumina train to its ranks: file and digest")
@click.pass_context
def command(
    ctx: click.Context,
    dry_run: bool,
    as_json: bool,
    local_rank: int | None,
    resolved: tuple[str, str] | None,
    **_: Any,
) -> int:
    """Train a model. Arguments after -- go to the deepspeed runner (--num_gpus, --hostfile, ...).

    Any field of the configuration can be set as --SECTION.FIELD VALUE, for instance --model.num_experts 8.
    """
    from lumina_ds.engine.launchers import read_launch, reporting_rank

    runner: list[str] = ctx.meta["runner_arguments"]
    if resolved is not None:
        given = [word for word in ctx.meta["arguments"] if not word.startswith("--local_rank=")]
        if runner or given[1:] != [*resolved]:
            raise click.UsageError("--resolved is what lumina train gives to its ranks; no other option goes with it")
        _train_as_rank(lambda: _take_over(Path(resolved[0]), resolved[1]), *reporting_rank(os.environ))
    found = resolve(ctx)
    is_rank = (ctx.obj or {}).get("rank", False)
    # With arguments for the runner this process starts ranks, and what it inherited of others is dropped for them.
    launch = None if runner and not is_rank else read_launch(os.environ)
    rank = 0 if launch is None else launch.rank
    if rank == 0 and (reason := exportable(found.config.model)):
        click.echo(f"warning: lumina export will not take this model: {reason}", err=True)
    if dry_run:
        _show_dry_run(found, runner, ctx.meta["arguments"], as_json)
        return 0
    if as_json:
        raise click.UsageError("--json goes with --dry-run; a run's figures are in its metrics.jsonl")
    if is_rank or launch is not None:
        _train_as_rank(lambda: _with_shards(found.config, keep_record=rank == 0), rank, rank == 0)
    return _launch(found.config, runner)


def main() -> None:
    """Entry point of launch/train.py: always trains as a rank; without a launcher, as the only one."""
    watch_launchers()
    sys.exit(run_command(command, prog_name="train.py", obj={"rank": True}))


def _launch(config: RunConfig, runner: list[str]) -> int:
    from lumina_ds.train.run_folder import RunFolder
    from lumina_ds.train.stop import ending_when_told

    tell(f"run folder {RunFolder.of(config).path}; loading PyTorch and DeepSpeed")
    with ending_when_told(), RunFolder.of(config).gone_on_failure():
        from lumina_ds.ranks.supervise import ready_to_start

        start = ready_to_start(_prepare_start(config, runner), runner, sys.argv)
    return start()


def _prepare_start(config: RunConfig, runner: list[str]) -> RunConfig:
    """Refuse what cannot train, and make run folder, shards and plan; the configuration with the finished shards."""
    from lumina_ds.data.shards.folder import ShardFolder
    from lumina_ds.engine.world import check_deepspeed_version
    from lumina_ds.logs import configure_logging
    from lumina_ds.ranks.check_run import check_start
    from lumina_ds.train.resume import check_resume
    from lumina_ds.train.run_folder import RunFolder
    from preprocess.run_data import iter_folders

    check_deepspeed_version()
    check_start(config, runner)
    check_resume(RunFolder.of(config), config.run.resume)
    RunFolder.of(config).create()
    configure_logging()
    config = _with_shards(config)
    # A plan for a new row length is made once here, not by every rank at the same time.
    for folder in iter_folders(config):
        ShardFolder.open(folder, config.data.force_streaming).packing(config.seq_length)
    return config


def _with_shards(config: RunConfig, keep_record: bool = True) -> RunConfig:
    """`config` with shards to train and evaluate on, made where there were only conversations.

    `keep_record`: preprocessing.json in the run folder says what became of them.
    """
    from lumina_ds.train.run_folder import RunFolder
    from preprocess.run_data import prepare_run_data

    data = prepare_run_data(config, Path(config.run.runs_dir) / ".data")
    if data.record and keep_record:
        fresh = config.run.resume == "none"
        RunFolder.of(config).write_preprocessing(data.record, fresh)
    return data.config


def _take_over(path: Path, digest: str) -> RunConfig:
    from lumina_ds.ranks.handoff import take_over

    config, sys.argv = take_over(path, digest)  # the run folder keeps the command that the user typed
    return config


def _train_as_rank(settle: Callable[[], RunConfig], rank: int, speaks: bool) -> NoReturn:
    """`settle` gives the configuration with finished shards."""
    from lumina_ds.train.stop import ending_when_told

    with ending_when_told(rank):
        if speaks:
            tell("the ranks load PyTorch and DeepSpeed")
        config = settle()
        from lumina_ds.measure.batch_size import settle_batch
        from lumina_ds.train.start import run_rank

        shards, eval_shards = (
            None if path is None else Path(path) for path in (config.data.shards, config.data.eval_shards)
        )
        run_rank(config, shards, eval_shards, settle_batch)


def _show_dry_run(resolved: ResolvedConfig, runner: list[str], arguments: list[str], as_json: bool) -> None:
    """Print the configuration with origins, the DeepSpeed JSON, the memory plan, and the command that starts it."""
    from lumina_ds.cli.plan.dry_run import print_dry_run
    from lumina_ds.cli.plan.render import plan_record
    from lumina_ds.cli.plan.sources import sources_record
    from lumina_ds.plan.memory import plan_memory
    from lumina_ds.ranks.check_run import check_run, device_reason
    from lumina_ds.ranks.elastic import planned_start
    from lumina_ds.ranks.runner import complete_runner_arguments, shown_start
    from lumina_ds.train.resume import check_resume
    from lumina_ds.train.run_folder import RunFolder
    from preprocess.mixture_forecast import forecast_sources
    from preprocess.run_data import check_before_preparing

    config, start = resolved.config, planned_start(resolved.config, runner, check_memory=False)
    checked = check_run(start.config, start.num_ranks)
    check_resume(RunFolder.of(config), config.run.resume)
    RunFolder.of(config).check_place()
    check_before_preparing(config)
    plan = plan_memory(start.config, start.num_ranks, checked.precision, checked.device, checked.deepspeed_json)
    sources = forecast_sources(start.config, start.num_ranks // config.deepspeed.sequence_parallel_size)
    tree = config.model_dump()
    values = {name: reduce(getitem, name.split("."), tree) for name in resolved.origins}
    started = [word for word in arguments if word not in ("--dry-run", "--json")]
    command = shown_start(complete_runner_arguments(runner), started)
    if as_json:
        document = {
            "config": {name: {"value": value, "origin": resolved.origins[name]} for name, value in values.items()},
            "deepspeed": checked.deepspeed_json,
            "plan": plan_record(plan),
            "device": {"value": checked.device, "reason": device_reason(checked.device, runner)},
            "precision": {"value": checked.precision, "reason": checked.precision_reason},
            "attention": {"value": checked.attention.backend, "reason": checked.attention.reason},
            "fused_kernels": {"value": list(checked.kernels.names), "reason": checked.kernels.reason},
            "command": command,
        } | sources_record(config, sources)
        click.echo(json.dumps(document, indent=2))
    else:
        print_dry_run(resolved, values, (checked, plan, sources), device_reason(checked.device, runner), command)


if __name__ == "__main__":
    main()
