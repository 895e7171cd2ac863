"""`lumina checkpoint consolidate` and `reshard` in memory that does not grow with the checkpoint."""

import contextlib
import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from manifests import make_manifest
from safetensors.torch import load_file
from tiny_run import configuration

from lumina_ds.checkpoint.format import checkpoint_faults
from lumina_ds.checkpoint.manifest import read_manifest
from lumina_ds.checkpoint.pieces import optimizer_file_name
from lumina_ds.checkpoint.publish import begin, publish
from lumina_ds.checkpoint.saved_state import PieceRecord, SavedState, pieces_metadata
from lumina_ds.checkpoint.tensor_file import CheckpointFile

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
MIB = 1 << 20
KEYS = ("weight", "exp_avg", "exp_avg_sq")
# The libraries are there before; which of their pages count depends on what else the machine has read. They are read
# once: each command then has a process of its own, forked from the one that has them.
COMMANDS = """import json, os, re, sys
import torch, lumina_ds.checkpoint.consolidate, lumina_ds.checkpoint.reshard
from lumina_ds.cli.main import cli, run_command

def kib(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

def grown(words):
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from now on (proc(5))
    before = kib("VmRSS")
    code = run_command(cli, words)
    print("grew by", kib("VmHWM") - before, flush=True)
    return code

for words in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        os._exit(grown(words))
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"failed: {words}")
"""
RESHARD = ("--world-size", "1", "--zero", "3", "--expert-parallel", "1")


def make_checkpoint(run, mib):
    """A checkpoint of two ranks with `mib` MiB of weights and twice that of moments, nearly all in one parameter."""
    shapes = {"embedding": (250, 1000), "experts": (4, mib * MIB // 16 - 62500), "norm": (1000,)}
    staging = begin(run / "checkpoints", 3)
    files = {}
    for rank in range(2):
        tensors, records = {}, {}
        for name, shape in shapes.items():
            whole = torch.Size(shape).numel()
            start, end = rank * whole // 2, (rank + 1) * whole // 2
            records[name] = PieceRecord(
                shape=list(shape), start=start, numel=end - start, keys=list(KEYS), scalars={"step": 3.0}
            )
            tensors |= {f"{name}/{key}": torch.arange(start, end) * 0.5 + at for at, key in enumerate(KEYS)}
        file = CheckpointFile(optimizer_file_name(rank), tensors, pieces_metadata(records))
        files[file.name] = file.write(staging)
    entries = {name: entry.model_dump() for name, entry in files.items()}
    manifest = make_manifest(configuration("r", 2, "fp32", str(run)), step=3, files=entries)
    return publish(staging, manifest, keep=1)


def lumina_in_processes(*commands, limit=None):
    """Bytes by which the resident memory of each grew at its peak: anonymous and file pages, as the kernel counts."""
    enter = None if limit is None else lambda: (limit / "cgroup.procs").write_text(str(os.getpid()))
    words = [["checkpoint", *map(str, command)] for command in commands]
    finished = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(words)],
        cwd=CHECKOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, preexec_fn=enter,
    )  # fmt: skip
    peaks = re.findall(r"^grew by (\d+)$", finished.stdout, re.MULTILINE)
    assert finished.returncode == 0, (finished.returncode, finished.stdout, finished.stderr)
    assert len(peaks) == len(commands), finished.stdout
    return [int(peak) * 1024 for peak in peaks]


def test_peaks_do_not_grow_with_the_checkpoint(tmp_path):
    """72 and 288 MiB, of which one parameter is nearly all: both commands peak alike."""
    commands = []
    for mib in (24, 96):
        run = tmp_path / str(mib)
        make_checkpoint(run, mib)
        commands += [("consolidate", run, "--out", run / "whole.safetensors"), ("reshard", run, *RESHARD)]
    peaks = lumina_in_processes(*commands)
    assert min(peaks) > MIB, "hardly a peak: what is measured is not the command"
    for small, large in zip(peaks[:2], peaks[2:], strict=True):
        assert large - small < 8 * MIB, peaks


def test_both_under_a_hard_limit_of_about_half_the_checkpoint(tmp_path):
    """480 MiB of files in 256 MiB, libraries and page cache included: the kernel kills what needs more."""
    step = make_checkpoint(tmp_path, 160)
    before = load_all(step)
    out = tmp_path / "whole.safetensors"
    with memory_limit(256 * MIB) as limit:
        lumina_in_processes(
            ("consolidate", tmp_path, "--out", out), ("reshard", tmp_path, *RESHARD), limit=limit
        )  # fmt: skip
    assert checkpoint_faults(step) == []
    assert sorted(name for name in read_manifest(step).files) == [optimizer_file_name(0)]
    after, whole = load_all(step), load_file(out)
    assert not [name for name, values in before.items() if not torch.equal(values, after[name])]
    assert not [name for name, values in whole.items() if not torch.equal(values, before[f"{name}/weight"])]


def load_all(step):
    saved = SavedState(step, read_manifest(step).files)
    state = {}
    for name, shape in saved.shapes.items():
        for key in KEYS:
            values = state.setdefault(f"{name}/{key}", torch.empty(shape))
            saved.read_into(values.view(-1), name, key, 0)
    return state


@contextlib.contextmanager
def memory_limit(num_bytes):
    """A control group below this process's own, whose processes share `num_bytes` of memory and no swap."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    roots = {
        "/sys/fs/cgroup/memory" + path: "memory.limit_in_bytes" for _, kinds, path in lines if kinds == "memory"
    } or {"/sys/fs/cgroup" + path: "memory.max" for number, _, path in lines if number == "0"}  # fmt: skip
    for root, setting in roots.items():
        group = Path(root) / f"lumina-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not os.access(group / setting, os.W_OK):
                continue
            (group / setting).write_text(str(num_bytes))
            yield group
            return
        finally:
            group.rmdir()
    pytest.skip("no control group with a memory limit can be made here (it takes root)")
