"""The offline stage end to end: exact, deterministic, reconciled, and never half-written."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lumina_ds.data.chat_template import encode_conversations
from lumina_ds.data.conversation import parse_conversation
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.manifest import Manifest, Settings
from lumina_ds.data.shards.verify import folder_faults
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from preprocess.pipeline import preprocess_files

BAD = {
    "": None,
    "  \r": None,
    "not json": "invalid JSON",
    '{"messages":[{"role":"user","content":"x"}]}': "no assistant turn",
    '{"messages":[{"role":"narrator","content":"x"}]}': "unknown role",
    '{"messages":[]}': "empty conversation",
}


def run(files: list[Path], tokenizer: Tokenizer, out: Path, seq_length: int = 64, **options: object) -> Manifest:
    names = Settings.model_fields.keys()
    settings = Settings(seq_length=seq_length, **{k: v for k, v in options.items() if k in names})  # type: ignore[arg-type]
    others = {name: value for name, value in options.items() if name not in names}
    return preprocess_files([str(file) for file in files], tokenizer.path, out, settings, **others)  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def mixed(tmp_path: Path, make_lines: Callable[..., list[str]]) -> Path:
    """120 good lines with every bad one after each 20th, CRLF on some."""
    path = tmp_path / "mixed.jsonl"
    lines = []
    for number, line in enumerate(make_lines(120, seed=3)):
        lines += [line + "\r" * (number % 3 == 0)] + (list(BAD) if number % 20 == 0 else [])
    path.write_bytes("\n".join(lines).encode())
    return path


def test_documents_are_exactly_the_templates(mixed: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    run([mixed], tokenizer, tmp_path / "out", block_bytes=3000)
    folder = ShardFolder.open(tmp_path / "out")
    lines = mixed.read_bytes().split(b"\n")
    assert folder.num_documents == 120
    for index in range(120):
        source, line = folder.origin(index)
        expected = encode_conversations([parse_conversation(lines[line - 1])], tokenizer)[0]
        assert source == "mixed.jsonl"
        assert tuple(column.tolist() for column in folder.document(index)) == expected


def test_rejected_lines_reconcile(mixed: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    totals = run([mixed], tokenizer, tmp_path / "out", block_bytes=3000).totals
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert (totals.lines, totals.conversations, totals.rejected) == (144, 120, 24) and len(rejected) == 24
    rules = [rule for rule in BAD.values() if rule]
    assert totals.rejected_by_rule == {rule: 6 for rule in sorted(rules)}
    data = mixed.read_bytes()
    for entry in rejected:
        text = data[entry["byte_offset"] :].split(b"\n")[0]
        assert text == data.split(b"\n")[entry["line"] - 1]
        assert BAD[text.decode()] == entry["rule"]
        assert entry["source"] == "mixed.jsonl" and entry["reason"]


def test_same_bytes_for_any_number_of_workers(
    mixed: Path, chats: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from preprocess import workers as module

    options = {"eval_fraction": 0.2, "max_conversations": 300, "block_bytes": 4000}
    outputs = []
    for workers, in_threads in ((1, True), (2, True), (7, True), (3, False)):
        monkeypatch.setattr(module, "can_scan", lambda in_threads=in_threads: in_threads)
        out = tmp_path / f"elsewhere-{workers}" / "out"
        run([mixed, chats], tokenizer, out, num_workers=workers, **options)
        outputs.append(content(out))
    assert all(output == outputs[0] for output in outputs)
    assert {"manifest.json", "shard-00000.arrow", "packing-64.arrow", "tokenizer.model", "rejected.jsonl"} <= set(
        outputs[0]
    )
    assert {"eval/manifest.json", "eval/shard-00000.arrow", "eval/tokenizer.model"} <= set(outputs[0])


def test_datasets_opens_the_shards(chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    run([chats], tokenizer, tmp_path / "out", block_bytes=5000)
    rows = datasets.Dataset.from_file(str(tmp_path / "out/shard-00000.arrow"))
    assert rows.column_names == ["input_ids", "loss_mask", "num_tokens", "source", "line"] and len(rows) == 300
    for index in (0, 150, 299):
        expected = encode_conversations([parse_conversation(chats.read_bytes().split(b"\n")[index])], tokenizer)[0]
        assert (rows[index]["input_ids"], rows[index]["loss_mask"]) == expected
        assert (rows[index]["source"], rows[index]["line"]) == ("chats.jsonl", index + 1)


def test_gzip_gives_the_same_shards(chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    compressed = tmp_path / "zipped" / "chats.jsonl"
    compressed.parent.mkdir()
    compressed.write_bytes(gzip.compress(chats.read_bytes()))
    run([chats], tokenizer, tmp_path / "a", block_bytes=5000)
    run([compressed], tokenizer, tmp_path / "b", block_bytes=5000)
    assert content(tmp_path / "a")["shard-00000.arrow"] == content(tmp_path / "b")["shard-00000.arrow"]


def test_eval_split_is_by_content(chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_bytes(chats.read_bytes() * 2)
    totals = run([doubled], tokenizer, tmp_path / "out", eval_fraction=0.25).totals
    train, held_out = (ShardFolder.open(path) for path in (tmp_path / "out", tmp_path / "out/eval"))
    assert totals.lines == 600 == totals.conversations + totals.held_out
    assert 100 < totals.held_out < 200 and held_out.num_documents == totals.held_out
    texts = [{bytes(f.document(i)[0]) for i in range(f.num_documents)} for f in (train, held_out)]
    assert not texts[0] & texts[1], "a conversation stands on both sides"
    assert held_out.manifest.split == "eval" and folder_faults(held_out.path) == folder_faults(train.path) == []


@pytest.mark.parametrize("limit", [1, 7, 119, 500])
def test_max_conversations(mixed: Path, tokenizer: Tokenizer, tmp_path: Path, limit: int) -> None:
    again = mixed.with_name("again.jsonl")
    again.write_bytes(mixed.read_bytes())
    totals = run([mixed, again], tokenizer, tmp_path / "out", max_conversations=limit, block_bytes=3000).totals
    assert totals.conversations == min(limit, 240) == ShardFolder.open(tmp_path / "out").num_documents
    # lines after the last accepted one are not read, so not counted
    assert totals.rejected == {1: 0, 7: 4, 119: 24, 500: 48}[limit]


def test_shards_roll_over(chats: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = tmp_path / "many.jsonl"
    many.write_bytes(chats.read_bytes() * 40)
    rolled = run([many], tokenizer, tmp_path / "rolled", shard_size_mb=1, block_bytes=100_000)
    single = run([many], tokenizer, tmp_path / "single", shard_size_mb=1, disable_sharding=True, block_bytes=100_000)
    assert len(single.shards) == 1 and len(rolled.shards) == 2
    assert rolled.shards[0].size_bytes >= 1 << 20
    one, other = (ShardFolder.open(tmp_path / name) for name in ("rolled", "single"))
    assert one.lengths.tolist() == other.lengths.tolist()
    last = one.num_documents - 1
    assert one.document(last)[0].tolist() == other.document(last)[0].tolist() and one.origin(last) == other.origin(last)


def test_packing_of_the_folder_equals_one_made_later(chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    run([chats], tokenizer, tmp_path / "a", seq_length=32)
    run([chats], tokenizer, tmp_path / "b", seq_length=48)
    ShardFolder.open(tmp_path / "b").packing(32)
    assert content(tmp_path / "a")["packing-32.arrow"] == content(tmp_path / "b")["packing-32.arrow"]


def test_finished_folder_is_kept_or_refused(chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run([chats], tokenizer, out)
    inode = os.stat(out).st_ino
    assert run([chats], tokenizer, out, num_workers=2) == first and os.stat(out).st_ino == inode
    with pytest.raises(DataError, match=r"holds other shards \(seq_length 64, not 32\); use --overwrite"):
        run([chats], tokenizer, out, seq_length=32)
    chats.write_text(chats.read_text() * 2)
    with pytest.raises(DataError, match=r"other input files, or other contents"):
        run([chats], tokenizer, out)
    assert run([chats], tokenizer, out, overwrite=True).totals.conversations == 600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "out"]


def test_a_folder_of_something_else_is_never_replaced(chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="exists and is no shard folder"):
        run([chats], tokenizer, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/thesis.txt").exists()


@pytest.mark.parametrize(("text", "message"), [
    ("", "is empty"),
    ("\n\r\n", "is empty"),
    ("a,b\n1,2\n", r"in.jsonl is not JSONL: no line of it is JSON \(first: in.jsonl line 1: invalid JSON"),
    ('{"messages":[{"role":"user","content":"x"}]}\n' * 3, r"no assistant turn anywhere in .*in.jsonl"),
    ('{"messages":[]}\nx', r"every line of .*in.jsonl was rejected \(first: in.jsonl line 1: 'messages' is empty\)"),
])  # fmt: skip
def test_nothing_to_train(text: str, message: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        run([tmp_path / "in.jsonl"], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.tmp-*"))


def test_a_run_that_ends_on_the_way_says_how_far_it_came(mixed: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"by rule: .*; no more than the first \d+ lines? looked at\)"):
        run([mixed], tokenizer, tmp_path / "out", max_rejected=0)
    with pytest.raises(DataError, match="more than --max-rejected 0%") as raised:
        run([mixed], tokenizer, tmp_path / "out", max_rejected=0.0)
    assert "looked at" not in str(raised.value)


def test_max_rejected_keeps_the_reasons(mixed: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    run([mixed], tokenizer, tmp_path / "enough", max_rejected=24)
    with pytest.raises(DataError, match=r"more than --max-rejected 23 \(first: mixed.jsonl line 4: invalid JSON"):
        run([mixed], tokenizer, tmp_path / "out", max_rejected=23)
    assert len((tmp_path / "out.rejected.jsonl").read_text().splitlines()) == 24
    assert not (tmp_path / "out").exists()


def test_nothing_fits_a_row(chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has a trained token within --seq-length 2"):
        run([chats], tokenizer, tmp_path / "out", seq_length=2)


def test_an_empty_split_is_an_error(tokenizer: Tokenizer, tmp_path: Path, make_lines: Callable[..., list[str]]) -> None:
    (tmp_path / "few.jsonl").write_text("\n".join(make_lines(3)))
    with pytest.raises(DataError, match=r"--eval-fraction 0.001 of 3 conversations leaves none for evaluation"):
        run([tmp_path / "few.jsonl"], tokenizer, tmp_path / "out", eval_fraction=0.001)


@pytest.mark.parametrize("moment", ["starts", "imports", "works"])
def test_a_killed_worker_is_reported(
    chats: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """While it starts, while it imports, and at work; and the run leaves no process and no thread that waits."""
    from lumina_ds.errors import MachineError
    from preprocess import workers

    many = tmp_path / "many.jsonl"
    many.write_bytes(chats.read_bytes() * 1600)  # many blocks: still at work when the last ones are killed
    monkeypatch.setattr(workers, "can_scan", lambda: False)  # else workers are threads
    killer = threading.Thread(target=kill_workers, args=(moment, tmp_path / "out.partial" / "journal"))
    killer.start()
    with pytest.raises(MachineError, match="worker was killed"):
        run([many], tokenizer, tmp_path / "out", num_workers=2, block_bytes=1 << 19)
    killer.join()
    assert not multiprocessing.active_children()
    assert not [thread for thread in threading.enumerate() if "call-process" in thread.name]


def kill_workers(moment: str, journal: Path) -> None:
    while not (workers := multiprocessing.active_children()):
        time.sleep(0.01)
    while not (
        moment == "starts"
        or (moment == "imports" and "libarrow" in Path(f"/proc/{workers[0].pid}/maps").read_text())
        or (journal.exists() and journal.read_bytes().count(b"\n") > 2)
    ):
        time.sleep(0.005)
    for worker in workers:
        worker.kill()
