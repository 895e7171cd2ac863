"""The project's documents as text: pages in their order, code blocks, code spans, tables, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from lumina_ds.cli.config_options import ConfigCommand
from lumina_ds.cli.main import cli
from lumina_ds.config.load import dotted_fields
from lumina_ds.config.options import SHORT_OPTIONS
from lumina_ds.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE_SETTINGS = DOCS / "zensical.toml"
# Written from the code; test_references.py compares them with it.
GENERATED = {"configuration-reference.md", "command-reference.md"}
# Programs that hand the options after their own, and after this word, to `lumina train`.
TRAINERS = {"deepspeed": "launch/train.py", "torchrun": "launch/train.py"}
SCRIPTS = {"launch/single_node.sh", "launch/multi_node.sh", "launch/mpi.sh", "launch/slurm.sbatch"}
NUM_GPUS = "8"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Z][A-Z_]*=\S*")


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    def blocks(self, language: str) -> list[str]:
        """Whole blocks are read first: the fence that ends one looks like one that begins a block without a language."""
        return [content for kind, content in _BLOCK.findall(self.text) if kind == language]

    @property
    def prose(self) -> str:
        """The text without its code blocks."""
        return _BLOCK.sub("", self.text)

    def code_spans(self) -> list[str]:
        return re.findall(r"`([^`\n]+)`", self.prose)

    def shown_commands(self) -> list[str]:
        """Lines of the bash blocks."""
        return [line for block in self.blocks("bash") for line in block.splitlines() if line]


def navigation() -> list[str]:
    """File names of the site's pages, in the order of its menu."""

    def names(entries: Sequence[Any]) -> Iterator[str]:
        for entry in entries:
            for target in entry.values():
                if isinstance(target, str):
                    yield target
                else:
                    yield from names(target)

    return list(names(_read_toml(SITE_SETTINGS)["project"]["nav"]))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


def read_page(name: str) -> Page:
    """The page of this name, relative to the checkout."""
    return Page(ROOT / name, (ROOT / name).read_text(encoding="utf-8"))


def all_pages() -> list[Page]:
    """README, the site's pages in their order, CONTRIBUTING."""
    return [read_page(name) for name in ("README.md", *(f"docs/{name}" for name in navigation()), "CONTRIBUTING.md")]


def table(first_heading: str, page_name: str) -> list[list[str]]:
    """Cells of the table of a page whose first heading this is, without back-ticks."""
    text = read_page(page_name).text
    [rows] = re.findall(rf"^\| {re.escape(first_heading)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in rows.splitlines()]


def option_faults(words: list[str]) -> list[str]:
    """Unknown subcommands and options of one command line that calls lumina, directly or through a launcher."""
    words = as_lumina(words)
    words = words[: words.index("--")] if "--" in words else words
    command: click.Command = cli
    context = click.Context(cli)
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        if found is None:
            return [f"{rest[0]} is no subcommand of {' '.join(words)}"]
        command, rest = found, rest[1:]
    # One with a space is a value: the options of a variant.
    options = [word.split("=")[0] for word in rest if word.startswith("--") and " " not in word]
    known = known_options(command)
    return [f"{option} is no option of {' '.join(words)}" for option in options if option not in known]


def known_options(command: click.Command) -> set[str]:
    """Every option that `command` takes, dotted ones included."""
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    if isinstance(command, ConfigCommand):
        flags |= {f"--{name}" for name in dotted_fields(RunConfig)} | {option.flag for option in SHORT_OPTIONS}
    return flags | {"--help"}


def as_lumina(words: list[str]) -> list[str]:
    """A command that hands its arguments to `lumina train`, as that; every other as it is.

    The cluster scripts choose the ranks by the machine; here they have as many as a machine of NUM_GPUS, or NUM_RANKS.
    """
    words, ranks = without_assignments(words), dict(word.split("=") for word in words if _ASSIGNMENT.fullmatch(word))
    if words[0] in TRAINERS:
        return ["lumina", "train", *words[words.index(TRAINERS[words[0]]) + 1 :]]
    if words[0] in ("bash", "sbatch") and (script := SCRIPTS & set(words)):
        arguments = words[words.index(script.pop()) + 1 :]
        return ["lumina", "train", *arguments, "--", "--num_gpus", ranks.get("NUM_RANKS", NUM_GPUS)]
    return words


def without_assignments(words: list[str]) -> list[str]:
    """A command line without the variables set in front of it."""
    while words and _ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    return words


def split(line: str) -> list[str]:
    return shlex.split(line, comments=True)
