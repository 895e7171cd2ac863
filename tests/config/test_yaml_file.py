"""Every YAML file is read right, or is one line with its place, in bounded time and memory: faults.md S1."""

from __future__ import annotations

import os
import resource
import time

import pytest

from lumina_ds.config.load import Override, load_config
from lumina_ds.config.yaml_file import MAX_YAML_BYTES, parse_yaml_value, read_yaml, yaml_text
from lumina_ds.errors import ConfigError

NINE = ", ".join(["*a{0}"] * 9)


def chain(line: str, count: int) -> str:
    return "a0: &a0 {x: 1}\n" + "".join(line.format(n - 1, this=n) for n in range(1, count))


def refusal(tmp_path, text: str | bytes) -> str:
    """The one line of the refusal; within 5 seconds of CPU and 300 MB, whatever the file."""
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    began, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(path)) and error.value.exit_code == 2
    return message.removeprefix(f"{path} is not valid YAML: ").removeprefix(str(path))


BOMBS = [
    (
        chain("a{this}: &a{this}\n  <<: [" + NINE + "]\n", 30),
        "once its aliases are written out; remove them, at line 9",
    ),
    (
        chain("a{this}: &a{this} [" + NINE + "]\n", 30),
        "once its aliases are written out; remove them, at line 5, column 5",
    ),
    (chain("a{this}: &a{this} [*a{0}]\n", 3000), "nested deeper than 32 levels with its aliases, at line 32"),
    ("a: &me {b: [*me]}", "aliases are written out"),
    ("a: &me {<<: *me}", "aliases are written out"),
    ("a: " + "[" * 500_000, "nested deeper than 32 levels, at line 1, column 35: 'a: [["),
    ("- " * 100_000, "nested deeper than 32 levels, at line 1"),
    ("? " * 100_000, "nested deeper than 32 levels, at line 1"),
    ("{a: " * 100_000, "nested deeper than 32 levels, at line 1"),
    ("a: [" + "1," * 500_000 + "1]", "it holds above 20000 values, at line 1, column 39999"),
    ("\n".join(f"k{n}: &x{n} 1" for n in range(51_000)), "it holds above 20000 values, at line 10000"),
    ("#" * (MAX_YAML_BYTES + 1), " is larger than 1,048,576 bytes; give a file of settings"),
    ("a: " + "1" * 1_000_000, "a number of 1000000 digits is beyond any use; quote a text, at line 1, column 4"),
]


@pytest.mark.parametrize(("text", "fault"), BOMBS, ids=range(len(BOMBS)))
def test_a_bomb_is_refused_at_once(tmp_path, text, fault):
    assert fault in refusal(tmp_path, text)


def test_sixty_to_the_power_of_a_long_text_is_a_text(tmp_path):
    """YAML 1.1 reads 1:01:01 in base sixty, in a time that grows with the square of its length."""
    (tmp_path / "run.yaml").write_text("a: 1" + ":01" * 300_000)
    began = time.process_time()
    assert len(read_yaml(tmp_path / "run.yaml")["a"]) == 900_001
    assert time.process_time() - began < 5


TAGS = ["!!bool x", "!!timestamp x", "!!map [1]", "!!set {x}", "!!omap [x: 1]", "!!binary eA==", "!!int x", "!!seq {}"]
TAGS += [
    "!!python/object/apply:os.getcwd []",
    "!!python/name:os.getcwd",
    "!foo 1",
    "!!merge x",
    "!!null x",
    "!!float x",
]


@pytest.mark.parametrize("value", TAGS)
def test_a_tag_that_does_not_fit_or_is_not_taken(tmp_path, value):
    tag = value.split(" ")[0]
    expected = f"tag {tag} does not fit its value, or is none of !!str, !!int, !!float, !!bool, !!null, !!seq, !!map; remove it"
    assert refusal(tmp_path, f"b: 1\na: {value}\n") == f"{expected}, at line 2, column 4: {f'a: {value}'!r}"


PLACES = [
    ("a: 1\na: 2\n", "key 'a' stands twice; remove one, at line 2, column 1: 'a: 2'"),
    ("1: x\n'1': y\n", "key '1' stands twice; remove one, at line 2, column 1: \"'1': y\""),
    ("b: 1\n? [a]\n: 1\n", "a key must be a word, at line 2, column 3: '? [a]'"),
    ("a: x\0y\n", "character U+0000 stands in it; remove it, at line 1, column 5: 'a: x\\x00y'"),
    ("a:\n\tb: 1\n", "a tab stands where YAML wants spaces; write spaces, at line 2, column 1: '\\tb: 1'"),
    ("a: 1\n---\nb: 1\n", "a second document begins; keep one in a file, at line 2, column 1: '---'"),
    ("- 1\n", " holds a list, not a mapping of sections, at line 1, column 1: '- 1'"),
    ("hello\n", " holds one value, not a mapping of sections, at line 1, column 1: 'hello'"),
    (
        "a: [1, 2\n",
        "expected ',' or ']', but got '<stream end>' while parsing a flow sequence, at line 1, column 4: 'a: [1, 2'",
    ),
    ("a: b: c\n", "mapping values are not allowed here, at line 1, column 5: 'a: b: c'"),
    ("a: *x\n", "found undefined alias 'x', at line 1, column 4: 'a: *x'"),
    ("a: {<<: 3}\n", "<< merges mappings, and this is none, at line 1, column 9: 'a: {<<: 3}'"),
    ("a: 017\n", "017 begins with 0, which some read as octal; write 0o17 or 15, or quote a text, at line 1, column 4"),
    ("a: -08\n", "-08 begins with 0, which some read as octal"),
    ("a: 1e999\n", "1e999 is beyond the range of a number; write one between 1e-307 and 1e308, at line 1"),
    ("a: 1e-999\n", "1e-999 is beyond the range of a number"),
    ('a: "\\UFFFFFFFF"\n', "an escape there stands for no character, at line 1"),
    ('a: "\\ud800"\n', "half of a surrogate pair stands for no character"),
    ("a: ! 12\n", "tag ! is not taken; quote a text, or remove it, at line 1, column 4"),
    ("%YAML 2.0\n---\na: 1\n", "found incompatible YAML document (version 1.* is required), at line 1"),
    (b"b: 1\na: caf\xe9\n", " is not UTF-8: byte 0xe9 in line 2; save it in that encoding"),
    ("a: 1\n".encode("utf-16"), " is not UTF-8: byte 0xff in line 1"),
    ("a: 1\rb: 2\ra: 3\r", "key 'a' stands twice; remove one, at line 3, column 1: 'a: 3'"),
    ("a: 1\r\n" + "x" * 500 + ": [\r\n", "at line 3, column 1"),
]


@pytest.mark.parametrize(("text", "fault"), PLACES, ids=range(len(PLACES)))
def test_a_fault_names_its_line(tmp_path, text, fault):
    assert refusal(tmp_path, text).startswith(fault) or fault in refusal(tmp_path, text)


WORDS = {
    "0o17": 15, "0x1f": 31, "0b11": 3, "1_000": 1000, "+1": 1, "-3": -3, "0": 0, "1e-4": 1e-4, "1e5": 1e5, "1.": 1.0,
    ".5": 0.5, "-1.5E-3": -1.5e-3, "1_000.5": 1000.5, "0e-999": 0.0, ".inf": float("inf"), "-.INF": float("-inf"),
    "true": True, "False": False, "yes": "yes", "no": "no", "on": "on", "OFF": "OFF", "y": "y", "null": None, "~": None, "": None,
    "1:30": "1:30", "190:20:30.15": "190:20:30.15", "2024-01-01": "2024-01-01", "2024-01-01T10:00:00Z": "2024-01-01T10:00:00Z",
    "007x": "007x", "1e": "1e", ".": ".", "=": "=", "'017'": "017", '"yes"': "yes", "!!str 017": "017", "!!float 3": 3.0,
    "!!int 3": 3, "!!bool true": True, "!!null ~": None, "!!str": "", "NaN": "NaN", "1__0": 10,
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_plain_word_means_what_yaml_1_2_says(tmp_path, word):
    (tmp_path / "run.yaml").write_text(f"a: {word}\n")
    [value] = read_yaml(tmp_path / "run.yaml").values()
    assert (value, type(value)) == (WORDS[word], type(WORDS[word]))


@pytest.mark.parametrize(
    "text", ["0o17", "1e5", "017", "1_000", "yes", "1:30", ".5", "null", "2024-01-01", "a: b", "é", "x\ny"]
)
def test_what_is_written_is_read_again(tmp_path, text):
    (tmp_path / "run.yaml").write_text(yaml_text({"a": text, "b": [text, 1, 1e-5, None, True]}))
    assert read_yaml(tmp_path / "run.yaml") == {"a": text, "b": [text, 1, 1e-5, None, True]}


def test_merge_keys_and_aliases_are_obeyed(tmp_path):
    text = "b: &b {x: 1, y: 2, w: 0}\nc: &c {x: 5, z: 6}\na: {y: 3, <<: [*b, *c]}\nd: *b\n'<<': text\n"
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    values = read_yaml(tmp_path / "run.yaml")
    assert values["a"] == {"x": 1, "y": 3, "w": 0, "z": 6} and values["d"] == {"x": 1, "y": 2, "w": 0}
    assert values["<<"] == "text"


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "---\n", "~\n", "{}\n"])
def test_an_empty_file_says_what_to_write(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    assert read_yaml(tmp_path / "run.yaml") == {}
    with pytest.raises(ConfigError, match="is empty; write `preset: NAME` or fields into it"):
        load_config(str(tmp_path / "run.yaml"))


def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ConfigError, match=r"is a (FIFO|folder), not a plain file"):
            read_yaml(path)
    with pytest.raises(ConfigError, match="a device, not a plain file"):
        read_yaml(type(tmp_path)("/dev/zero"))


FIELDS = [
    ("train: {seed: true}", "train.seed is True (file {0}, line 2, column 9: 'train: {{seed: true}}'): give a number, not true or"),
    ("deepspeed: {zero_stage: true}", "deepspeed.zero_stage is True"),
    ("train: {seed: 1:30}", "train.seed is '1:30' (file {0}, line 2, column 9: 'train: {{seed: 1:30}}'): input should be a valid"),
    ("train: {seed: 99999999999999999999}", "a whole number is at most 2^53"),
    ("train: {learning_rate: .inf}", "train.learning_rate is inf (file {0}, line 2"),
    ("train: {learning_rate: .nan}", "train.learning_rate is nan (file {0}, line 2"),
    ("run: {name: 2024}", "run.name is 2024 (file {0}, line 2, column 7: 'run: {{name: 2024}}'): input should be a valid string; quote it"),
    ("1: x", "unknown field 1 (file {0}, line 2, column 1: '1: x')"),
    ("train.seed: 3", "unknown field train.seed (file {0}, line 2, column 1: 'train.seed: 3'); in a file, write the section's name"),
    ("data:\n  sources:\n  - name: a\n    pahts: x", "unknown field data.sources.0.pahts (file {0}, line 5, column 5: '    pahts: x'); did"),
    ("data: {sources: [5]}", "data.sources.0 is 5 (file {0}, line 2, column 18"),
    ("train: {<<: {seed: x}}", "train.seed is 'x' (file {0}, line 2, column 14"),
    ("model: {num_experts: 1000000000}", "model.num_experts is 1000000000 (file {0}, line 2"),
    ("\n".join(f"k{n}: 1" for n in range(2000)), "2000 faults:\n  - unknown field k0"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "fault"), FIELDS, ids=range(len(FIELDS)))
def test_a_wrong_value_names_its_line(tmp_path, text, fault):
    path = tmp_path / "run.yaml"
    path.write_text(f"preset: debug\n{text}\n")
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert fault.format(path) in str(error.value) and len(str(error.value)) < 6000


def test_a_command_line_is_read_by_the_same_rules():
    assert [parse_yaml_value(text) for text in ("1e-4", "on", "[a, 1]")] == [1e-4, "on", ["a", 1]]
    config = load_config(
        "debug", [Override("train.seed", "017", "--seed"), Override("run.name", "1e5", "--name")]
    ).config
    assert (config.train.seed, config.run_name) == (17, "1e5")
    for text in ("[" * 100_000, "&a [*a]", "1e999", "x: y: z"):
        with pytest.raises(ConfigError, match=r"train.seed is '"):
            load_config("debug", [Override("train.seed", text, "--seed")])


def test_a_faulty_preset_of_ones_own_is_named_by_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMINA_PRESETS", str(tmp_path))
    path = tmp_path / "mine.yaml"
    for text, fault in (
        ("model: 5", f"model is 5 (file {path}, line 1, column 1: 'model: 5')"),
        (
            "preset: b1",
            f"{path}: a preset begins from no other; write its fields out, at line 1, column 1: 'preset: b1'",
        ),
        ("model: {a: !!set {x}}", f"{path} is not valid YAML: tag !!set does not fit"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as error:
            load_config("mine")
        assert fault in str(error.value)
