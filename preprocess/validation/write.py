"""write_report(): the one door to the HTML reports, for findings of validation and for finished shard folders."""

from __future__ import annotations

from pathlib import Path

from lumina_ds.report.data.shard_page import shard_page
from lumina_ds.report.page import write_page
from preprocess.validation.findings import Findings
from preprocess.validation.page import validation_page


def write_report(folder_or_findings: str | Path | Findings, path: str | Path, seq_length: int | None = None) -> None:
    """Write a self-contained HTML page about a shard folder, or about what validate_files() found.

    The page depends on the content alone, so the same folder gives the same bytes. `seq_length`: the rows of a
    folder's page, the folder's own when None. Raises DataError when the folder is damaged, MachineError when the page
    cannot be written.
    """
    if isinstance(folder_or_findings, Findings):
        document = validation_page(folder_or_findings)
    else:
        document = shard_page(Path(folder_or_findings), seq_length)
    write_page(document, Path(path))
