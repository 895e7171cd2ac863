"""The hosts of a run: what a hostfile, --include and --exclude may say, and how ssh is asked about one of them.

DeepSpeed hands a host's name to ssh and pdsh as it is read (deepspeed/launcher/runner.py), where a leading hyphen is an
option, a comma another host, and a colon or a bracket a notation of pdsh's. So names have a strict alphabet here, and
everything that passes means the same to DeepSpeed.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from lumina_ds.errors import ConfigError

MAX_SLOTS = 1024
_MAX_BYTES = 1 << 20
_FORM = "write one line `HOST slots=N` per machine"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}")
_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,9})(\s+#.*)?")
_FILTER = re.compile(r"([^:]+)(?::([0-9]{1,9}(?:,[0-9]{1,9})*))?")


def read_hostfile(path: str) -> dict[str, int]:
    """Slots of every host, in the file's order. Empty lines, and what follows `#`, are comments.

    Raises ConfigError, a line with the file, the line's number and the value.
    """
    hosts: dict[str, int] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(_text(path).split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"--hostfile {path}, line {number}"
        if (found := _LINE.fullmatch(line)) is None:
            raise ConfigError(f"{where}: {_shown(line)} is no host with its slots; {_FORM}")
        host, slots = found[1], int(found[2])
        if fault := host_fault(host):
            raise ConfigError(f"{where}: {fault}")
        if not 0 < slots <= MAX_SLOTS:
            raise ConfigError(
                f"{where}: slots={found[2]} is not from 1 to {MAX_SLOTS}; give the number of GPUs of {host}"
            )
        # A host's name is the same in capitals.
        if (first := lines.setdefault(host.lower(), number)) != number:
            raise ConfigError(f"{where}: {host} stands in line {first} already; give all its slots in one line")
        hosts[host] = slots
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no host; {_FORM}")
    return hosts


def host_fault(host: str) -> str | None:
    """Why this is no host's name that ssh and pdsh both take, or None."""
    if _NAME.fullmatch(host):
        return None
    if "@" in host:
        return f"{_shown(host)} names a user; write the host alone, and the user into ~/.ssh/config"
    if re.fullmatch(r"[0-9A-Fa-f:.\[\]%]*:[^/]*", host):
        return f"{_shown(host)} is an IPv6 address, which pdsh does not take; give the host a name in ~/.ssh/config"
    return (
        f"{_shown(host)} is no host's name; use letters, digits, '.', '-' and '_', the first one a letter or digit, or "
        "an IPv4 address"
    )


def check_filter(option: str, text: str, hosts: Mapping[str, int]) -> None:
    """Refuse an --include or --exclude that is not HOST[:SLOT,SLOT...][@HOST...] of these hosts."""
    seen = set()
    for part in text.split("@") if text else []:
        where = f"{option} {_shown(text)}"
        if (found := _FILTER.fullmatch(part)) is None:
            raise ConfigError(f"{where}: {_shown(part)} is not HOST or HOST:SLOT,SLOT; separate hosts by @")
        host, slots = found[1], [int(slot) for slot in (found[2] or "").split(",") if slot]
        if host not in hosts:
            raise ConfigError(f"{where}: no host {_shown(host)}; the hosts are {', '.join(list(hosts)[:20])}")
        if host in seen or len(set(slots)) != len(slots):
            raise ConfigError(f"{where}: {_shown(part)} names a host or slot again; name each one once")
        seen.add(host)
        if over := [slot for slot in slots if slot >= hosts[host]]:
            raise ConfigError(f"{where}: {host} has no slot {over[0]}; its slots are 0 to {hosts[host] - 1}")


def ssh_words(host: str, seconds: int, port: int | None = None) -> list[str]:
    """ssh to `host` as pdsh would call it, but without a question to the user; the command follows."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={seconds}"]
    options += ["-p", str(port)] if port is not None else []
    for name in ("PDSH_SSH_ARGS", "PDSH_SSH_ARGS_APPEND"):
        # With pdsh's own notation for the user and the host there is no telling.
        options += [word for word in shlex.split(os.environ.get(name, "")) if "%" not in word]
    return ["ssh", *options, "--", host]


def _text(path: str) -> str:
    try:
        if not Path(path).is_file():
            why = "is no file" if Path(path).exists() else "does not exist"
            raise ConfigError(f"--hostfile {path} {why}; {_FORM}")
        with open(path, "rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--hostfile {path} cannot be read: {error.strerror}; make it readable") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"--hostfile {path} is larger than {_MAX_BYTES} bytes; {_FORM}")
    if content.startswith(b"\xef\xbb\xbf"):
        raise ConfigError(f"--hostfile {path}, line 1: begins with a byte order mark; save it as UTF-8 without one")
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"--hostfile {path}, line {number}: is not UTF-8; save it as UTF-8 without a mark") from error


def _shown(text: str) -> str:
    """Within quotes and ASCII: a name may hold what a terminal would obey."""
    return ascii(text if len(text) <= 80 else f"{text[:80]}...")
