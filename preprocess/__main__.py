"""`python -m preprocess`: the same command as `lumina preprocess`."""

from __future__ import annotations

from lumina_ds.cli.main import leave, run_command
from lumina_ds.cli.preprocess import command

if __name__ == "__main__":
    leave(run_command(command, prog_name="python -m preprocess"))
