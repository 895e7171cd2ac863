"""Folders that `datasets.save_to_disk` wrote: Arrow streams, and a state.json that says in which order.

Only the layout of the files is needed, not the library. A DatasetDict is a folder of such folders, one for each split.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lumina_ds.errors import DataError
from lumina_ds.files import shown_path

_STATE = "state.json"
_SPLITS = "dataset_dict.json"


def dataset_files(folder: Path) -> tuple[Path, list[Path]] | None:
    """(folder of the one dataset, its Arrow files in their order), or None where `folder` holds none.

    Raises DataError for several splits, and for a folder that is not whole.
    """
    if (folder / _SPLITS).is_file():
        folder = _only_split(folder)
    if not (folder / _STATE).is_file():
        return None
    state = _read(folder / _STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{shown_path(folder)} is a selection of rows saved by an old version of datasets; "
            "load it with that version, call flatten_indices() and save_to_disk() again"
        )
    entries = state.get("_data_files")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{shown_path(folder / _STATE)} lists no data files; save the dataset again")
    return folder, [_inside(folder, entry.get("filename")) for entry in entries]


def _only_split(folder: Path) -> Path:
    splits = _read(folder / _SPLITS).get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
        raise DataError(f"{shown_path(folder / _SPLITS)} names no splits; save the dataset again")
    if len(splits) > 1:
        raise DataError(
            f"{shown_path(folder)} holds the splits {', '.join(splits)}; name one of them: {shown_path(folder)}/{splits[0]}"
        )
    found = folder / splits[0]
    if Path(splits[0]).name != splits[0] or not (found / _STATE).is_file():
        raise DataError(f"{shown_path(folder)} has no split {splits[0]}, which its {_SPLITS} names; save it again")
    return found


def _inside(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
        raise DataError(f"{shown_path(folder)} lacks the file {name!r}, which its {_STATE} names; save it again")
    return folder / name


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {shown_path(path)}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown_path(path)} is not JSON; save the dataset again") from error
    if not isinstance(document, dict):
        raise DataError(f"{shown_path(path)} is not an object; save the dataset again")
    return document
