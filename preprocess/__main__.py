"""`python -m preprocess`: the same command as `lumina preprocess`."""

from __future__ import annotations

import sys

from lumina_ds.cli.main import run_command
from lumina_ds.cli.preprocess import command

if __name__ == "__main__":
    sys.exit(run_command(command, prog_name="python -m preprocess"))
