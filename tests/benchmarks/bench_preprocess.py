"""`lumina preprocess` beside its peers on the same corpus, in whole-process CPU seconds with all children.

    pip install 'lumina-ds[bench]' chitchat-dataset gigatoken
    python tests/benchmarks/bench_preprocess.py --documents /usr/share/doc --documents /usr/share/man

Peers that are not installed are left out by name. A program, no test: it takes minutes. README.md has a run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import click
import psutil

sys.path.insert(0, str(Path(__file__).parent))

from corpus import DEFAULT_FOLDERS, write_corpus

LUMINA = "lumina"
PEERS = {
    "sentencepiece": ["datasets"],
    "tokenizers": ["datasets", "tokenizers"],
    "gigatoken": ["datasets", "gigatoken"],
}
_SAMPLE_SECONDS = 0.2
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True)
class Measured:
    name: str
    workers: int
    cpu_seconds: float
    wall_seconds: float
    peak_memory_mb: float
    tokens: int
    trained_tokens: int


@click.command()
@click.option("--size-mb", default=200.0, show_default=True, help="Corpus size; less where there is less text.")
@click.option(
    "--documents", multiple=True, type=click.Path(path_type=Path), help="Folders of HTML, text and manual pages."
)
@click.option("--corpus", type=click.Path(path_type=Path, exists=True), help="This JSONL file instead.")
@click.option("--sample-mb", type=float, help="Only the first lines of the corpus, so many megabytes: a quick run.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="SentencePiece model; Mistral's, of mistral-common.")
@click.option("--workers", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--peer", "peers", multiple=True, type=click.Choice(list(PEERS)), help="Only these; all by default.")
@click.option("--no-peers", is_flag=True)
@click.option("--repeat", default=1, show_default=True, help="Runs of each; the one with the least CPU time counts.")
def main(
    size_mb: float, documents: tuple[Path, ...], corpus: Path | None, sample_mb: float | None, tokenizer: Path | None,
    workers: tuple[int, ...], peers: tuple[str, ...], no_peers: bool, repeat: int,
) -> None:  # fmt: skip
    """Measure and print a table in Markdown."""
    _adopt_orphans()
    tokenizer = tokenizer or _mistral()
    names = [LUMINA] if no_peers else [LUMINA, *_installed(peers or tuple(PEERS))]
    with tempfile.TemporaryDirectory() as work:
        if corpus is None:
            corpus = Path(work) / "corpus.jsonl"
            write_corpus(corpus, int(size_mb * 1e6), documents or DEFAULT_FOLDERS)
        if sample_mb is not None:
            corpus = _first_lines(corpus, int(sample_mb * 1e6), Path(work) / "sample.jsonl")
        size = corpus.stat().st_size / 1e6
        click.echo(f"{size:.1f} MB, tokenizer {tokenizer.name}", err=True)
        measured = []
        for name in names:
            for number in workers:
                runs = [measure(name, number, corpus, tokenizer, Path(work) / "out") for _ in range(repeat)]
                measured.append(min(runs, key=lambda run: run.cpu_seconds))
                click.echo(f"{measured[-1]}", err=True)
        click.echo(table(measured, size))


def measure(name: str, workers: int, corpus: Path, tokenizer: Path, out: Path) -> Measured:
    """Run one contender in a process of its own, from nothing to its finished output in `out`, which is removed."""
    if name == LUMINA:
        options = ["--tokenizer", tokenizer, "--seq-length", 4096, "--num-workers", workers, "--json"]
        command = [sys.executable, "-m", "lumina_ds", "preprocess", corpus, *options, "--out", out]
    else:
        command = [sys.executable, Path(__file__).with_name("peers.py"), name, corpus, tokenizer, out, workers]
    os.sync()  # what earlier runs wrote is not written to the disk beside this one
    begin = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        environment = os.environ | {"HF_HOME": str(out), "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=errors, env=environment)
        try:
            peak, cpu = _wait(process)
            wall = time.monotonic() - begin
            if process.returncode:
                errors.seek(0)
                raise click.ClickException(f"{name} failed: {errors.read().decode()[-2000:]}")
            output.seek(0)
            counts = json.loads(output.read().decode().splitlines()[-1])
        finally:
            shutil.rmtree(out, ignore_errors=True)
    counts = counts.get("totals", counts)
    cpu += _orphans_cpu_seconds()
    return Measured(name, workers, cpu, wall, peak / 1e6, counts["tokens"], counts["trained_tokens"])


def table(measured: list[Measured], size_mb: float) -> str:
    """Ratios are to the first contender's CPU seconds with as many workers; "times as fast" is wall time against the
    contender's own first number of workers."""
    base = {run.workers: run for run in reversed(measured) if run.name == measured[0].name}
    first_run = {run.name: run for run in reversed(measured)}
    lines = [
        "| contender | workers | CPU seconds | wall seconds | times as fast | MB per CPU-second | CPU seconds, ratio | peak memory MB | same tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in measured:
        own = base[run.workers]
        same = (run.tokens, run.trained_tokens) == (own.tokens, own.trained_tokens)
        label = "lumina preprocess" if run.name == LUMINA else f"datasets map + {run.name}"
        lines.append(
            f"| {label} | {run.workers} | {run.cpu_seconds:.2f} | {run.wall_seconds:.2f} | "
            f"{first_run[run.name].wall_seconds / run.wall_seconds:.2f} | "
            f"{size_mb / run.cpu_seconds:.1f} | {run.cpu_seconds / own.cpu_seconds:.1f} | {run.peak_memory_mb:.0f} | "
            f"{'yes' if same else 'NO'} |"
        )
    return "\n".join(lines)


def _first_lines(corpus: Path, size_bytes: int, path: Path) -> Path:
    with corpus.open("rb") as source, path.open("wb") as sample:
        for line in source:
            sample.write(line)
            if sample.tell() >= size_bytes:
                break
    return path


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Peak of the process tree's memory, and CPU seconds of the process and the children that it waited for."""
    peaks = [0]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            peaks.append(_resident(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        ended.set()
        sampler.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    return max(peaks), usage.ru_utime + usage.ru_stime


def _adopt_orphans() -> None:
    """Become the parent of processes whose own ended first, such as a fork server, so that their time is counted."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _orphans_cpu_seconds() -> float:
    seconds = 0.0
    while True:
        try:
            _, _, usage = os.wait4(-1, 0)
        except ChildProcessError:
            return seconds
        seconds += usage.ru_utime + usage.ru_stime


def _resident(pid: int) -> int:
    """Bytes of the tree's resident memory, pages that processes share counted once (Linux's PSS)."""
    total = 0
    try:
        root = psutil.Process(pid)
        for one in [root, *root.children(recursive=True)]:
            total += one.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass  # it ended between two looks
    return total


def _installed(names: tuple[str, ...]) -> list[str]:
    kept = []
    for name in names:
        missing = [package for package in PEERS[name] if importlib.util.find_spec(package) is None]
        if missing:
            click.echo(f"left out: datasets map + {name}; not installed: {', '.join(missing)}", err=True)
        else:
            kept.append(name)
    return kept


def _mistral() -> Path:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        raise click.UsageError("give --tokenizer, or pip install mistral-common")
    return Path(spec.origin).parent / "data" / "tokenizer.model.v1"


if __name__ == "__main__":
    main()
