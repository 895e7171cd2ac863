"""`lumina completion`: the script that lets a shell complete verbs, options, presets and choices."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

EXAMPLES = """Examples:

\b
  eval "$(lumina completion bash)"
  lumina completion zsh > ~/.zfunc/_lumina
  lumina completion fish > ~/.config/fish/completions/lumina.fish
"""


@click.command(epilog=EXAMPLES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print SHELL's completion script: evaluate it, or write it where the shell looks for such files."""
    from lumina_ds.cli.main import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "lumina", "_LUMINA_COMPLETE").source())
