"""The README against the code: every command, option, path, table and snippet in it is real."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from lumina_ds import errors
from lumina_ds.cli.config_options import ConfigCommand
from lumina_ds.cli.main import VERBS, cli
from lumina_ds.config.load import dotted_fields, load_config, preset_names
from lumina_ds.config.options import SHORT_OPTIONS
from lumina_ds.config.schema import RunConfig
from lumina_ds.plan.parameters import count_parameters

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Programs that take the options of `lumina train`, after options of their own.
TRAINERS = {"deepspeed", "torchrun"}
REPOSITORY_PATH = re.compile(
    r"(?:\.ci|lumina_ds|preprocess|launch|tests|ds_configs)/[\w./-]*|[\w-]+\.(?:py|txt|md)|LICENSE"
)
# What commands in the README write, or what a user brings.
NOT_IN_THE_REPOSITORY = {"tokenizer.model", "convert_hf_to_gguf.py"}


def blocks(language: str) -> list[str]:
    """Whole blocks are read first: the fence that ends one looks like one that begins a block without a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [content for kind, content in found if kind == language]


def code_spans() -> list[str]:
    without_blocks = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", without_blocks)


def table(first_heading: str) -> list[list[str]]:
    """Cells of the table whose first heading this is, without back-ticks."""
    [rows] = re.findall(rf"^\| {first_heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in rows.splitlines()]


def commands() -> Iterator[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line]
    for line in [*lines, *(span for span in code_spans() if span.startswith(("lumina ", "bash ")))]:
        yield shlex.split(line, comments=True)


def option_faults(words: list[str]) -> list[str]:
    """Unknown verbs and options of one command line that calls lumina, directly or through a launcher."""
    if words[0] in TRAINERS:
        words = ["lumina", "train", *words[words.index("launch/train.py") + 1 :]]
    words = words[: words.index("--")] if "--" in words else words
    command: click.Command = cli
    context = click.Context(cli)
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        if found is None:
            return [f"{rest[0]} is no verb of {' '.join(words)}"]
        command, rest = found, rest[1:]
    known = _flags(command) | {"--help"}
    if isinstance(command, ConfigCommand):
        known |= {f"--{name}" for name in dotted_fields(RunConfig)} | {option.flag for option in SHORT_OPTIONS}
    # One with a space is a value: the options of a variant.
    options = [word.split("=")[0] for word in rest if word.startswith("--") and " " not in word]
    return [f"{option} is no option of {' '.join(words)}" for option in options if option not in known]


def _flags(command: click.Command) -> set[str]:
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def test_the_checker_finds_wrong_commands() -> None:
    assert option_faults(shlex.split("lumina train --config debug --model.num_experts 8 -- --num_gpus 2")) == []
    assert "--confg" in option_faults(shlex.split("lumina train --confg debug"))[0]
    assert "--zero" in option_faults(shlex.split("lumina checkpoint verify runs/debug --zero 2"))[0]
    assert "merge" in option_faults(shlex.split("lumina checkpoint merge runs/debug"))[0]
    assert "teleport" in option_faults(shlex.split("lumina teleport"))[0]
    assert "--zer" in option_faults(shlex.split("deepspeed --num_gpus 2 launch/train.py --zer 1"))[0]


def test_every_command_exists() -> None:
    called = [words for words in commands() if words[0] == "lumina" or words[0] in TRAINERS]
    assert len(called) > 15
    assert [fault for words in called for fault in option_faults(words)] == []
    shown = {words[1] for words in called if words[0] == "lumina"} | {"completion"} & set(README.split())
    assert shown >= set(VERBS), "a verb is not shown"


def test_every_path_exists() -> None:
    words = [word for command in commands() for word in command] + code_spans()
    named = {word for word in words if REPOSITORY_PATH.fullmatch(word)} - NOT_IN_THE_REPOSITORY
    assert {"launch/quickstart.sh", "tests/run.sh", "LICENSE", "setup.py"} & named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_architecture_lists_what_exists() -> None:
    [listing] = [block for block in blocks("") if "ds_configs/" in block]
    listed = {line.split()[0] for line in listing.splitlines()}
    packages = {f"lumina_ds/{path.parent.name}/" for path in (ROOT / "lumina_ds").glob("*/__init__.py")}
    assert packages <= listed
    assert [path for path in listed if not (ROOT / path.rstrip(",")).exists()] == []


def test_short_options() -> None:
    expected = [
        [option.flag + (f" / --no-{option.flag[2:]}" if option.kind == "choice" else ""), option.field]
        for option in SHORT_OPTIONS
    ]
    assert table("option") == expected


def test_flags_of_the_original() -> None:
    """Every flag has its counterpart: the same option of `lumina train`, or commands that exist."""
    train = cli.get_command(click.Context(cli), "train")
    assert train is not None
    known = _flags(train)
    rows = table("original flag")
    for flags, ours in rows:
        if ours == "the same":
            assert set(flags.split(", ")) <= known, flags
        else:
            named = re.findall(r"lumina [a-z ]+[a-z]", ours)
            assert named and [fault for each in named for fault in option_faults(each.split())] == []
    assert len(rows) > 5


def test_presets() -> None:
    rows = {row[0]: row[1:] for row in table("preset")}
    assert sorted(rows) == preset_names()
    for name, (total, active, *shape) in rows.items():
        model = load_config(name).config.model
        counted = count_parameters(model)
        for shown, number in ((total, counted.total), (active, counted.active)):
            assert _number(shown) == pytest.approx(number, rel=0.01), f"{name}: {shown}, counted {number}"
        assert [int(value) for value in shape] == [
            model.hidden_size,
            model.num_hidden_layers,
            model.num_attention_heads,
            model.num_key_value_heads,
            model.num_experts,
            model.max_position_embeddings,
        ], name


def _number(text: str) -> float:
    return float(text[:-1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[text[-1]]


def test_deepspeed_configurations() -> None:
    named = [name for row in table("name") for name in row[0].split(", ")]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


def test_exit_codes() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    used = {error.exit_code for error in classes if issubclass(error, errors.LuminaError)} - {1}
    assert {int(row[0]) for row in table("code")} == used | {0}


def test_yaml_snippet_is_a_configuration(tmp_path: Path) -> None:
    [snippet] = blocks("yaml")
    (tmp_path / "run.yaml").write_text(snippet)
    resolved = load_config(str(tmp_path / "run.yaml"))
    assert resolved.config.preset == "b1"
    assert resolved.origins["train.learning_rate"].startswith("file ")


def test_python_snippet_reads_shards(tmp_path: Path) -> None:
    """With `datasets` and pyarrow, on shards made from the README's own example of a line."""
    pytest.importorskip("datasets")
    from lumina_ds.data.shards.manifest import Settings
    from preprocess.pipeline import preprocess_files
    from preprocess.train_tokenizer import train_tokenizer

    [line] = blocks("json")
    conversation = json.loads(line)
    lines = tmp_path / "chats.jsonl"
    with lines.open("w") as stream:
        for number in range(20):
            words = " ".join(f"{number * place % 17} words of it" for place in range(1, 9))
            conversation["messages"][1]["content"] = f"Hi, how are you? {words}"
            stream.write(json.dumps(conversation) + "\n")
    tokenizer = tmp_path / "tokenizer.model"
    train_tokenizer((str(lines),), 512, tokenizer, "bpe", None)
    folder = tmp_path / "quickstart" / "shards" / "train"
    folder.parent.mkdir(parents=True)
    preprocess_files((str(lines),), tokenizer, folder, Settings(seq_length=256))
    [snippet] = blocks("python")
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    columns, conversation_line = done.stdout.splitlines()
    assert columns == "['input_ids', 'loss_mask', 'num_tokens', 'source', 'line'] 20"
    assert conversation_line.startswith("chats.jsonl 1 [")
