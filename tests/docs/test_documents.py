"""The documents against the code: every command, option, path, table and snippet in them is real."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from documents import (
    DOCS,
    GENERATED,
    ROOT,
    all_pages,
    as_lumina,
    known_options,
    navigation,
    option_faults,
    read_page,
    split,
    table,
)

from lumina_ds import errors
from lumina_ds.cli.main import VERBS, cli
from lumina_ds.config.load import load_config, preset_names
from lumina_ds.config.options import SHORT_OPTIONS
from lumina_ds.plan.parameters import count_parameters

REPOSITORY_PATH = re.compile(
    r"(?:\.ci|docs|lumina_ds|preprocess|launch|tests|ds_configs)/[\w./-]*|[\w-]+\.(?:py|txt|md)|LICENSE"
)
# What commands on the pages write, or what a user brings.
NOT_IN_THE_REPOSITORY = {"tokenizer.model", "convert_hf_to_gguf.py", "memory.md", "my_module.py"}
# Sections of Hugging Face's and DeepSpeed's tools, in whose tables "here" is checked.
PEERS = ("axolotl", "LLaMA-Factory", "TRL")


def commands() -> Iterator[list[str]]:
    for page in all_pages():
        spans = [] if page.path.name in GENERATED else page.code_spans()
        for line in [*page.shown_commands(), *(span for span in spans if span.startswith(("lumina ", "bash ")))]:
            yield split(line)


def test_readme_is_short() -> None:
    assert len(read_page("README.md").text.splitlines()) <= 300


def test_every_page_is_in_the_menu() -> None:
    assert sorted(navigation()) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_checker_finds_wrong_commands() -> None:
    assert option_faults(split("lumina train --config debug --model.num_experts 8 -- --num_gpus 2")) == []
    assert "--confg" in option_faults(split("lumina train --confg debug"))[0]
    assert "--zero" in option_faults(split("lumina checkpoint verify runs/debug --zero 2"))[0]
    assert "merge" in option_faults(split("lumina checkpoint merge runs/debug"))[0]
    assert "teleport" in option_faults(split("lumina teleport"))[0]
    assert "--zer" in option_faults(split("deepspeed --num_gpus 2 launch/train.py --zer 1"))[0]
    assert "--zer" in option_faults(split("HOSTFILE=hosts bash launch/multi_node.sh --zer 1"))[0]


def test_every_command_exists() -> None:
    called = [words for words in map(as_lumina, commands()) if words[0] == "lumina"]
    assert len(called) > 50
    assert [fault for words in called for fault in option_faults(words)] == []
    shown = {words[1] for words in called} | {"completion"} & set(read_page("docs/install.md").text.split())
    assert shown >= set(VERBS), "a subcommand is not shown"


def test_every_path_exists() -> None:
    words = [word for command in commands() for word in command]
    words += [span for page in all_pages() for span in page.code_spans()]
    named = {word for word in words if REPOSITORY_PATH.fullmatch(word)} - NOT_IN_THE_REPOSITORY
    assert {"launch/quickstart.sh", "tests/run.sh", "constraints.txt"} <= named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_architecture_lists_what_exists() -> None:
    [listing] = [block for block in read_page("docs/architecture.md").blocks("") if "ds_configs/" in block]
    listed = {line.split()[0] for line in listing.splitlines()}
    packages = {f"lumina_ds/{path.parent.name}/" for path in (ROOT / "lumina_ds").glob("*/__init__.py")}
    assert packages <= listed
    assert [path for path in listed if not (ROOT / path.rstrip(",")).exists()] == []


def test_short_options() -> None:
    expected = [
        [option.flag + (f" / --no-{option.flag[2:]}" if option.kind == "choice" else ""), option.field]
        for option in SHORT_OPTIONS
    ]
    assert table("option", "docs/configuration.md") == expected


def test_flags_of_the_original() -> None:
    """Every flag has its counterpart: the same option of `lumina train`, or commands that exist."""
    known = _options_of_train()
    rows = table("original flag", "docs/moving-here.md")
    for flags, ours in rows:
        if ours == "the same":
            assert set(flags.split(", ")) <= known, flags
        else:
            named = re.findall(r"lumina [a-z ]+[a-z]", ours)
            assert named and [fault for each in named for fault in option_faults(each.split())] == []
    assert len(rows) > 5


@pytest.mark.parametrize("peer", PEERS)
def test_settings_of_other_tools_map_to_real_ones(peer: str) -> None:
    """Each row names an option of `lumina train`, a command, or says in words that there is nothing to set."""
    rows = table(peer, "docs/moving-here.md")
    assert len(rows) > 10
    known = _options_of_train()
    for theirs, ours in rows:
        options = re.findall(r"--[\w.-]+", ours)
        named = re.findall(r"lumina [a-z]+(?: [a-z]+)?", ours)
        assert set(options) <= known, f"{theirs}: {ours}"
        assert [fault for each in named for fault in option_faults(each.split()[:2])] == [], ours
        assert options or named or ours.startswith(("none", "always so", "not needed")), f"{theirs}: {ours}"


def _options_of_train() -> set[str]:
    train = cli.get_command(click.Context(cli), "train")
    assert train is not None
    return known_options(train)


def test_presets() -> None:
    rows = {row[0]: row[1:] for row in table("preset", "docs/configuration.md")}
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
    named = [name for row in table("name", "docs/parallelism.md") for name in row[0].split(", ")]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


def test_exit_codes() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    used = {error.exit_code for error in classes if issubclass(error, errors.LuminaError)} - {1}
    assert {int(row[0]) for row in table("code", "docs/when-something-goes-wrong.md")} == used | {0}


def test_yaml_snippets_are_configurations(tmp_path: Path) -> None:
    snippets = [block for page in all_pages() for block in page.blocks("yaml")]
    presets = []
    for snippet in snippets:
        (tmp_path / "run.yaml").write_text(snippet)
        resolved = load_config(str(tmp_path / "run.yaml"))
        presets.append(resolved.config.preset)
        assert any(origin.startswith("file ") for origin in resolved.origins.values())
    assert sorted(presets) == ["b1", "debug"]


def test_every_block_has_a_language_that_a_test_looks_at() -> None:
    """bash is executed, python, py, yaml and json are checked; the rest shows output, a layout or a listing."""
    allowed = {"bash", "python", "py", "yaml", "json", "text", ""}
    for page in all_pages():
        found = set(re.findall(r"^```(\w*)\n.*?^```$", page.text, re.MULTILINE | re.DOTALL))
        assert found <= allowed, page.name
        for block in [*page.blocks("text"), *page.blocks("")]:
            assert not re.match(r"(\$ |lumina |python |bash |pip )", block), f"{page.name} hides a command: {block}"


def test_python_snippet_reads_shards(tmp_path: Path) -> None:
    """With `datasets` and pyarrow, on shards made from the pages' own example of a line."""
    pytest.importorskip("datasets")
    from lumina_ds.data.shards.manifest import Settings
    from preprocess.pipeline import preprocess_files
    from preprocess.train_tokenizer import train_tokenizer

    [line] = {block for page in all_pages() for block in page.blocks("json") if "messages" in block}
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
    [snippet] = [block for page in all_pages() for block in page.blocks("python")]
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    columns, conversation_line = done.stdout.splitlines()
    assert columns == "['input_ids', 'loss_mask', 'num_tokens', 'source', 'line'] 20"
    assert conversation_line.startswith("chats.jsonl 1 [")
