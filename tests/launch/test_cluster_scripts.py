"""mpi.sh, slurm.sbatch, multi_node.sh and kubernetes.yaml: what they print, refuse and start.

One run of two ranks goes through mpirun, srun and the runner in turn: each launcher resumes what the one before it
saved. It does so without SLURM, which test_slurm.py has: a script in its place starts real ranks, two on one node, with
the variables that srun gives its tasks.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lumina_ds.config.elastic import elastic_faults, possible_ranks
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.world import free_port
from lumina_ds.monitor.writers import read_records

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
MPIRUN = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
SRUN = """#!/usr/bin/env bash
# Starts real tasks as srun would on one node.
while [[ $1 == --* ]]; do
    if [[ $1 == --ntasks-per-node ]]; then tasks=$2; shift; fi
    shift
done
pids=() code=0
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=$tasks SLURM_STEP_ID=0 SLURM_NODEID=0 "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""


def run(
    script: str, *arguments: object, cwd: Path, environment: dict[str, str], **variables: str
) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(LAUNCH / script), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(MPIRUN is None, reason="needs mpirun (extra mpi)")
def test_mpirun_srun_and_the_runner_continue_one_another(
    write_config: Callable[..., Path], tmp_path: Path, tools: Callable[..., Path], environment: dict[str, str]
) -> None:
    config = write_config(max_steps=6, micro_batch_size=2)
    options = ["--config", config, "--zero", "2", "--expert-parallel", "2", "--experiment-name", "relay"]
    tools(srun=SRUN, scontrol="#!/bin/sh\necho localhost\n")

    done = run("mpi.sh", *options, "--stop-at-step", 2, cwd=tmp_path, environment=environment, NUM_RANKS="2")
    assert done.returncode == 0, done.stderr
    assert "lumina train --config" in done.stdout.splitlines()[0] and "2 ranks on cpu" in done.stdout

    slurm = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "2"}
    slurm["MASTER_PORT"] = str(free_port())
    # As a job that was queued again with fewer nodes: one rank, which accumulates as much.
    fewer = [*options, "--elastic", "1:2", "--stop-at-step", 4]
    done = run("slurm.sbatch", *fewer, cwd=tmp_path, environment=environment, **slurm | {"SLURM_GPUS_ON_NODE": "1"})
    assert done.returncode == 0, done.stderr
    assert "+ MASTER_ADDR=localhost" in done.stdout and "resumed from" in done.stdout
    assert "elastic 1:2: 1 rank (--grad-accum 2, --expert-parallel 1)" in done.stdout

    slurm |= {"LAUNCHER": "deepspeed", "MASTER_PORT": str(free_port())}
    done = run("slurm.sbatch", *options, cwd=tmp_path, environment=environment, **slurm)
    assert done.returncode == 0, done.stderr
    assert "ended at step 6 of 6" in done.stdout
    assert not list(tmp_path.glob("hostfile-*"))
    records = read_records(tmp_path / "runs/relay/metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("script", "variables", "code", "says"),
    [
        ("slurm.sbatch", {}, 2, "start it with sbatch"),
        ("slurm.sbatch", {"SLURM_JOB_ID": "7", "LUMINA_VENV": "/nowhere"}, 4, "LUMINA_VENV=/nowhere"),
        ("multi_node.sh", {}, 2, "HOSTFILE=hostfile cannot be read; copy launch/hostfile.example"),
        ("multi_node.sh", {"HOSTFILE": "empty"}, 2, "HOSTFILE=empty names no host"),
        ("multi_node.sh", {"HOSTFILE": "hosts", "NODE_RANK": "2"}, 2, "none of the 2 hosts of hosts"),
        ("multi_node.sh", {"HOSTFILE": "hosts", "NODE_RANK": "one"}, 2, "count its lines from 0"),
        ("mpi.sh", {"HOSTFILE": "nowhere", "NUM_RANKS": "2"}, 2, "HOSTFILE=nowhere cannot be read"),
        ("mpi.sh", {"HOSTFILE": "options", "NUM_RANKS": "2"}, 2, "HOSTFILE=options, line 2: no host's name"),
    ],
)
def test_a_mistake_is_one_line(
    script: str,
    variables: dict[str, str],
    code: int,
    says: str,
    tmp_path: Path,
    tools: Callable[..., Path],
    environment: dict[str, str],
) -> None:
    (tmp_path / "empty").write_text("# nobody\n\n")
    (tmp_path / "hosts").write_text("a slots=1\n# spare\nb slots=1\n")
    (tmp_path / "options").write_text("a slots=1\n-oProxyCommand=x slots=1\n")
    tools(mpirun="#!/bin/sh\n")
    done = run(script, "--config", "debug", cwd=tmp_path, environment=environment, **variables)
    assert done.returncode == code
    assert (says in done.stderr and done.stderr.startswith("error: ")) or "No such file" in done.stderr
    assert done.stdout == ""


def test_multi_node_prints_its_command_and_hands_arguments_through(
    tmp_path: Path, tools: Callable[..., Path], environment: dict[str, str]
) -> None:
    (tmp_path / "hosts").write_text("node-1 slots=8\nnode-2 slots=8\n")
    tools(lumina='#!/bin/sh\nprintf "<%s>" "$@"\n', pdsh="#!/bin/sh\n")
    arguments = ("--experiment-name", "two words")
    done = run("multi_node.sh", *arguments, cwd=tmp_path, environment=environment, HOSTFILE="hosts", MASTER_PORT="5000")
    shown, received = done.stdout.splitlines()
    runner = "--hostfile hosts --master_addr=node-1 --master_port 5000"
    assert shown == rf"+ lumina train --experiment-name two\ words -- {runner}"
    assert received == "<train><--experiment-name><two words><-->" + "".join(f"<{word}>" for word in runner.split())


def test_mpi_hands_the_choice_of_gpus_to_every_host(
    tmp_path: Path, tools: Callable[..., Path], environment: dict[str, str]
) -> None:
    tools(mpirun='#!/bin/sh\nprintf "<%s>" "$@"\n')
    chosen = {"CUDA_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": "1", "NUM_RANKS": "2", "MPIRUN_ARGS": "--tag-output"}
    done = run("mpi.sh", "--config", "debug", cwd=tmp_path, environment=environment, **chosen)
    assert done.returncode == 0, done.stderr
    exported = "<-x><CUDA_VISIBLE_DEVICES><-x><ROCR_VISIBLE_DEVICES><--tag-output><lumina><train><--config><debug>"
    assert exported in done.stdout


def test_the_kubernetes_job_starts_each_pod_with_its_own_rank(
    tmp_path: Path, tools: Callable[..., Path], environment: dict[str, str]
) -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    template = job["spec"]["template"]["spec"]
    [container] = template["containers"]
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert service["metadata"]["name"] == template["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(variables["NUM_NODES"]) == job["spec"]["completions"]
    assert int(variables["GPUS_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    tools(lumina='#!/bin/sh\nprintf "<%s>" "$@"\n')
    environment |= variables | {"JOB_COMPLETION_INDEX": "1"}
    command = [*container["command"], *(text.replace("/tmp/", f"{tmp_path}/") for text in container["args"])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<--node_rank><1>" in done.stdout and "<--master_addr=lumina-0.lumina>" in done.stdout
    assert (tmp_path / "hostfile").read_text() == "lumina-0.lumina slots=8\nlumina-1.lumina slots=8\n"


def test_the_elastic_kubernetes_job_starts_an_agent_in_each_pod(
    tmp_path: Path, tools: Callable[..., Path], environment: dict[str, str]
) -> None:
    _, job = yaml.safe_load_all((LAUNCH / "kubernetes-elastic.yaml").read_text())
    [container] = job["spec"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(variables["MAX_NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    tools(torchrun='#!/bin/sh\nprintf "<%s>" "$@"\n')
    shown = []
    for index in ("0", "3"):
        command, values = [*container["command"], *container["args"]], variables | {"JOB_COMPLETION_INDEX": index}
        done = subprocess.run(command, cwd=ROOT, env=environment | values, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"<--local-addr><lumina-{index}.lumina>" in done.stdout
        shown.append(done.stdout)
    assert "<is_host=true,join_timeout=3600>" in shown[0] and "<is_host=false,join_timeout=3600>" in shown[1]
    words = shown[0].strip("<>").split("><")
    fewest, most = (int(number) * gpus for number in words[words.index("--nnodes") + 1].split(":"))
    assert words[words.index("--elastic") + 1] == f"{fewest}:{most}"
    # Every number of pods between the two can share the steps.
    options = words[words.index("launch/train.py") + 1 :]
    asked = {"model": {"num_experts": 8, "moe_intermediate_size": 64}, "run": {"elastic": f"{fewest}:{most}"}}
    config = RunConfig.model_validate(asked)
    config.train.gradient_accumulation_steps = int(options[options.index("--grad-accum") + 1])
    assert elastic_faults(config) == []
    assert {16, 24, 32} <= set(possible_ranks(config, fewest))


@pytest.mark.parametrize(
    ("file", "version"),
    [
        ("kubernetes.yaml", "1.29"),
        ("kubernetes.yaml", "1.31"),
        ("kubernetes.yaml", "newest"),
        ("kubernetes-elastic.yaml", "1.31"),
        ("kubernetes-elastic.yaml", "newest"),
    ],
)
def test_the_kubernetes_job_fits_the_schemas(file: str, version: str) -> None:
    """1.29 is the first that knows every field without a feature gate, 1.31 those of the elastic one."""
    checker = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate (22 MB, in no extra)")
    for document in yaml.safe_load_all((LAUNCH / file).read_text()):
        checker.validate(document, checker.latest_version() if version == "newest" else version, strict=True)
