"""`lumina plan` and its subcommands, one file each."""

from lumina_ds.cli.plan.plan import command

__all__ = ["command"]
