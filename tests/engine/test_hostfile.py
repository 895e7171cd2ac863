"""What a hostfile, --include and --exclude may say: what passes means the same to DeepSpeed, the rest is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumina_ds.engine.hostfile import MAX_SLOTS, check_filter, read_hostfile
from lumina_ds.engine.resources import hosts_over_ssh, local_slots, planned_resources
from lumina_ds.errors import ConfigError

BOM = b"\xef\xbb\xbf"
NO_NAME = "is no host's name; use letters, digits, '.', '-' and '_'"
NO_LINE = "is no host with its slots; write one line `HOST slots=N` per machine"


@pytest.mark.parametrize(
    ("content", "hosts"),
    [
        (b"a slots=2\nb slots=3 # the small one\n", {"a": 2, "b": 3}),
        (b"# two\r\n\r\nnode-1.example.org\tslots=8\r\n  10.0.0.2   slots=04\r\n", {"node-1.example.org": 8, "10.0.0.2": 4}),
        ("# \u00e9\na_b slots=1".encode(), {"a_b": 1}),
        (f"a slots={MAX_SLOTS}\n".encode(), {"a": MAX_SLOTS}),
        (b"7 slots=1\n_x slots=1\n", {"7": 1, "_x": 1}),
        (b"h" * 253 + b" slots=1\n", {"h" * 253: 1}),
    ],
)  # fmt: skip
def test_what_passes_is_what_deepspeed_reads(content: bytes, hosts: dict[str, int], tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_bytes(content)
    assert list(read_hostfile(str(path)).items()) == list(fetch_hostfile(str(path)).items()) == list(hosts.items())


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"a slots=1\n-oProxyCommand=touch${IFS}x slots=1\n", 2, f"'-oProxyCommand=touch${{IFS}}x' {NO_NAME}"),
        *(
            (f"{name} slots=1\n".encode(), 1, NO_NAME)
            for name in ("a,b", "a[1-3]", "^file", "/x/", "a;b", "`x`", "$(x)", "a'b", 'a"b', "%h", "a\\b", "a/b", ".", "!",
                         "\u043d", "\u202ea", "a\x00", "a\x1b[31m", "h" * 254)
        ),
        (b"ssh:a slots=1", 1, NO_NAME),
        (b"root@a slots=1", 1, "'root@a' names a user; write the host alone, and the user into ~/.ssh/config"),
        (b"fe80::1%eth0 slots=1", 1, "is an IPv6 address, which pdsh does not take; give the host a name in ~/.ssh/config"),
        (b"[::1] slots=1", 1, "is an IPv6 address"),
        (b"# a\n\na\n", 3, f"'a' {NO_LINE}"),
        *(
            (f"a {slots}\n".encode(), 1, NO_LINE)
            for slots in ("slots=", "slots=-1", "slots=4x", "slots=1.5", "slots=1e3", "slots = 2", "slots=\u0664", "Slots=1",
                          "slots=4 max_slots=8", "slots=4#x", "slots=1 slots=2", "slots=" + "9" * 30)
        ),
        (b"a slots=0\n", 1, f"slots=0 is not from 1 to {MAX_SLOTS}; give the number of GPUs of a"),
        (b"a slots=1025\n", 1, "slots=1025 is not from 1"),
        (b"a slots=2\nb slots=1\nA slots=3\n", 3, "A stands in line 1 already; give all its slots in one line"),
        (BOM + b"a slots=1\n", 1, "begins with a byte order mark; save it as UTF-8 without one"),
        (b"a slots=1\n\xff slots=1\n", 2, "is not UTF-8"),
        ("a slots=1\n".encode("utf-16"), 1, "is not UTF-8"),
    ],
)  # fmt: skip
def test_anything_else_is_one_line_with_file_and_line(content: bytes, line: int, says: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        planned_resources(["--hostfile", str(path)])
    text = str(error.value)
    assert text.startswith(f"--hostfile {path}, line {line}: ") and says in text
    assert text.isprintable() and len(text) < 400


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"# nobody\n")
    (tmp_path / "large").write_bytes(b"# x\n" * 300_000)
    for name, says in (
        ("empty", "names no host; write one"), ("large", "is larger than 1048576 bytes"), ("", "is no file"), ("none", "does not"),
    ):  # fmt: skip
        for option in ("--hostfile", "-H", "--hostf"):
            with pytest.raises(ConfigError, match=says):
                planned_resources([option, str(tmp_path / name)])


def test_the_default_hostfile_of_deepspeed_is_read_as_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.launcher import runner

    path = tmp_path / "job"
    monkeypatch.setattr(runner, "DLTS_HOSTFILE", str(path))
    real = runner.parse_args
    monkeypatch.setattr(runner, "parse_args", lambda words: real(["--hostfile", str(path), *words]))
    assert list(planned_resources([])) == ["localhost"]
    path.write_text("a slots=1\nb;c slots=1\n")
    with pytest.raises(ConfigError, match="line 2: 'b;c' is no host's name"):
        planned_resources([])


@pytest.mark.parametrize("text", ["", "a", "a:0", "a:1,0@b:0", "b@a"])
def test_filters_that_pass(text: str) -> None:
    check_filter("--include", text, {"a": 2, "b": 1})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("c", "no host 'c'; the hosts are a, b"), ("a:2", "a has no slot 2; its slots are 0 to 1"), ("a:0,0", "names a host or"),
        ("a@a:1", "'a:1' names a host or slot again"), *((text, "is not HOST or HOST:SLOT,SLOT; separate hosts by @") for text in
        ("a:", "a:x", ":0", "a:0@", "@", "a:0:1", "a:-1", "a:0,", "a:\u0661")), ("a b", "no host 'a b'"), ("-a", "no host '-a'"),
    ],
)  # fmt: skip
def test_filters_that_do_not(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_filter("--exclude", text, {"a": 2, "b": 1})
    assert str(error.value).startswith("--exclude ") and says in str(error.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--include a --exclude b", "exclude one another"),
        ("--exclude a@b", "--exclude a@b leaves no slot of any host"),
        ("--include a --num_gpus 1", "--num_gpus goes with neither --include nor --exclude"),
        ("--exclude a:0 --num_nodes 1", "--num_nodes goes with neither"),
        ("--num_gpus 0", "--num_gpus 0 starts nothing"),
        ("--num_nodes -3", "--num_nodes -3 starts nothing"),
        ("--num_nodes 3", "--num_nodes 3 are more than the 2 hosts"),
        ("--no_ssh", "--node_rank -1 is none of the 2 hosts"),
        ("--no_ssh --node_rank 2", "--node_rank 2 is none of the 2 hosts"),
        ("--master_port 65536", "--master_port 65536 is no port"),
        ("--launcher rsh", "--launcher rsh is none of pdsh, openmpi"),
    ],
)
def test_what_deepspeed_would_end_on_or_pass_over(words: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=1\n")
    with pytest.raises(ConfigError) as error:
        local_slots(["--hostfile", str(tmp_path / "hosts"), *words.split()])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_whom_ssh_must_reach(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=1\n")
    (tmp_path / "one").write_text("a slots=2\n")

    def found(words: str, name: str = "hosts") -> tuple[tuple[str, ...], str | None, int | None, str | None] | None:
        remote = hosts_over_ssh(["--hostfile", str(tmp_path / name), *words.split()])
        return None if remote is None else (remote.hosts, remote.launcher, remote.port, remote.asked)

    assert found("") == (("a", "b"), "pdsh", None, "a")
    assert found("--master_addr a --ssh_port 22") == (("a", "b"), "pdsh", 22, None)
    # DeepSpeed tests ssh to a single host too, which starts its ranks without.
    assert found("", "one") == found("--include a") == (("a",), None, None, "a")
    assert found("--force_multi --master_addr x --launcher OpenMPI", "one") == (("a",), "openmpi", None, None)
    assert found("--no_ssh_check --exclude a") == ((), None, None, "b")
    assert found("--no_ssh --node_rank 0") is None and hosts_over_ssh(["--num_gpus", "2"]) is None
