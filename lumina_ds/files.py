"""Files written so that a crash leaves the old content or the new, digests of files, their names as text, files of folders
that somebody else made, and the index of weight files."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lumina_ds.foreign_files import ForeignFileError, is_plain_name, open_plain, read_json, shorten

# Which safetensors file holds which tensor, in the form that Hugging Face's libraries write and read.
WEIGHTS_INDEX = "model.safetensors.index.json"


_MOST_INDEX_BYTES = 64 << 20  # that of a model with 10^12 parameters in 8 bits takes 16 MiB
# Bytes that are no UTF-8, or that a terminal obeys.
_NO_TEXT = re.compile("[\udc80-\udcff\x00-\x1f\x7f]")
_ESCAPED = re.compile(r"\\x[0-9a-f]{2}")


def shown_path(path: str | Path) -> str:
    """The path as text that can be written anywhere: bytes of it that are no UTF-8, and control characters, as \\xe9.

    path_of_text() gives the path back. Such a text has its other backslashes doubled, as has one that looks like it.
    """
    text = os.fsencode(path).decode("utf-8", "surrogateescape")  # whatever the locale's encoding
    if not _NO_TEXT.search(text) and not _ESCAPED.search(text):
        return text
    return _NO_TEXT.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", text.replace("\\", "\\\\"))


def path_of_text(text: str) -> str:
    """The path that shown_path() wrote as `text`, as Python names such files."""
    if not _ESCAPED.search(text):
        return text
    escape = re.compile(rb"\\(?:x([0-9a-f]{2})|\\)")
    return os.fsdecode(escape.sub(lambda found: bytes.fromhex(found[1].decode()) if found[1] else b"\\", text.encode()))


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replace `path` by `content` so that a reader, or a crash, sees the old file or the new one, never a part.

    Text is written as UTF-8. The temporary name is this process's own, so two writers do not mix. `mode` is what the
    umask is taken from.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
            stream.write(content.encode("utf-8") if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def cache_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where this user's caches lie; in a container a user may have no home, and then it is a folder of the temporary one."""
    environment = os.environ if environment is None else environment
    if environment.get("XDG_CACHE_HOME"):
        return Path(environment["XDG_CACHE_HOME"])
    if environment.get("HOME"):
        return Path(environment["HOME"]) / ".cache"
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"cache-of-{os.getuid()}"


def sync_folder(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, old: Path, aside: Path) -> None:
    """Give the finished folder `new` the name `old`, whether or not there is one already, and make it durable.

    The two names are exchanged at once, so whoever looks, or a crash, finds the old folder or the new one. On a file
    system that cannot, the old one is called `aside` in between, and a crash may leave it so.
    """
    sync_folder(new)
    if old.is_dir() and _exchange(new, old):
        shutil.rmtree(new, ignore_errors=True)
    else:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists():
            os.rename(old, aside)
        os.rename(new, old)
    sync_folder(old.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Whether the kernel and the file system have exchanged the two names (renameat2, RENAME_EXCHANGE)."""
    here, exchange = -100, 2
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def file_digest(*paths: Path) -> str:
    """SHA-256 in hexadecimal of the content of one file, or of several one after the other, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def file_of(folder: Path, name: str) -> Path:
    """The path of a plain file in a model's folder that somebody else made.

    Raises ValueError where the name or a link leads out of the folder, or what is there would never end; OSError where
    there is nothing.
    """
    if not is_plain_name(name):
        raise ValueError(f"{shorten(name)} is outside the folder")
    path = folder / name
    try:
        open_plain(path).close()
    except ForeignFileError as error:
        raise ValueError(f"{path} {error}") from None
    home = folder.resolve()
    if home.parent.name == "snapshots":  # the Hub's cache keeps the content in blobs beside them
        home = home.parent.parent
    if not path.resolve().is_relative_to(home):
        raise ValueError(f"{path} is a link that leads out of the folder; copy the file there")
    return path


def read_weights_index(folder: Path) -> dict[str, str]:
    """{tensor name: file name} of the safetensors index in `folder`.

    Raises OSError when it cannot be read, ValueError when it is no index or names a file outside the folder.
    """
    try:
        places = read_json(file_of(folder, WEIGHTS_INDEX), _MOST_INDEX_BYTES)["weight_map"]
        names = sorted(set(places.values()))
        outside = [name for name in names if not is_plain_name(name)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{WEIGHTS_INDEX} is no index of weight files") from error
    if outside:
        raise ValueError(f"{WEIGHTS_INDEX} names {shorten(outside[0])}, which is outside the folder")
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # who opens it says that it is missing
            file_of(folder, name)
    return places


def weights_index(places: Mapping[str, str], metadata: Mapping[str, Any]) -> str:
    """The content of the index file that read_weights_index reads."""
    return json.dumps({"metadata": dict(metadata), "weight_map": dict(places)}, indent=1)
