"""`lumina train`: resolve the configuration, prepare the data once, and start the deepspeed runner.

Started by a launcher (deepspeed, torchrun, srun, mpirun), or through launch/train.py, the same options
train as one rank.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from lumina_ds.cli.config_options import ConfigCommand, config_options, resolve
from lumina_ds.cli.main import run_command
from lumina_ds.config.checks import device_faults, world_faults
from lumina_ds.config.load import ResolvedConfig
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError

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
    from lumina_ds.engine.distributed import launched_world

    resolved = resolve(ctx)
    if dry_run:
        from lumina_ds.cli.dry_run import show_dry_run

        show_dry_run(resolved, runner_arguments(ctx), ctx.meta["arguments"], as_json)
        return 0
    if as_json:
        raise click.UsageError("--json goes with --dry-run; a run's figures are in its metrics.jsonl")
    if (ctx.obj or {}).get("rank") or launched_world(os.environ) is not None:
        _train_as_rank(resolved.config)
    return _launch(resolved, runner_arguments(ctx), ctx.meta["arguments"])


def main() -> None:
    """Entry point of launch/train.py: always trains as a rank; without a launcher, as the only one."""
    sys.exit(run_command(command, prog_name="train.py", obj={"rank": True}))


def runner_arguments(ctx: click.Context) -> list[str]:
    """The deepspeed runner's arguments: those after --, with a number of ranks and a free port added."""
    from lumina_ds.engine.distributed import free_port

    given: list[str] = list(ctx.meta.get("runner_arguments", []))
    names = {argument.split("=")[0] for argument in given}
    if not names & {"--num_gpus", "--num_accelerators", "--hostfile", "-H", "--include", "-i", "--num_nodes"}:
        given = ["--num_gpus", str(_num_local_devices()), *given]
    if "--master_port" not in names:
        given = ["--master_port", str(free_port()), *given]
    return given


def planned_world_size(arguments: list[str]) -> int:
    """Ranks that the runner will start with these arguments, as far as they tell."""
    parser = click.parser._OptionParser()
    parser.ignore_unknown_options = True
    for name in ("--num_gpus", "--num_accelerators", "--num_nodes", "--hostfile"):
        parser.add_option(click.Option([name]), [name], dest=name)
    found, _, _ = parser.parse_args(args=list(arguments))
    per_node = int(found.get("--num_gpus") or found.get("--num_accelerators") or 0)
    if "--hostfile" in found:
        slots = [per_node or slot for slot in _hostfile_slots(Path(found["--hostfile"]))]
        return sum(slots[: int(found["--num_nodes"])] if "--num_nodes" in found else slots)
    return (per_node or _num_local_devices()) * int(found.get("--num_nodes") or 1)


def _hostfile_slots(path: Path) -> list[int]:
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return [int(line.rsplit("slots=", 1)[1]) for line in lines if line]
    except (OSError, IndexError, ValueError) as error:
        raise ConfigError(f"--hostfile {path} cannot be read; each line must be `HOST slots=N`") from error


def _num_local_devices() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def runner_command(runner: list[str], arguments: list[str]) -> list[str]:
    """The deepspeed command that trains with these options."""
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *(*runner, "--module", "lumina_ds.cli.train", *arguments),
    ]


def _launch(resolved: ResolvedConfig, runner: list[str], arguments: list[str]) -> int:
    from lumina_ds.cli.launch import run_until_done
    from lumina_ds.data.tokenizer import check_vocabulary  # noqa: F401  (a missing library shows here, not on a rank)
    from lumina_ds.engine.distributed import check_deepspeed_version

    check_deepspeed_version()
    world_size = planned_world_size(runner)
    check_run(resolved.config, world_size)
    data = _prepare(resolved.config)
    if resolved.config.data.train_data:
        # The ranks get the finished shards; naming their source as well would be a contradiction.
        arguments = [*arguments, "--data.train_data", "[]", "--data", str(data.shards)]
    if data.eval_shards is not None and resolved.config.data.eval_shards is None:
        arguments = [*arguments, "--eval-shards", str(data.eval_shards)]
    full = runner_command(runner, arguments)
    click.echo("+ " + shlex.join(["deepspeed", *full[3:]]), err=True)
    return run_until_done(full, _rank_environment())


def _rank_environment() -> dict[str, str]:
    """Ours, and on a machine without a GPU DeepSpeed's accelerator by name, so that it does not search and warn."""
    import torch

    return dict(os.environ) if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", **os.environ}


def check_run(config: RunConfig, world_size: int) -> None:
    """Everything that can be refused before a rank starts."""
    import torch

    from lumina_ds.config.deepspeed import compose_deepspeed
    from lumina_ds.config.precision import resolve_precision
    from lumina_ds.model.attention import choose_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision, _ = resolve_precision(
        config.train.precision, device, device == "cuda" and torch.cuda.is_bf16_supported()
    )
    faults = world_faults(config, world_size) + device_faults(config, device)
    if faults:
        raise ConfigError.from_faults(faults)
    compose_deepspeed(config, world_size, precision)
    choose_backend(config.train.flash_attention, device, precision)


def _prepare(config: RunConfig) -> Any:
    from preprocess.prepare import prepare_training_data

    return prepare_training_data(config, Path(config.run.runs_dir) / ".data")


def _train_as_rank(config: RunConfig) -> None:
    from lumina_ds.train.start import run_rank

    data = _prepare(config)
    run_rank(config, data.shards, data.eval_shards)


if __name__ == "__main__":
    main()
