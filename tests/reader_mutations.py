"""Damaged and lying files by seed, for every reader of files that somebody else wrote, and what must hold of each.

PYTHONPATH=.:tests python tests/reader_mutations.py shards 0 5000      by hand: seeds 0 to 4,999 of one reader

The files themselves are made by the project's own writers. A case changes one of them or several: fields of documents, bytes,
columns, names, the kind of a file; in half of the cases all digests are computed again, as one who lies would. What comes
out is one line of a typed error, or content that an independent look finds in its range. Tokenizers have their own
(tests/data/tokenizer_mutations.py).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from lumina_ds.errors import LuminaError

MOST_SECONDS = 5  # of processor time for one case
MOST_BYTES = 3 << 30  # of address space above what the imports took

NAMES = [
    "../x",
    "/etc/passwd",
    "/dev/zero",
    ".",
    "",
    "a/b",
    "a\0b",
    "é" * 300,
    "x" * 300,
    "step-00000001",
    "manifest.json",
]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**40, 0.5, -0.5, 1e-320, 1e308,
    math.nan, math.inf, -math.inf, "", "x", "8", "auto", "\ud800", "\n", "\x1b[31m", "x" * 5000, [], {}, [[]], [None], [1, "a"],
    [-1, 2], {"a": 1}, {"": None}, *NAMES,
]  # fmt: skip


class Hang(BaseException):
    """Not an Exception: nothing in between takes it for an error of the file."""


# --- changes ---------------------------------------------------------------------------------------------------------


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document of JSON."""
    found: list[tuple[Any, Any]] = []
    pending = [document]
    while pending:
        one = pending.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            pending.append(one[key])
    return found


def change_document(document: Any, dice: random.Random) -> Any:
    """The document after one to three changes; another document for some seeds."""
    if dice.random() < 0.03:
        return dice.choice(VALUES)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        options = places(document)
        if not options:
            return document
        container, key = dice.choice(options)
        value = container[key]
        kind = dice.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1:
            other, its = dice.choice(options)
            if its in other if isinstance(other, dict) else its < len(other):
                container[key] = copy.deepcopy(other[its])
        elif kind == 2 and isinstance(container, dict):
            container[dice.choice(["later", "", "\n", str(key).upper(), f"{key}_", *NAMES])] = container.pop(key)
        elif kind == 3 and isinstance(value, (int, float)) and not isinstance(value, bool):
            container[key] = dice.choice(
                (value + 1, value - 1, -value, value * 2, value * 10**9, float(value), str(value))
            )
        elif kind == 4:
            container[key] = [value] * dice.choice((1, 2, 1000))
        elif kind == 5:
            for _ in range(dice.choice((5, 40, 120, 200))):
                value = {"a": value} if dice.random() < 0.5 else [value]
            container[key] = value
        else:
            container[key] = dice.choice(VALUES)
    return document


def text_of(document: Any, dice: random.Random) -> str:
    """JSON with what no writer of ours spells, by chance: NaN, a key twice, numbers and depth without end."""
    try:
        text = json.dumps(document)
    except RecursionError:
        text = "[" * 100_000
    if dice.random() < 0.05:
        text = text.replace("{", '{"format": 1, "format": 2, ', 1)
    if dice.random() < 0.03:
        text = text.replace("1", "1" * dice.choice((500, 5000, 500_000)), 1)
    if dice.random() < 0.03:
        text = dice.choice(('{"a":', "[", "[[1],")) * 100_000
    return text


def change_bytes(content: bytes, dice: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at = dice.randrange(len(content) + 1)
        size = dice.choice((1, 1, 2, 4, 8, 64, 1000))
        kind = dice.randrange(7)
        if kind == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << dice.randrange(8)
        elif kind == 1:
            content[at : at + size] = bytes(dice.choice((0, 255, 128, 10)) for _ in range(size))
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            del content[at : at + size]
        elif kind == 4:
            content[at:at] = content[:size]
        elif kind == 5:
            content += bytes(size)
        else:
            content[at : at + 8] = dice.choice((2**63 - 1, 2**31, 0, 2**64 - 1, 1 << 40)).to_bytes(8, "little")
    return bytes(content)


def change_kind(path: Path, dice: random.Random) -> None:
    """Put something else in the place of a file."""
    content = path.read_bytes()
    path.unlink()
    kind = dice.randrange(7)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(dice.choice(("/dev/zero", "/etc/passwd", path.name, "nowhere", "/dev/tty")))
    elif kind == 2:
        (path.parent.parent / "elsewhere").write_bytes(content)
        path.symlink_to(path.parent.parent / "elsewhere")
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        path.write_bytes(b"")
    elif kind == 5:
        path.write_bytes(content)
        (path.parent / dice.choice(("extra", f"{path.name}.tmp", "packing-9.arrow", "a\nb"))).write_bytes(content)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def change_a_file(folder: Path, dice: random.Random) -> None:
    path = dice.choice(files_in(folder))
    if dice.random() < 0.15:
        change_kind(path, dice)
    elif path.suffix == ".json" and dice.random() < 0.8:
        document = change_document(json.loads(path.read_text()), dice)
        path.write_bytes(text_of(document, dice).encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(change_bytes(path.read_bytes(), dice))


def sealed(document: Any) -> Any:
    """A manifest with the digest of its content."""
    if not isinstance(document, dict):
        return document
    content = {name: value for name, value in document.items() if name != "digest"}
    return content | {"digest": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def size_and_digest(path: Path) -> tuple[int, str]:
    content = path.read_bytes()
    return len(content), hashlib.sha256(content).hexdigest()


def one_line(error: LuminaError) -> str:
    text = str(error)
    assert text and len(text) < 8000, repr(text)
    lines = text.split("\n  - ")
    assert all("\n" not in line and "\x1b" not in line and "\0" not in line for line in lines), repr(text)
    return f"refused: {type(error).__name__}"


# --- readers ---------------------------------------------------------------------------------------------------------


class Reader:
    """`make` writes sound files into a folder once; `change` damages a copy of it; `look` reads the copy and checks."""

    def make(self, folder: Path) -> None:
        raise NotImplementedError

    def change(self, folder: Path, dice: random.Random) -> None:
        raise NotImplementedError

    def look(self, folder: Path) -> str:
        raise NotImplementedError


class Shards(Reader):
    """A folder with its held-out part, as `lumina preprocess` makes it."""

    SEQ = 64

    def make(self, folder: Path) -> None:
        from tiny_corpus import write_conversations

        from lumina_ds.cli.main import cli, run_command

        chats = write_conversations(folder.parent / "chats.jsonl", 60)
        model = folder.parent / "tok.model"
        assert run_command(cli, ["tokenizer", "train", str(chats), "--vocab-size", "400", "--out", str(model)]) == 0
        words = [
            "preprocess",
            str(chats),
            "--tokenizer",
            str(model),
            "--seq-length",
            str(self.SEQ),
            "--num-workers",
            "1",
        ]
        assert run_command(cli, [*words, "--eval-fraction", "0.1", "--out", str(folder)]) == 0

    def change(self, folder: Path, dice: random.Random) -> None:
        import numpy as np
        import pyarrow as pa

        kind = dice.randrange(4)
        part = folder / "eval" if dice.random() < 0.2 else folder
        if kind == 0:
            change_a_file(folder, dice)
        elif kind == 1:  # columns of a shard
            path = part / "shard-00000.arrow"
            table = pa.ipc.open_stream(path.read_bytes()).read_all()
            columns = {name: table.column(name).combine_chunks() for name in table.column_names}
            name = dice.choice(["input_ids", "loss_mask"])
            values = columns[name].values.to_numpy(zero_copy_only=False).copy()
            at = dice.randrange(len(values))
            values[at] = dice.choice((0, 1, 2, 200, 255, 399, 400, 65535)) & (255 if name == "loss_mask" else 65535)
            offsets = columns[name].offsets.to_numpy().copy()
            # Offsets beyond the column cannot be made with Arrow; changed bytes have them.
            if is_cut := dice.random() < 0.4:
                offsets[dice.randrange(1, len(offsets) - 1)] += dice.choice((-1, 1, 2))
            own_type = table.schema.field(name).type.value_type
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, own_type))
            if dice.random() < 0.2:
                counts = np.asarray(columns["num_tokens"]).copy()
                counts[dice.randrange(len(counts))] = dice.choice((0, 1, 2**31 - 1))
                columns["num_tokens"] = pa.array(counts, table.schema.field("num_tokens").type)
            changed = pa.Table.from_arrays(list(columns.values()), schema=table.schema)
            options = pa.ipc.IpcWriteOptions(compression=dice.choice((None, None, None, "zstd", "lz4")))
            with pa.ipc.new_stream(str(path), table.schema, options=options) as writer:
                writer.write_table(changed, max_chunksize=1000 if is_cut else dice.choice((3, 1000)))
        elif kind == 2:  # a plan's columns
            from lumina_ds.data.shards.packing_file import read_packing, write_packing

            path = part / f"packing-{self.SEQ}.arrow"
            plan = read_packing(path)
            plan = dataclasses.replace(plan, **{name: np.array(getattr(plan, name)) for name in COLUMNS})  # not mapped
            values = getattr(plan, dice.choice(COLUMNS))
            values[dice.randrange(len(values))] = dice.choice((0, 1, 5, 63, 64, 65, 1000, -1, 2**31 - 1))
            write_packing(plan, path)
        else:  # bytes of a file, or a manifest's fields, under digests that hold
            path = dice.choice([part / "manifest.json", part / "manifest.json", *files_in(part)])
            if path.name == "manifest.json":
                document = change_document(json.loads(path.read_text()), dice)
                path.write_bytes(json.dumps(sealed(document)).encode("utf-8", "surrogatepass"))
                return
            path.write_bytes(change_bytes(path.read_bytes(), dice))
        if dice.random() < 0.8:
            self.reseal(part)

    @staticmethod
    def reseal(part: Path) -> None:
        try:
            document = json.loads((part / "manifest.json").read_text())
            for entry in document["shards"] + document["files"]:
                if (part / entry["file"]).is_file():
                    entry["size_bytes"], entry["sha256"] = size_and_digest(part / entry["file"])
            (part / "manifest.json").write_text(json.dumps(sealed(document)))
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            return  # what is left cannot be sealed

    def look(self, folder: Path) -> str:
        import pyarrow as pa

        from lumina_ds.data.loader import PackedRows
        from lumina_ds.data.shards.folder import ShardFolder
        from lumina_ds.data.shards.verify import tree_faults

        try:
            faults = tree_faults(folder)
            for fault in faults:
                assert "\n" not in fault and len(fault) < 2000, fault
        except LuminaError as error:
            faults = [one_line(error)]
        read = ""
        for streaming in (False, True):  # whoever reads trusts no digest
            try:
                rows = PackedRows(ShardFolder.open(folder, streaming), self.SEQ)
                for row in range(0, rows.num_rows, 3):
                    rows.collate([row, -1])
                    rows.origins(row)
            except LuminaError as error:
                read = one_line(error)
        if faults:
            return "faults found"
        assert not read, f"intact, and cannot be read: {read}"
        for part in (folder, folder / "eval"):  # an independent look
            manifest = json.loads((part / "manifest.json").read_text())
            tokens = 0
            for entry in manifest["shards"]:
                table = pa.ipc.open_stream((part / entry["file"]).read_bytes()).read_all()
                table.validate(full=True)
                ids, mask = (table.column(name).combine_chunks().flatten() for name in ("input_ids", "loss_mask"))
                assert pa.compute.max(ids).as_py() < manifest["tokenizer"]["vocab_size"]
                assert pa.compute.max(mask).as_py() <= 1
                tokens += len(ids)
            assert tokens == manifest["totals"]["tokens"]
        return "accepted"


COLUMNS = ("documents", "starts", "lengths", "row_offsets")


class Checkpoints(Reader):
    """Two step folders of one rank, as a save publishes them."""

    VALUES = 8

    def make(self, folder: Path) -> None:
        import torch
        from manifests import make_manifest

        from lumina_ds.checkpoint.pieces import optimizer_file_name
        from lumina_ds.checkpoint.publish import begin, publish
        from lumina_ds.checkpoint.saved_state import PieceRecord, pieces_metadata
        from lumina_ds.checkpoint.tensor_file import CheckpointFile

        for step in (1, 2):
            staging = begin(folder / "checkpoints", step)
            file = optimizer_file_name(0)
            record = PieceRecord(shape=[self.VALUES], start=0, numel=self.VALUES, keys=["weight"], scalars={})
            tensors = {"a/weight": torch.arange(float(self.VALUES))}
            entry = CheckpointFile(file, tensors, pieces_metadata({"a": record})).write(staging)
            publish(staging, make_manifest(step=step, files={file: entry.model_dump()}), keep=9)

    def change(self, folder: Path, dice: random.Random) -> None:
        step = folder / "checkpoints" / "step-00000002"
        path = step / "manifest.json"
        if dice.random() < 0.5:
            document = change_document(json.loads(path.read_text()), dice)
            if dice.random() < 0.8:
                document = sealed(document)
            path.write_bytes(text_of(document, dice).encode("utf-8", "surrogatepass"))
            return
        data = next(file for file in files_in(step) if file.suffix == ".safetensors")
        kind = dice.randrange(3)
        if kind == 0:
            change_a_file(step, dice)
        elif kind == 1:
            data.write_bytes(change_bytes(data.read_bytes(), dice))
        else:
            content = data.read_bytes()
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size])
            metadata = header["__metadata__"]
            for name, value in metadata.items():  # documents inside the header
                try:
                    inner = json.loads(value)
                except ValueError:
                    continue
                if dice.random() < 0.5:
                    metadata[name] = json.dumps(change_document(inner, dice))
            if dice.random() < 0.6:
                header = change_document(header, dice)
            written = json.dumps(header).encode("utf-8", "surrogatepass")
            data.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + size :])
        if dice.random() < 0.8 and path.is_file():
            try:
                document = json.loads(path.read_text())
                for name, entry in document["files"].items():
                    entry["bytes"], entry["sha256"] = size_and_digest(step / name)
                path.write_text(json.dumps(sealed(document)))
            except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
                return

    def look(self, folder: Path) -> str:
        import torch
        from safetensors import safe_open

        from lumina_ds.checkpoint.consolidate import consolidate
        from lumina_ds.checkpoint.format import checkpoint_faults, find_checkpoint, newest_valid, step_summaries
        from lumina_ds.checkpoint.manifest import read_manifest

        step = folder / "checkpoints" / "step-00000002"
        faults = checkpoint_faults(step)
        assert all("\n" not in fault and len(fault) < 2000 for fault in faults), faults
        newest = newest_valid(folder / "checkpoints")
        assert newest is not None and newest.name == ("step-00000001" if faults else "step-00000002")
        assert find_checkpoint(folder) == newest
        step_summaries([step])
        if not faults:
            manifest = read_manifest(step)
            assert manifest.step == 2 and all(math.isfinite(loss) for loss in manifest.health.losses)
            for read in (manifest.shape, manifest.run_config, lambda: manifest.chat_template(step)):
                try:
                    read()
                except LuminaError as error:
                    one_line(error)
        if faults:
            return "faults found"
        out = folder / "whole"
        try:
            consolidate(step, out, torch.float32)
        except LuminaError as error:
            assert not out.exists(), "a refused result was left"
            return one_line(error)
        # The reader of another make finds the same in both files.
        [saved], [written] = ([file for file in files_in(at) if file.suffix == ".safetensors"] for at in (step, out))
        with safe_open(saved, "pt") as pieces, safe_open(written, "pt") as whole:
            [piece], [name] = pieces.keys(), whole.keys()
            assert torch.equal(
                pieces.get_tensor(piece).float().nan_to_num(), whole.get_tensor(name).flatten().nan_to_num()
            )
        return "accepted"


class Models(Reader):
    """A folder in Hugging Face's format, as `lumina export` makes it."""

    def make(self, folder: Path) -> None:
        import torch
        from safetensors.torch import save_file
        from tiny_corpus import write_conversations

        from lumina_ds.cli.main import cli, run_command
        from lumina_ds.config.schema import ModelConfig
        from lumina_ds.export.folder import export_model
        from lumina_ds.model.transformer import CausalLM

        chats = write_conversations(folder.parent / "chats.jsonl", 20)
        file = folder.parent / "tok.model"
        assert run_command(cli, ["tokenizer", "train", str(chats), "--vocab-size", "400", "--out", str(file)]) == 0
        shape = ModelConfig.model_validate(
            {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            | {"num_key_value_heads": 1, "num_experts": 2, "moe_intermediate_size": 16, "max_position_embeddings": 64}
        )
        network = CausalLM(shape)
        (folder.parent / "ours").mkdir()
        tensors = {name: torch.randn_like(value) * 0.1 for name, value in network.named_parameters()}
        save_file(tensors, folder.parent / "ours" / "model-0.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "model-0.safetensors")}
        (folder.parent / "ours" / "model.safetensors.index.json").write_text(json.dumps(index))
        export_model(shape, folder.parent / "ours", file, folder)

    def change(self, folder: Path, dice: random.Random) -> None:
        weights = next(file for file in files_in(folder) if file.suffix == ".safetensors")
        kind = dice.randrange(5)
        if kind < 2:
            path = folder / "config.json"
            document = change_document(json.loads(path.read_text()), dice)
            path.write_bytes(text_of(document, dice).encode("utf-8", "surrogatepass"))
        elif kind == 2:
            content = weights.read_bytes()
            size = int.from_bytes(content[:8], "little")
            header = change_document(json.loads(content[8 : 8 + size]), dice)
            written = json.dumps(header).encode("utf-8", "surrogatepass")
            weights.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + size :])
        else:
            change_a_file(folder, dice)

    def look(self, folder: Path) -> str:
        from safetensors import safe_open

        from lumina_ds.export.start_folder import import_model

        out = folder.parent / "start"
        try:
            made = import_model(folder, out)
        except LuminaError as error:
            assert not out.exists(), "a refused import left its folder"
            return one_line(error)
        model = made["model"]
        assert 0 < model["num_hidden_layers"] <= 10_000 and 0 < model["vocab_size"] < 2**31
        numbers = 0
        for file in files_in(out):
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as whole:
                    numbers += sum(math.prod(whole.get_slice(name).get_shape()) for name in whole.keys())  # noqa: SIM118
        assert numbers == counted_by_hand(model), (numbers, model)
        return "accepted"


def counted_by_hand(model: dict[str, Any]) -> int:
    """Parameters of a model of the kind that Models makes, from its shape alone."""
    width, heads, kv = model["hidden_size"], model["num_attention_heads"], model["num_key_value_heads"]
    head = model.get("head_dim") or width // heads
    attention = width * head * (heads + 2 * kv) + heads * head * width + (2 * head if model.get("qk_norm") else 0)
    dense = 3 * width * (model.get("intermediate_size") or 0)
    experts = model["num_experts"] * (3 * width * model["moe_intermediate_size"] + width)
    layers, first = model["num_hidden_layers"], model.get("first_k_dense_layers") or 0
    feed_forward = layers * dense if not model["num_experts"] else first * dense + (layers - first) * experts
    embeddings = model["vocab_size"] * width * (1 if model["tie_word_embeddings"] else 2)
    return embeddings + layers * (attention + 2 * width) + feed_forward + width


class Settings(Reader):
    """A run's YAML, and the DeepSpeed JSON that it names."""

    def make(self, folder: Path) -> None:
        from lumina_ds.config.load import load_config
        from lumina_ds.config.yaml_file import yaml_text

        folder.mkdir()
        (folder / "run.yaml").write_text(yaml_text(load_config("debug", []).config.model_dump()))
        (folder / "ds.json").write_text(
            json.dumps(
                {
                    "train_micro_batch_size_per_gpu": "auto",
                    "gradient_clipping": 1.0,
                    "bf16": {"enabled": "auto"},
                    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
                    "zero_optimization": {
                        "stage": 3,
                        "offload_optimizer": {"device": "cpu", "pin_memory": True},
                        "stage3_param_persistence_threshold": 1e5,
                        "reduce_bucket_size": 5e8,
                    },
                }
            )
        )

    def change(self, folder: Path, dice: random.Random) -> None:
        import yaml

        if dice.random() < 0.4:
            path = folder / "ds.json"
            if dice.random() < 0.7:
                text = text_of(change_document(json.loads(path.read_text()), dice), dice)
                path.write_bytes(text.encode("utf-8", "surrogatepass"))
            else:
                path.write_bytes(change_bytes(path.read_bytes(), dice))
            return
        path = folder / "run.yaml"
        kind = dice.randrange(4)
        if kind == 0:
            path.write_bytes(change_bytes(path.read_bytes(), dice))
            return
        if kind == 1:
            lines = path.read_text().splitlines()
            at = dice.randrange(len(lines))
            lines.insert(at, dice.choice(lines + YAML_LINES))
            path.write_text("\n".join(lines))
            return
        document = change_document(yaml.safe_load(path.read_text()), dice)
        try:
            text = yaml.safe_dump(document) if kind == 2 else json.dumps(document)
        except (RecursionError, yaml.YAMLError, ValueError):
            text = "a: " + "[" * 100_000
        path.write_bytes(text.encode("utf-8", "surrogatepass"))

    def look(self, folder: Path) -> str:
        from lumina_ds.config.deepspeed.report import report_on_file, report_on_run
        from lumina_ds.config.load import Override, load_config
        from lumina_ds.config.schema import RunConfig

        ends = []
        try:
            config = load_config(str(folder / "run.yaml"), []).config
            assert RunConfig.model_validate(config.model_dump()) == config
            ends.append("accepted")
        except LuminaError as error:
            ends.append(one_line(error))
        json_file = str(folder / "ds.json")
        try:
            alone = report_on_file(json_file)
            override = Override("deepspeed.config", json_file, "--deepspeed.config")
            report = report_on_run(
                load_config("debug", [override, Override("deepspeed.zero_stage", None, "-")]).config, 2, "fp32"
            )
            assert all("\n" not in fault and len(fault) < 8000 for fault in (*alone.faults, *report.faults))
            assert (report.composed is None) is bool(report.faults)
            if report.composed is not None:
                assert json.loads(json.dumps(report.composed, allow_nan=False)) == report.composed
            ends.append("faults" if report.faults else "accepted")
        except LuminaError as error:
            ends.append(one_line(error))
        return "accepted" if ends == ["accepted", "accepted"] else " / ".join(ends)


YAML_LINES = [
    "<<: *x", "a: &x [1]", "b: *x", "? [a]", "%YAML 1.1", "---", "...", "!!bool x", "model: !!map [1]", "train: {<<: {a: 1}}", "\tx: 1",
    "run: &r {<<: *r}", "model:", "  vocab_size: 0x10", "  learning_rate: .nan", "  name: 2020-01-01", "  seed: 1_0", "'a': \"\\ud800\"",
    "- 1", "train: [" + "1, " * 30_000 + "]", "x: " + "9" * 10_000,
]  # fmt: skip

READERS: dict[str, Callable[[], Reader]] = {
    "shards": Shards,
    "checkpoints": Checkpoints,
    "models": Models,
    "settings": Settings,
}


# --- running ---------------------------------------------------------------------------------------------------------


def on_alarm(_: int, __: FrameType | None) -> None:
    raise Hang(f"more than {MOST_SECONDS} s of processor time")


def run(name: str, first: int, count: int) -> Counter[str]:
    """Try seeds `first` to `first + count - 1`. Ends with the seed and its traceback where something does not hold."""
    ends: Counter[str] = Counter()
    reader = READERS[name]()
    slowest = (0.0, -1)
    with tempfile.TemporaryDirectory() as scratch:
        sound = Path(scratch) / "made" / "sound"
        sound.parent.mkdir()
        reader.make(sound)
        case = Path(scratch) / "case" / "files"

        def fresh() -> None:
            shutil.rmtree(case.parent, ignore_errors=True)
            shutil.copytree(sound, case)

        fresh()
        assert reader.look(case) == "accepted", "the files themselves"
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, hard))
        signal.signal(signal.SIGPROF, on_alarm)
        for seed in range(first, first + count):
            fresh()
            began = time.process_time()
            try:
                reader.change(case, random.Random(f"{name} {seed}"))
                signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
                ends[reader.look(case)] += 1
            except BaseException:
                signal.setitimer(signal.ITIMER_PROF, 0)
                print(f"{name} {seed}\n{traceback.format_exc()}", file=sys.stderr)
                if not os.environ.get("GO_ON"):
                    sys.exit(1)
                ends["failed"] += 1
            signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, (time.process_time() - began, seed))
    print(f"slowest: seed {slowest[1]}, {slowest[0]:.2f} s", file=sys.stderr)
    return ends


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
