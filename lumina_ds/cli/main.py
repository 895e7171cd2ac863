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
from typing import NoReturn

import click

from lumina_ds import __version__
from lumina_ds.errors import DataError, LuminaError, MachineError, OutOfMemory
from lumina_ds.text import nearest

VERBS: dict[str, str] = {
    "doctor": "check this machine, and say what to mend",
    "presets": "list the shipped model presets, or show one",
    "plan": "memory of a run per rank, before a GPU is touched",
    "tokenizer": "train or inspect a SentencePiece tokenizer",
    "validate": "check JSONL conversations, with a report",
    "preprocess": "turn JSONL conversations into packed Arrow shards",
    "data": "inspect, verify or summarise a shard folder",
    "train": "train a model with DeepSpeed",
    "evaluate": "loss and perplexity of a checkpoint on shards",
    "generate": "answer a prompt with a trained model",
    "chat": "talk with a trained model",
    "checkpoint": "list or verify the checkpoints of a run",
    "report": "a run, two runs or a folder of runs as an HTML page with plots",
    "export": "write a model in Hugging Face's format",
    "gguf": "turn an exported folder into a file for llama.cpp",
    "import": "start training from a model in Hugging Face's format",
    "selftest": "train a tiny model under every layout, and compare them",
    "bench": "measure training, the data loader, or precisions of inference",
    "profile": "where the time and memory of a training step go",
    "completion": "print the completion script of a shell",
}


class VerbGroup(click.Group):
    """Commands looked up by module name; their one-line help stands in VERBS so that listing imports nothing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(f"lumina_ds.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"no verb {args[0]!r}{nearest(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


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
    rank = os.environ.get("RANK", "0")
    if rank == "0":
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
