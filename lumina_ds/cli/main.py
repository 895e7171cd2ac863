"""The `lumina` console script: finds the verb, runs it, turns expected errors into one line and an exit code.

Verbs are imported only when called, so that `lumina --help` and `lumina plan` never pay for torch.
Each verb's module defines `command`, a click command.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import click

from lumina_ds import __version__
from lumina_ds.errors import DataError, LuminaError, MachineError, OutOfMemory
from lumina_ds.text import nearest


@dataclass(frozen=True)
class Verb:
    """One line of `lumina --help`, and the module whose `command` is run; lumina_ds.cli.NAME where none is named."""

    help: str
    module: str | None = None


VERBS: dict[str, Verb] = {
    "doctor": Verb("check this machine, and say what to mend"),
    "presets": Verb("list the shipped model presets, or show one"),
    "config": Verb("show, write, compare or explain the options of a run"),
    "plan": Verb("memory of a run per rank, before a GPU is touched"),
    "tokenizer": Verb("train or inspect a SentencePiece tokenizer"),
    "template": Verb("prove the masks of a model's own chat template"),
    "validate": Verb("check JSONL conversations, with a report"),
    "preprocess": Verb("turn JSONL conversations into packed Arrow shards"),
    "data": Verb("inspect, verify or summarise a shard folder"),
    "train": Verb("train a model with DeepSpeed"),
    "evaluate": Verb("loss and perplexity of a checkpoint on shards"),
    "generate": Verb("answer a prompt with a trained model"),
    "chat": Verb("talk with a trained model"),
    "checkpoint": Verb("list or verify the checkpoints of a run"),
    "report": Verb("a run, two runs or a folder of runs as an HTML page with plots"),
    "export": Verb("write a model in Hugging Face's format"),
    "gguf": Verb("turn an exported folder into a file for llama.cpp"),
    "import": Verb("start training from a model in Hugging Face's format"),
    "selftest": Verb("train a tiny model under every layout, and compare them"),
    "bench": Verb("measure training, the data loader, or precisions of inference"),
    "profile": Verb("where the time and memory of a training step go"),
    "completion": Verb("print the completion script of a shell"),
}


class VerbGroup(click.Group):
    """The commands of VERBS, where their one line of help stands too, so that listing them imports nothing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(VERBS[cmd_name].module or f"lumina_ds.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"no verb {args[0]!r}{nearest(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])


@click.group(
    cls=VerbGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done, 2 configuration or usage, 3 data, 4 environment, 5 checkpoint, "
    "6 out of memory, 7 unstable, 8 a rank stalled, 75 interrupted but resumable.",
)
@click.version_option(__version__, prog_name="lumina")
def cli() -> None:
    """Lumina DS: JSONL conversations to a trained mixture-of-experts language model, on DeepSpeed."""


def run_command(
    command: click.Command, args: Sequence[str] | None = None, prog_name: str = "lumina", obj: object = None
) -> int:
    """Run a click command and return its exit code; expected errors become one line on stderr.

    Of several ranks that make the same mistake only the first one says so; what may be wrong with one
    machine alone is said by each.
    """
    # With colorama installed, numba would end every command on a terminal, mpirun's too, with a code that resets colours.
    os.environ.setdefault("NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING", "1")
    try:
        result = command.main(args=args, prog_name=prog_name, standalone_mode=False, obj=obj)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except LuminaError as error:
        _report(str(error), everywhere=isinstance(error, DataError | MachineError))
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        # A group without a verb shows its help, which is no sentence about a mistake.
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        # click would print the usage over several lines; one line with the remedy is what a user reads.
        hint = f" (see {error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
        _report(" ".join(error.format_message().split()) + hint)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):  # before RuntimeError, which click.Abort is
        click.echo("interrupted", err=True)
        return 130
    except RuntimeError as error:
        # torch.OutOfMemoryError, without importing torch for every verb.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _report(f"out of memory ({error}); use a GPU with more memory, a smaller batch, or a lower precision")
        return OutOfMemory.exit_code
    except BrokenPipeError:
        # The reader (head, less) is gone; leave quietly, and keep the interpreter from flushing into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _report(text: str, everywhere: bool = False) -> None:
    from lumina_ds.engine.launchers import reporting_rank

    rank, speaks = reporting_rank(os.environ)
    if speaks:
        click.echo(f"error: {text}", err=True)
    elif everywhere:
        click.echo(f"[rank {rank}] error: {text}", err=True)


def leave(code: int) -> NoReturn:
    """End the process. The interpreter would look through all its objects for garbage first, a tenth of a second and
    more after numba or torch."""
    gc.freeze()
    sys.exit(code)


def main() -> None:
    leave(run_command(cli))
