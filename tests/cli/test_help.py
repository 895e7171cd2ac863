"""What `--help` shows: an example of every verb, verbs in one whole line each."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from lumina_ds.cli.config_options import ConfigCommand
from lumina_ds.cli.main import VERBS, Verb, cli, run_command


def verbs(command: click.Command = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from verbs(found, (*path, name))


COMMANDS = {" ".join(path): command for path, command in verbs()}


@pytest.mark.parametrize("verb", [verb for verb, found in COMMANDS.items() if not isinstance(found, click.Group)])
def test_every_verb_has_an_example_that_it_takes(verb, capsys):
    assert run_command(cli, [*verb.split(), "--help"]) == 0
    printed = capsys.readouterr().out
    examples = [line[line.index("lumina ") :] for line in printed.splitlines() if f"lumina {verb}" in line]
    assert len(examples) >= 2, "the usage line and an example"
    # The options in them are its own, or, where it takes any of a run's, those of `lumina train`.
    takers = [COMMANDS[verb]] + [COMMANDS["train"]] * isinstance(COMMANDS[verb], ConfigCommand)
    known = {flag for taker in takers for option in taker.params for flag in (*option.opts, *option.secondary_opts)}
    for example in examples[1:]:
        shown = re.findall(r"--[a-z][\w-]*(?![\w.-])", example.split(" -- ")[0])
        assert [flag for flag in shown if flag not in known] == []


@pytest.mark.parametrize("group", [verb for verb, found in COMMANDS.items() if isinstance(found, click.Group)])
def test_a_group_says_each_verb_in_a_whole_line(group, capsys):
    assert run_command(cli, [*group.split(), "--help"]) == 0
    _, listed = re.split("Verbs:|Commands:", capsys.readouterr().out)
    assert "..." not in listed


def test_a_verb_from_outside_is_one_entry(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy_verb.py").write_text(
        "import click\n@click.command()\n@click.argument('name')\ndef command(name):\n    click.echo(f'hello {name}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run_command(cli, ["toy", "you"]) == 2 and "no verb 'toy'" in capsys.readouterr().err
    monkeypatch.setitem(VERBS, "toy", Verb("say hello", "toy_verb"))
    assert run_command(cli, ["toy", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"
    assert run_command(cli, ["--help"]) == 0
    assert re.search(r"^  toy +say hello$", capsys.readouterr().out, re.MULTILINE)
