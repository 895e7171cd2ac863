"""CSV and TSV: cells that are texts, cells that are JSON, and what is wrong with a row, with the file's own line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.data.shards.manifest import Settings
from lumina_ds.data.strict_json import RejectedLine, parse_object
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from preprocess.containers.separated import find_separator
from preprocess.pipeline import preprocess_files
from preprocess.sources import resolve_inputs
from preprocess.train_tokenizer import train_tokenizer
from preprocess.validation.validate import validate_files

TURNS = [{"role": "user", "content": 'a "b",\nc'}, {"role": "assistant", "content": "d"}]


def read(content: str | bytes, path: Path) -> list[Any]:
    """What each row is: an object, or the reason why it is none."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    (file,) = resolve_inputs([str(path)])
    found: list[Any] = []
    for line in b"".join(block.data for block in file.blocks(64)).splitlines():
        if not line.strip():
            continue
        try:
            found.append(parse_object(line))
        except RejectedLine as fault:
            found.append(fault.reason)
    return found


def quoted(value: object) -> str:
    return '"' + json.dumps(value).replace('"', '""') + '"'


def test_cells(tmp_path: Path) -> None:
    text = (
        "instruction,input,output,id\r\n"
        'one,,"a ""quoted"", cell\r\nof two lines",7\r\n'
        "[1],{},null, spaces \r\n"
        '"",x,y,\r\n'
        "\r\n"
        "last,line,without,end"
    )
    assert read(text, tmp_path / "a.csv") == [
        {"instruction": "one", "output": 'a "quoted", cell\r\nof two lines', "id": "7"},
        {"instruction": "[1]", "input": "{}", "output": "null", "id": " spaces "},
        {"input": "x", "output": "y"},
        {"instruction": "last", "input": "line", "output": "without", "id": "end"},
    ]


def test_lists_are_json(tmp_path: Path) -> None:
    text = f"messages,tools,source\n{quoted(TURNS)},,web\n{quoted(TURNS)},[],\n,,\n"
    assert read(text, tmp_path / "a") == [{"messages": TURNS, "source": "web"}, {"messages": TURNS, "tools": []}, {}]
    pretty = '"' + json.dumps(TURNS, indent=2).replace('"', '""') + '"'
    assert read(f"messages\n{pretty}\n", tmp_path / "b") == [{"messages": TURNS}]


def test_a_prompt_may_be_messages_and_is_a_text_otherwise(tmp_path: Path) -> None:
    rows = [TURNS[:1], ["[INST]"], [], [1, 2], {"role": 1}]
    text = "prompt,completion\n" + "".join(f"{quoted(row)},{quoted(TURNS[1:])}\n" for row in rows)
    assert [row["prompt"] for row in read(text, tmp_path / "a")] == [
        TURNS[:1], '["[INST]"]', "[]", "[1, 2]", {"role": 1},
    ]  # fmt: skip


def test_flags_may_be_numbers(tmp_path: Path) -> None:
    """As text they could say nothing here: a column of 0 would be refused in other words, one of 1 would be too."""
    text = "prompt,completion,weight,train\na,b,0,False\na,b,1,true\na,b,2,no\na,b,,\n"
    found = [{key: row[key] for key in row if key in ("weight", "train")} for row in read(text, tmp_path / "a")]
    assert found == [{"weight": 0, "train": False}, {"weight": 1, "train": True}, {"weight": "2", "train": "no"}, {}]


FAULTS = {
    "x,y,z\n": "line 2 of the file: 3 cells, and the header has 2; quote cells that hold a comma or a line end",
    "x\n": "line 2 of the file: 1 cells, and the header has 2; quote cells that hold a comma or a line end",
    '"a\nb",y,z\n': "lines 2 to 3 of the file: 3 cells, and the header has 2",
    '"a"b,y\n': "line 2 of the file: ',' expected after '\"'; double the quotes within a quoted cell",
    "a\0b,y\n": "line 2 of the file: a NUL byte",
    "caf\udce9,y\n": "line 2 of the file: invalid UTF-8; convert the file, perhaps from Latin-1",
}


@pytest.mark.parametrize("row", FAULTS)
def test_a_faulty_row_is_one_refused_row(row: str, tmp_path: Path) -> None:
    text = f"prompt,completion\n{row}good,row\n".encode("utf-8", "surrogateescape")
    fault, good = read(text, tmp_path / "a")
    assert fault.startswith(FAULTS[row]) and good == {"prompt": "good", "completion": "row"}


def test_a_cell_that_should_be_json(tmp_path: Path) -> None:
    """As pandas writes a list; and JSON whose faults only a strict reader sees."""
    rows = ["\"[{'role': 'user'}]\"", '"[1] [2]"', '"[{""a"": 1, ""a"": 2}]"', '"[""a\nb""]"', "[NaN]", "[" * 3000]
    found = read("messages,id\n" + "".join(f"{row},1\n" for row in rows), tmp_path / "a")
    says = ["'messages' is not JSON", "'messages' is not JSON", "stands twice", "'messages' is not JSON", "NaN is no"]
    for reason, words in zip(found, says, strict=False):
        assert words in reason, reason
    assert isinstance(found[5], str)


def test_where_faults_stand(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Rows are counted, as in every container, and the reason has the line of the file."""
    (tmp_path / "chats.csv").write_text('prompt,completion\n"two\nlines",a\nb\n' + "c,d\n" * 40)
    says = "chats.csv line 2: line 4 of the file: 1 cells, and the header has 2; quote cells that hold a comma or a line end"
    totals = preprocess_files(
        [str(tmp_path / "chats.csv")], tokenizer.path, tmp_path / "out", Settings(seq_length=64)
    ).totals
    assert (totals.lines, totals.conversations, totals.first_rejected) == (42, 41, {"unreadable row": says})
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [(entry["source"], entry["line"]) for entry in rejected] == [("chats.csv", 2)]
    examples = validate_files([str(tmp_path / "chats.csv")]).rules["unreadable row"].examples
    assert [(example.line, example.reason) for example in examples] == [(2, says.removeprefix("chats.csv line 2: "))]
    assert train_tokenizer([str(tmp_path / "chats.csv")], 300, tmp_path / "tok.model").vocab_size <= 300


def test_a_quote_that_is_never_closed_ends_the_run(tmp_path: Path) -> None:
    """All that follows would be one cell, and lost as one row."""
    for rest in ("x,y\n" * 100, "x,y\n" * 5_000_000):
        with pytest.raises(DataError, match=r"cannot read .*a.csv: the quote that opens in line 3 is not closed"):
            read('prompt,completion\na,b\n"c,d\n' + rest, tmp_path / "a.csv")


HEADERS = {
    "prompt,prompt,completion\n": "has two columns called 'prompt'; rename or remove one of them",
    'prompt,"comp\n': "the header cannot be read",
    "prompt,caf\udce9\n": "invalid UTF-8; convert the file, perhaps from Latin-1 .* in the header",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_without_sense_ends_the_run(header: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=HEADERS[header]):
        read(header.encode("utf-8", "surrogateescape") + b"a,b\n", tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("name", "head", "separator"),
    [
        ("chats", "prompt,completion\n", ","),
        ("chats", "completion\tprompt\r\n", "\t"),
        ("-", '"instruction";"output"\n', ";"),
        ("chats", "id,messages\n", ","),
        ("chats", "messages\n", ","),
        ("chats", '"conversations"\n', ","),
        ("chats.csv", "text\n", ","),
        ("chats.TSV", "a,b\n", "\t"),
        ("chats.tsv.gz", "text\n", "\t"),
        ("chats.csv", "prompt;completion\n", ";"),
        ("chats.csv", "prompt\tcompletion\n", "\t"),
        ("chats.csv", "a,b\n", ","),
        ("chats", "a,b\n", None),
        ("chats", "output\n", None),
        ("chats.jsonl", "Hello, output\n", None),
        ("chats", "", None),
        ("chats.csv", "", None),
        ("chats", "\n", None),
    ],
)
def test_what_is_taken_for_a_table(name: str, head: str, separator: str | None) -> None:
    assert find_separator(head.encode(), name) == separator


def test_lines_of_json_are_lines_whatever_the_name(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b,c"}
    assert read('{"prompt": "a", "completion": "b,c"}\n', tmp_path / "a.csv") == [row]
    assert read('\ufeff [{"prompt": "a", "completion": "b,c"}]\n', tmp_path / "b.tsv") == [row]


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    """As Excel writes it before the first name."""
    assert read("\ufeffprompt;completion\r\na;b\r\n", tmp_path / "a.csv") == [{"prompt": "a", "completion": "b"}]
    with pytest.raises(DataError, match="is UTF-16: it starts with"):
        read("prompt\tcompletion\n".encode("utf-16"), tmp_path / "a.txt")


def test_pieces_of_any_size(tmp_path: Path) -> None:
    """A cell, a line end and a character may end where a piece ends."""
    text = "prompt,completion\r\n" + 'é\u2028,"\r\n""x"""\r\n' * 30_000
    assert read(text, tmp_path / "a.csv") == [{"prompt": "é\u2028", "completion": '\r\n"x"'}] * 30_000
