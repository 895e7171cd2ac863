"""`lumina bench` and its subcommands, one file each but for the short ones."""

from lumina_ds.cli.bench.bench import command

__all__ = ["command"]
