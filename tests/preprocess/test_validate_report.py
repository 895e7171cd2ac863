"""The HTML pages: whole, self-contained, escaped, the same every time, and with the numbers of the data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.manifest import Settings
from lumina_ds.data.shards.verify import tree_faults
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from lumina_ds.report.data.distribution import Distribution
from lumina_ds.report.data.svg import histogram
from lumina_ds.report.page import escape
from preprocess.pipeline import preprocess_files
from preprocess.validation.page import write_report
from preprocess.validation.validate import validate_files

HOSTILE = "</code><script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\""
VOID = {"meta", "br", "img", "input", "link"}


class Page(HTMLParser):
    """Tags in order, text, and a check that every element is closed where it should be."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def check_self_contained(document: str) -> Page:
    page = Page(document)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert not re.search(r"url\(|@import|https?:|<script", document)
    assert "default-src 'none'" in document and "prefers-color-scheme: dark" in document and "@media print" in document
    return page


@pytest.fixture
def inputs(chats: Path, tmp_path: Path) -> Path:
    """300 good conversations, a hostile one twice, and a refused line that is hostile too."""
    messages = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": f"{HOSTILE}\x00"}]
    path = tmp_path / "inputs.jsonl"
    lines = [chats.read_text().rstrip("\n"), *[json.dumps({"messages": messages})] * 2, HOSTILE]
    path.write_text("\n".join([*lines, json.dumps({"messages": [{"role": HOSTILE, "content": "x"}]})]))
    return path


@pytest.fixture
def shards(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    preprocess_files([str(inputs)], tokenizer.path, tmp_path / "shards", Settings(seq_length=64, eval_fraction=0.1))
    return tmp_path / "shards"


def test_page_of_validation(inputs: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    findings = validate_files([str(inputs)], tokenizer.path, 64)
    write_report(findings, tmp_path / "report.html")
    document = (tmp_path / "report.html").read_text()
    page = check_self_contained(document)
    assert "302" in page.text and "of 304 lines" in page.text  # a good line is one of the 300 or the hostile pair
    assert findings.tokens is not None and f"{findings.tokens.sum:,}" in page.text
    assert page.tags.count("svg") == 3 and page.tags.count("figcaption") == 3
    # the same numbers as a table beside every plot
    for distribution in (findings.tokens, findings.trained_percent, findings.turns):
        assert distribution is not None
        for b in distribution.bins(40):
            assert f'<td class="text">{escape(b.label)}</td><td class="number">{b.count:,}</td>' in document
    assert escape(HOSTILE[:20]) in document and "unknown role" in page.text and "line 303" in page.text
    write_report(validate_files([str(inputs)], tokenizer.path, 64), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == document.encode()


def test_page_of_validation_without_a_tokenizer(chats: Path, tmp_path: Path) -> None:
    write_report(validate_files([str(chats)]), tmp_path / "report.html")
    page = check_self_contained((tmp_path / "report.html").read_text())
    assert "Characters per conversation" in page.text and "Tokens per conversation" not in page.text


def test_page_when_nothing_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("[1]\n[2]\n")
    write_report(validate_files([str(tmp_path / "bad.jsonl")]), tmp_path / "report.html")
    page = check_self_contained((tmp_path / "report.html").read_text())
    assert "not an object" in page.text and "svg" not in page.tags


def test_page_of_a_shard_folder(shards: Path, tmp_path: Path) -> None:
    write_report(shards, tmp_path / "report.html")
    document = (tmp_path / "report.html").read_text()
    page = check_self_contained(document)
    folder = ShardFolder.open(shards)
    totals, plan = folder.manifest.totals, folder.packing(64)
    for shown in (f"{totals.conversations:,}", f"{totals.tokens:,}", f"{plan.num_rows:,}", f"{plan.fullness:.2%}"):
        assert shown in page.text
    assert f"{totals.held_out} held out in eval/" in page.text
    for rule, count in totals.rejected_by_rule.items():
        assert f"{rule}: {count}" in page.text
    assert "inputs.jsonl line 304" in page.text and page.tags.count("svg") == 4
    # a page outside the folder, or made twice, changes nothing
    write_report(str(shards), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == document
    assert tree_faults(shards) == []


def test_pages_at_the_command_line(
    shards: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert run_command(cli, ["data", "stats", str(shards), "--seq-length", "32", "--html", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seq_length"] == 32
    assert "of 32 tokens" in check_self_contained(page.read_text()).text
    assert run_command(cli, ["validate", str(inputs), "--report", str(page), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["errors"] == 2  # written although the data is faulty
    assert "Validation" in check_self_contained(page.read_text()).text


def test_a_damaged_folder_gives_no_page(shards: Path, tmp_path: Path) -> None:
    (shards / "manifest.json").unlink()
    with pytest.raises(DataError, match="has no manifest"):
        write_report(shards, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", ["{", "[1]\n", "{}\n", "\xff"])
def test_damaged_refusals_give_no_page(content: str, shards: Path, tmp_path: Path) -> None:
    (shards / "rejected.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"rejected\.jsonl is damaged"):
        write_report(shards, tmp_path / "report.html")


def heights(svg: str) -> list[float]:
    return [float(value) for value in re.findall(r'<rect [^>]*height="([\d.]+)"', svg)]


def test_bars_are_as_high_as_their_counts() -> None:
    svg = histogram("A <title>", Distribution([1, 2, 2, 2, 4, 4]).bins(), "tokens", (3, "mark"))
    Page(svg)
    first, second, third = heights(svg)  # a bin without values has no bar
    assert (second / first, third / first) == (pytest.approx(3, rel=1e-2), pytest.approx(2, rel=1e-2))
    assert "A &lt;title&gt;" in svg and "<title>2: 3</title>" in svg
    # four bins from 64 to 720: the border of 3 is the middle
    assert '<line class="mark" x1="392.0"' in svg


def test_a_mark_outside_the_plot_is_left_out() -> None:
    assert 'class="mark"' not in histogram("t", Distribution([1, 2]).bins(), "tokens", (4096, "mark"))


@pytest.mark.parametrize("values", [[0], [5] * 10, [1, 10**9], list(range(5000))], ids=["0", "5", "far", "many"])
def test_any_distribution_is_drawn(values: list[int], make_page: Callable[[str], Page]) -> None:
    svg = histogram("t", Distribution(values).bins(40), "tokens")
    make_page(svg)
    assert all(0 < height <= 190.1 for height in heights(svg)) and heights(svg)


@pytest.fixture
def make_page() -> Callable[[str], Page]:
    return Page
