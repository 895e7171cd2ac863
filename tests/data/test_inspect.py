"""The mask microscope: every position of a row with its label, on a terminal and as a page, whatever the text holds."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from lumina_ds.cli.main import cli, run_command
from lumina_ds.data.chat_template import encode_conversations
from lumina_ds.data.conversation import Conversation, Turn
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.report.data.mask_console import print_legend, print_row
from lumina_ds.report.data.mask_page import mask_page
from lumina_ds.report.data.mask_row import MaskRow, read_row
from lumina_ds.report.data.token_text import TokenText, spell_bytes
from lumina_ds.report.data.visible import visible

HOSTILE = "<script>alert(1)</script> <|assistant|> </s>"
ODD = "日本 👩‍👩‍👧\n\x00\x1b[31m\t\u202eab\u2581"


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Turn(role, content) for role, content in turns))  # type: ignore[arg-type]


CONVERSATIONS = [
    conversation(("system", "the dog"), ("user", "hello there"), ("assistant", "I am fine")),
    conversation(("user", HOSTILE), ("assistant", f"{ODD} {HOSTILE}")),
    conversation(("user", "how are you"), ("assistant", "thank you"), ("user", "the fox"), ("assistant", "jumps")),
]


@pytest.fixture
def folder(make_folder: Callable[..., Path], tokenizer: Tokenizer) -> ShardFolder:
    """One row of 512 that holds all three conversations."""
    return ShardFolder.open(make_folder(encode_conversations(CONVERSATIONS, tokenizer), 512))


@pytest.fixture
def row(folder: ShardFolder, tokenizer: Tokenizer) -> MaskRow:
    return read_row(folder, tokenizer, folder.packing(512), 0)


def test_every_position_by_hand(row: MaskRow) -> None:
    first = row.segments[0]
    assert (first.source, first.line, first.cut) == ("hand", 1, None)
    # BOS, then marker, content and end marker per turn
    expected = ["<s>"]
    roles: list[str | None] = [None]
    trained = [False]
    for role, content in (("system", "the dog"), ("user", "hello there"), ("assistant", "I am fine")):
        pieces = [token.shown for token in first.tokens if token.role == role][1:-1]
        assert "".join(pieces).strip() == content
        expected += [f"<|{role}|>", *pieces, "<|end|>"]
        roles += [role] * (len(pieces) + 2)
        trained += [False, *[role == "assistant"] * (len(pieces) + 1)]
    assert [token.shown for token in first.tokens] == expected
    assert [token.role for token in first.tokens] == roles
    assert [token.is_trained for token in first.tokens] == trained
    assert [token.position for segment in row.segments for token in segment.tokens] == list(range(512 - row.padding))
    assert row.segments[2].tokens[-1].label == "trained, assistant turn 4"
    assert first.tokens[0].label == "not trained"


def test_text_is_never_a_marker(row: MaskRow) -> None:
    """Text that spells a marker is text; the markers are two per turn and BOS."""
    for segment, spoken in zip(row.segments, CONVERSATIONS, strict=True):
        assert sum(token.kind == "marker" for token in segment.tokens) == 1 + 2 * len(spoken.turns)
    texts = [token for token in row.segments[1].tokens if token.kind != "marker"]
    assert "<|assistant|>" not in [token.shown for token in texts]


def test_bytes_are_spelled_with_their_character(row: MaskRow, tokenizer: Tokenizer) -> None:
    spelled = [token.shown for token in row.segments[1].tokens if token.kind == "byte" and token.role == "assistant"]
    assert spelled[:6] == ["E6", "97", "A5=日", "E6", "9C", "AC=本"]
    assert "00=␀" in spelled and "⏎" in spelled and "1B=␛" in spelled and "AE=\\u{202E}" in spelled
    assert "81=▁" in spelled  # U+2581 itself, not a space


def test_byte_level_pieces_read_as_text() -> None:
    """GPT-2's alphabet: Ġ is the space, Ċ the line end, and a character may be cut over several tokens."""
    pieces = {0: "a", 1: "Ġb", 2: "Ċ", 3: "Ġæ", 4: "Ĺ¥", 5: "Ã¤"}

    class ByteLevel:
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            assert texts == ["a b"]
            return [[0, 1]]

        def piece(self, token_id: int) -> str:
            return pieces[token_id]

    text = TokenText(ByteLevel())  # type: ignore[arg-type]
    assert [text.bytes_of(i, piece) for i, piece in pieces.items()] == [None, None, None, b" \xe6", b"\x97\xa5", None]
    assert [text.text_of(pieces[i]) for i in (0, 1, 2, 5)] == ["a", " b", "⏎", "ä"]
    assert list(spell_bytes([b" \xe6", b"\x97\xa5", None, b"\xe6", b"\xc3", b"\xa4", b"\n"])) == [
        "20E6", "97A5= 日", "", "E6", "C3", "A4=ä", "⏎",
    ]  # fmt: skip


def test_a_cut_conversation_says_which_part(make_folder: Callable[..., Path], tokenizer: Tokenizer) -> None:
    ids, mask = encode_conversations(CONVERSATIONS[2:], tokenizer)[0]
    folder = ShardFolder.open(make_folder([(ids, mask)], 512))
    plan = folder.packing(len(ids) - 2)
    segment = read_row(folder, tokenizer, plan, 0).segments[0]
    assert segment.cut == f"tokens 0 to {len(ids) - 3} of {len(ids)}"
    assert segment.num_trained == sum(mask) - 2


def test_first_token_of_a_later_piece_is_not_trained(folder: ShardFolder, tokenizer: Tokenizer) -> None:
    """Nothing in its row predicts it; it is the last target of the piece before."""
    from lumina_ds.data.packing import pack

    plan = pack(folder.lengths, folder.lengths * 0, 5, "none", "split")
    rows = [read_row(folder, tokenizer, plan, number) for number in range(plan.num_rows)]
    assert not any(segment.tokens[0].is_trained for row in rows for segment in row.segments)
    whole = sum(int(folder.document(number)[1].sum()) for number in range(3))
    assert sum(row.num_trained for row in rows) == whole
    # roles are known in the middle of a conversation too
    late = next(s for row in rows for s in row.segments if s.document == 2 and s.start > 8)
    assert late.tokens[0].role is not None


class Spans(HTMLParser):
    """Facts and text of every token on a page."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self._facts: tuple[str, str] | None = None
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        if "data-t" in given:
            self._facts = given["data-t"] or "", given.get("class") or ""

    def handle_data(self, data: str) -> None:
        if self._facts is not None:
            self.tokens.append((*self._facts, data))
            self._facts = None


def test_page(row: MaskRow) -> None:
    document = mask_page([row], "shards")
    assert "<script" not in document and not re.search(r"url\(|https?:|@import", document)
    spans = Spans(document)
    assert not {"script", "img", "link", "iframe"} & spans.tags
    tokens = [token for segment in row.segments for token in segment.tokens]
    assert [text for _, _, text in spans.tokens] == [token.shown for token in tokens]
    for (facts, style, _), token in zip(spans.tokens, tokens, strict=True):
        assert f"id {token.id} |" in facts and f"position {token.position} in the row" in facts
        assert facts.endswith(token.label) and ("y" in style.split()) == token.is_trained
    assert "hand line 2" in document and f"padding: {row.padding} positions" in document and "Legend" in document
    assert "\x1b" not in document and "\x00" not in document and "\u202e" not in document
    assert mask_page([row], "shards") == document


def shown(row: MaskRow, width: int, **options: object) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False, force_terminal=True, **options)  # type: ignore[arg-type]
    print_legend(console)
    print_row(row, console)
    return stream.getvalue()


@pytest.mark.parametrize("width", [40, 80])
def test_terminal_without_colours_puts_brackets_around_what_is_trained(row: MaskRow, width: int) -> None:
    from rich.cells import cell_len

    text = shown(row, width, color_system=None)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "\x1b" not in text and "\x00" not in text and "\u202e" not in text
    flat = re.sub(r"\s", "", text)
    assert "<|assistant|>⟦Iamfine<|end|>⟧" in flat and "⟦jumps<|end|>⟧" in flat
    assert flat.count("⟦") == 1 + 4  # the legend, and every assistant turn
    assert f"padding,{row.padding}positions" in flat and "handline3" in flat


def test_terminal_colours(row: MaskRow) -> None:
    text = shown(row, 80, color_system="truecolor")
    styles = re.findall(r"\x1b\[([\d;]+)m", text)
    assert len(set(styles)) >= 5 and "⟦" not in text
    # nothing but colours: what the text brings along is spelled out
    assert set(re.findall(r"\x1b\[?.", text)) <= {f"\x1b[{digit}" for digit in "0123456789"}


@pytest.fixture
def shards(folder: ShardFolder) -> Path:
    return folder.path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = run_command(cli, ["data", "inspect", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_rows_and_samples_at_the_command_line(
    shards: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(capsys, shards, "--json")
    row = json.loads(text)
    assert code == 0 and row["row"] == 0 and [s["line"] for s in row["segments"]] == [1, 2, 3]
    assert sum(s["length"] for s in row["segments"]) + row["padding"] == 512
    pieces = row["segments"][1]["pieces"]
    assert [visible(tokenizer.piece(i)) for i in row["segments"][1]["ids"]] == [visible(piece) for piece in pieces]
    first = run(capsys, shards, "--seq-length", 16, "--sample", 1, "--json")[1]
    assert first == run(capsys, shards, "--seq-length", 16, "--sample", 1, "--json")[1]
    rows = [row["row"] for row in json.loads(first)["rows"]]
    assert len(rows) == 1 and rows[0] in (0, 1)
    everything = json.loads(run(capsys, shards, "--seq-length", 16, "--sample", 99, "--json")[1])["rows"]
    assert [row["row"] for row in everything] == [0, 1]  # the second conversation trains nothing in 16 tokens
    code, text, _ = run(capsys, shards, "--html", tmp_path / "row.html")
    assert code == 0 and "row.html" in text and "Row 0" in (tmp_path / "row.html").read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--row", "9"], 2, "9 is beyond the last row, 0"),
        (["--row", "0", "--sample", "1"], 2, "--row and --sample exclude each other"),
        (["--html", "{shards}/manifest.json/x.html"], 4, "cannot write"),
    ],
)
def test_errors(words: list[str], code: int, message: str, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got, _, error = run(capsys, shards, *[word.format(shards=shards) for word in words])
    assert got == code and message in error and error.count("\n") == 1
