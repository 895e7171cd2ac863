"""Each check against a machine made up of stub programs and folders: its good and its bad answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lumina_ds.doctor import devices, software, storage
from lumina_ds.doctor.checks import CHECKS, examine
from lumina_ds.doctor.finding import Finding, Surroundings
from lumina_ds.doctor.hosts import host_findings
from lumina_ds.doctor.software import installed

A100 = "NVIDIA A100-SXM4-80GB, 8.0, 81920, 4, 550.54"
V100 = "Tesla V100-SXM2-32GB, 7.0, 32768, 0, 550.54"
P100 = "Tesla P100, 6.0, 16384, 0, 550.54"
BUSY = "NVIDIA H100, 9.0, 81920, 40000, 550.54"


def program(folder: Path, name: str, script: str) -> None:
    """A stub on the PATH, as a shell script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def around(tmp_path: Path) -> Surroundings:
    """A machine with nothing on its PATH but what a test puts into tmp_path/bin."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "shm").mkdir()
    environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
    return Surroundings(tmp_path / "runs", environment, tmp_path / "shm")


def with_gpus(around: Surroundings, *lines: str) -> Surroundings:
    folder = Path(around.environment["PATH"])
    program(folder, "nvidia-smi", "\n".join(f"echo '{line}'" for line in lines))
    return around


def test_every_check_answers_on_an_empty_machine(around: Surroundings) -> None:
    findings = examine(around)
    assert len(findings) == len(CHECKS) == len({finding.check for finding in findings})
    assert all(finding.remedy for finding in findings if finding.level != "ok")
    assert not any("check itself failed" in finding.says for finding in findings)


def test_a_check_that_fails_is_a_warning(around: Surroundings) -> None:
    def broken_check(_: Surroundings) -> Finding:
        raise RuntimeError("boom")

    [finding] = examine(around, [broken_check])
    assert (finding.check, finding.level) == ("broken check", "warning") and "RuntimeError: boom" in finding.says


@pytest.mark.parametrize(
    ("found", "level"), [((3, 9, 1), "fault"), ((3, 10, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "warning")]
)
def test_python(around: Surroundings, found: tuple[int, ...], level: str) -> None:
    assert software.python(around, found).level == level


def test_another_deepspeed_is_a_fault(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.deepspeed(around).level == "ok"
    monkeypatch.setattr("lumina_ds.engine.world.version", lambda name: "0.18.0")
    finding = software.deepspeed(around)
    assert (
        finding.level == "fault" and "0.18.0" in finding.says and finding.remedy.startswith("pip install deepspeed==")
    )


def test_missing_libraries_are_a_fault(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "installed", lambda name: None if name == "orjson" else "1")
    finding = software.libraries(around)
    assert (finding.level, finding.says, finding.remedy) == ("fault", "not installed: orjson", "pip install orjson")


def test_a_broken_torch_is_a_fault(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for check in (software.pytorch, software.cuda, software.collectives):
        assert check(around).level == "fault"


@pytest.mark.parametrize(
    ("lines", "level", "says"),
    [
        ([A100, A100], "ok", "2 x NVIDIA A100-SXM4-80GB: Ampere, bf16, fp16, flash-attn"),
        ([V100], "ok", "1 x Tesla V100-SXM2-32GB: Volta, fp16; no bf16, no flash-attn"),
        ([P100], "warning", "too old for tensor cores"),
        ([A100, V100], "warning", "the slowest sets the pace"),
        ([A100, BUSY.replace("H100", "A100-SXM4-80GB")], "warning", "memory in use on GPU 1"),
        (["[N/A], [Unknown Error], x, y, z"], "ok", "none"),
    ],
)
def test_gpus(around: Surroundings, lines: list[str], level: str, says: str) -> None:
    finding = devices.gpu_generation(with_gpus(around, *lines))
    assert finding.level == level and says in finding.says


def test_a_driver_that_fails(around: Surroundings) -> None:
    program(Path(around.environment["PATH"]), "nvidia-smi", "echo 'Driver/library version mismatch' >&2; exit 18")
    finding = devices.gpu_generation(around)
    assert finding.level == "warning" and "Driver/library version mismatch" in finding.says


def test_a_program_is_asked_once(around: Surroundings, tmp_path: Path) -> None:
    program(tmp_path / "bin", "nvidia-smi", f"echo x >> {tmp_path}/calls; echo '{A100}'")
    assert devices.gpus(around) == devices.gpus(around) != []
    assert (tmp_path / "calls").read_text() == "x\n"


def test_a_program_that_hangs(around: Surroundings, tmp_path: Path) -> None:
    program(tmp_path / "bin", "slow", "exec /bin/sleep 30")
    assert around.run(["slow"], 0.2) == (124, "", "no answer within 0.2 seconds")
    assert around.run(["absent"])[0] == 127


def test_a_cpu_build_beside_a_gpu(around: Surroundings) -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda or torch.cuda.is_available():
        pytest.skip("this PyTorch is a build for CUDA")
    assert software.cuda(around).level == "ok"
    finding = software.cuda(with_gpus(Surroundings(environment=around.environment), A100))
    assert finding.level == "warning" and "build for CPUs" in finding.says


def test_hidden_gpus(around: Surroundings) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    hidden = Surroundings(environment={**around.environment, "CUDA_VISIBLE_DEVICES": ""})
    assert "hidden by CUDA_VISIBLE_DEVICES" in software.cuda(with_gpus(hidden, A100)).says


def test_cores_for_ranks(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "usable_cpus", lambda: 8)
    assert devices.cpus(with_gpus(around, A100, A100, A100, A100)).level == "ok"
    monkeypatch.setattr(devices, "usable_cpus", lambda: 7)
    finding = devices.cpus(around)
    assert (finding.level, finding.says) == ("warning", "7 for 4 ranks: ranks will wait for one another")


def test_compilers(around: Surroundings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "has_ninja", lambda _: False)
    assert "no C++ compiler" in software.compilers(around).says
    program(tmp_path / "bin", "g++", "echo 'g++ 12.2'")
    assert "g++ without ninja" in software.compilers(around).says
    monkeypatch.setattr(software, "has_ninja", lambda _: True)
    assert software.compilers(around) == Finding("compilers", "ok", "g++ and ninja", details=("g++ 12.2",))


def test_flash_attention_on_an_old_gpu(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.flash_attention(with_gpus(around, V100)).level == "ok"
    monkeypatch.setattr(software, "installed", lambda name: "2.8.3")
    finding = software.flash_attention(around)
    assert finding.level == "warning" and "compute capability 8.0" in finding.says


def test_mpi_without_its_program(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "installed", lambda name: "4.1")
    assert software.mpi(around).level == "warning"
    program(Path(around.environment["PATH"]), "mpirun", "")
    assert software.mpi(around).level == "ok"


@pytest.mark.parametrize(("gib", "level"), [(0.5, "fault"), (2, "warning"), (64, "ok")])
def test_memory(around: Surroundings, monkeypatch: pytest.MonkeyPatch, gib: float, level: str) -> None:
    monkeypatch.setattr(storage, "_memory_limit", lambda: int(gib * storage.GIB))
    amount = type("Memory", (), {"available": 128 * storage.GIB, "total": 256 * storage.GIB})
    monkeypatch.setattr("psutil.virtual_memory", lambda: amount)
    assert storage.memory(around).level == level


@pytest.mark.slow
def test_a_missing_library_costs_one_line_only() -> None:
    """As a user runs it: without psutil, which the memory is read with, all other checks still answer."""
    program = (
        "import sys; sys.modules['psutil'] = None; from lumina_ds.doctor.checks import examine;"
        "from lumina_ds.doctor.finding import Surroundings;"
        "print([f.check for f in examine(Surroundings()) if 'check itself failed' in f.says])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "['memory']\n"), done.stderr


@pytest.mark.parametrize(
    ("free_gib", "runs", "temporary"), [(0.05, "fault", "warning"), (5, "warning", "warning"), (50, "ok", "ok")]
)
def test_disks(
    around: Surroundings, monkeypatch: pytest.MonkeyPatch, free_gib: float, runs: str, temporary: str
) -> None:
    usage = type("Usage", (), {"free": int(free_gib * storage.GIB)})
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    assert storage.runs_disk(around).level == runs
    assert storage.temporary_disk(around).level == temporary


def test_a_folder_that_cannot_be_written(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.os, "access", lambda *_: False)
    assert (storage.runs_disk(around).level, storage.temporary_disk(around).level) == ("fault", "warning")


def test_shared_memory(around: Surroundings) -> None:
    (around.shared_memory / "deepspeed_allreduce_buffer_29500_0_0").write_bytes(b"x" * (3 << 20))
    (around.shared_memory / "other").write_bytes(b"x")
    finding = storage.shared_memory(around)
    assert finding.level == "warning" and "1 buffer left by DeepSpeed, 3.00 MiB" in finding.says
    assert finding.remedy.endswith(f"rm {around.shared_memory}/deepspeed_allreduce_buffer_*")
    gone = storage.shared_memory(Surroundings(shared_memory=around.shared_memory / "none"))
    assert gone.level == "warning" and "No such file" in gone.says


@pytest.mark.parametrize("place", ["named", ".cache/lumina-ds/torch-extensions-1", ".cache/torch_extensions/py311_cpu"])
def test_extension_locks(around: Surroundings, tmp_path: Path, place: str) -> None:
    around = Surroundings(environment={**around.environment, "TORCH_EXTENSIONS_DIR": str(tmp_path / "named")})
    assert storage.extension_locks(around).says == "none"
    lock = tmp_path / place / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert storage.extension_locks(around).says == "an op is being built now"
    os.utime(lock, (1, 1))
    finding = storage.extension_locks(around)
    assert finding.level == "warning" and str(lock) in finding.remedy


def test_a_taken_port(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(storage, "_DEFAULT_PORT", server.getsockname()[1])
        assert storage.ports(around).level == "warning"
    assert storage.ports(around).level == "ok"


def test_a_host_name_that_does_not_resolve(around: Surroundings) -> None:
    program(Path(around.environment["PATH"]), "getent", "exit 2")
    assert "does not resolve" in storage.host_name(around).says


@pytest.mark.parametrize(
    ("variables", "level"),
    [
        ({}, "ok"),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, "warning"),
        ({"RANK": "x", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, "fault"),
        ({"RANK": "1"}, "fault"),
    ],
)
def test_launcher_variables(variables: dict[str, str], level: str) -> None:
    assert storage.launcher_variables(Surroundings(environment=variables)).level == level


@pytest.mark.parametrize(("files", "level"), [(256, "warning"), (65536, "ok"), (-1, "ok")])
def test_limits(around: Surroundings, monkeypatch: pytest.MonkeyPatch, files: int, level: str) -> None:
    monkeypatch.setattr(storage.resource, "getrlimit", lambda _: (files, files))
    assert storage.limits(around).level == level


@pytest.mark.parametrize(("encoding", "level"), [("UTF-8", "ok"), ("utf8", "ok"), ("ANSI_X3.4-1968", "warning")])
def test_locale(around: Surroundings, monkeypatch: pytest.MonkeyPatch, encoding: str, level: str) -> None:
    monkeypatch.setattr(storage.locale, "getpreferredencoding", lambda _: encoding)
    assert storage.text_encoding(around).level == level


# The last argument of ssh is the command for the other host; a shell there reads it.
RUN_HERE = 'for word; do last=$word; done; exec /bin/sh -c "$last"'


@pytest.mark.parametrize(
    ("script", "level", "says"),
    [
        (RUN_HERE, "ok", f"deepspeed {installed('deepspeed')}"),
        ("echo Welcome; " + RUN_HERE, "ok", "2 slots"),
        ("echo 'node1: Permission denied (publickey).' >&2; exit 255", "fault", "Permission denied"),
        ("echo 'no such file' >&2; exit 126", "fault", "cannot run this Python: no such file"),
        ("""echo '{"python": "3.11.7", "gpus": 1, "torch": "2.0", "deepspeed": null}'""", "fault", "deepspeed missing"),
    ],
    ids=["answers", "chatty", "refused", "no-python", "other-versions"],
)
def test_hosts(around: Surroundings, tmp_path: Path, script: str, level: str, says: str) -> None:
    program(tmp_path / "bin", "ssh", script)
    program(tmp_path / "bin", "pdsh", "")
    pdsh, host = host_findings({"node1": 2}, around)
    assert pdsh.level == "ok"
    assert (host.check, host.level) == ("host node1", level) and says in host.says
    assert host.remedy or level == "ok"


def test_fewer_gpus_than_slots(around: Surroundings, tmp_path: Path) -> None:
    program(tmp_path / "bin", "ssh", RUN_HERE)
    program(tmp_path / "bin", "nvidia-smi", "echo 'GPU 0: A100'")
    _, host = host_findings({"node1": 2}, around)
    assert host.level == "fault" and host.remedy == "write slots=1 in the hostfile"


def test_several_hosts_need_pdsh_and_ssh(around: Surroundings) -> None:
    pdsh, *hosts = host_findings({"node1": 1, "node2": 1}, around)
    assert pdsh.level == "fault" and "--no_ssh" in pdsh.remedy
    assert [host.says for host in hosts] == ["ssh is not installed"] * 2
    assert next(iter(host_findings({"node1": 1}, around))).level == "ok"
