"""The life of a checkpoint: a real publication, stopped before each rename, and what a crash there would leave.

An audit hook sees every rename of the code that publishes; at each the folder is copied, and the code that resumes says
which checkpoint it would take.
"""

from __future__ import annotations

import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canvas import LINE, MUTED, NEW, WIDTH, Canvas, mono_width

from lumina_ds.checkpoint.format import newest_valid
from lumina_ds.checkpoint.manifest import Manifest, step_name
from lumina_ds.checkpoint.publish import begin, publish
from lumina_ds.files import file_digest

# A manifest's other fields say nothing here: the tests' own will do.
MANIFESTS_OF_TESTS = Path(__file__).parents[2] / "tests" / "manifests.py"
MARGIN = 16
OLD_STEP, NEW_STEP = 200, 400
FILES = ("model-rank-0.safetensors", "optimizer-rank-0.safetensors")


@dataclass(frozen=True)
class Moment:
    """The folder `checkpoints` at one time: its entries by path, and the checkpoint that a resuming run takes."""

    title: str
    entries: tuple[str, ...]
    resumes_from: str


def draw() -> str:
    """The whole picture."""
    canvas = Canvas(
        "The life of a checkpoint",
        "Files are written into a folder with a temporary name, the manifest seals it, the folder gets its name, the "
        "pointer moves, and the oldest checkpoint goes. A crash at any moment leaves a sound checkpoint.",
    )
    moments = record()
    canvas.text(MARGIN, 26, f"the folder checkpoints/ while step {NEW_STEP} is saved", bold=True)
    y, before = 40.0, set(moments[0].entries)
    for number, moment in enumerate(moments, 1):
        height = 36 + 19 * len(moment.entries) + 26
        canvas.rect(MARGIN, y, WIDTH - 2 * MARGIN, height, ("#ffffff", LINE), 6)
        canvas.text(MARGIN + 12, y + 22, f"{number}. {moment.title}", bold=True)
        for place, entry in enumerate(moment.entries):
            top = y + 32 + 19 * place
            folder, _, name = entry.partition("/")
            is_inside = name not in ("", " ...")
            x, shown = (MARGIN + 48, name) if is_inside else (MARGIN + 26, entry)
            moved_along = is_inside and f"{folder}.tmp/{name}" in before
            if entry not in before and not moved_along:
                canvas.rect(x - 6, top, mono_width(shown, 12.5) + 12, 18, NEW)
            canvas.text(x, top + 13.5, shown, size=12.5, mono=True)
        canvas.text(
            MARGIN + 12, y + height - 10, f"a crash now: the run resumes from {moment.resumes_from}", colour=MUTED
        )
        before = set(moment.entries)
        y += height + 8
    return canvas.svg()


def record() -> list[Moment]:
    """Publish NEW_STEP beside OLD_STEP, keeping one, and note the folder before each rename and at the end."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        _save(checkpoints, OLD_STEP)
        moments = [_moment("Before: one checkpoint", checkpoints)]
        staging, manifest = _write(checkpoints, NEW_STEP)
        moments.append(_moment("Every rank writes and syncs its files", checkpoints))
        with _Renames(checkpoints) as renames:
            renames.call = lambda title: moments.append(_moment(title, checkpoints))
            publish(staging, manifest, keep=1)
        moments.append(_moment("The oldest is deleted", checkpoints))
    return moments


def _save(checkpoints: Path, step: int) -> None:
    staging, manifest = _write(checkpoints, step)
    publish(staging, manifest, keep=1)


def _write(checkpoints: Path, step: int) -> tuple[Path, Manifest]:
    staging = begin(checkpoints, step)
    for name in FILES:
        (staging / name).write_bytes(name.encode() * step)
    files = {name: {"bytes": (staging / name).stat().st_size, "sha256": file_digest(staging / name)} for name in FILES}
    return staging, runpy.run_path(str(MANIFESTS_OF_TESTS))["make_manifest"](step=step, files=files)


def _moment(title: str, checkpoints: Path) -> Moment:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkpoints"
        shutil.copytree(checkpoints, copy)
        entries = []
        for path in sorted(copy.iterdir()):
            if path.is_dir() and path.name.startswith(step_name(NEW_STEP)):
                names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
                entries += [f"{path.name}/", *(f"{path.name}/{name}" for name in names)]
            elif path.is_dir():
                entries.append(f"{path.name}/ ...")
            elif not path.name.startswith(".") and not path.name.endswith(".tmp"):
                entries.append(f"{path.name} -> {path.read_text().strip()}")
        found = newest_valid(copy)
    assert found is not None
    return Moment(title, tuple(entries), found.name)


class _Renames:
    """Calls `call` after each rename below `folder` that moves the checkpoint on. A hook stays for good, so it is muted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.call: Callable[[str], None] = lambda title: None
        self._pending: str | None = None
        self._active = False

    def __enter__(self) -> _Renames:
        self._active = True
        sys.addaudithook(self._hook)
        return self

    def __exit__(self, *_: object) -> None:
        self._active = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active or event != "os.rename" or not str(arguments[0]).startswith(str(self.folder)):
            return
        # The folder as the rename before left it, which is what a crash at this moment leaves.
        self._active = False
        if self._pending is not None:
            self.call(self._pending)
        self._pending = _what_it_does(Path(arguments[1]))
        self._active = True


def _what_it_does(target: Path) -> str:
    if target.name == "manifest.json":
        return "The manifest seals the folder"
    if target.name == "latest":
        return "The pointer moves"
    if target.suffix == ".deleted":
        return "The oldest loses its name"
    return "The folder gets its name"
