"""The one reading of launchers' variables, as a table: who started this process, or the line that refuses it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lumina_ds.engine.launchers import Launch, drop_stale_variables, read_launch, reporting_rank
from lumina_ds.errors import MachineError

ADDRESS = {"MASTER_ADDR": "host-0", "MASTER_PORT": "29500"}
OWN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
DEEPSPEED = OWN | ADDRESS | {"CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "2"}
TORCHRUN = OWN | ADDRESS | {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}
STEP = {**SRUN, "SLURM_STEP_NUM_TASKS": "4"}
PTY = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}
POD = {"RANK": "1", "WORLD_SIZE": "2", **ADDRESS}


def launch(launcher: str, local_size: int | None = None) -> Launch:
    return Launch(launcher, 3, 1, 4, local_size)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({}, None, id="nobody"),
        pytest.param(DEEPSPEED, launch("deepspeed", 2), id="deepspeed"),
        pytest.param(DEEPSPEED | PTY, launch("deepspeed", 2), id="deepspeed below a shell of srun"),
        pytest.param(
            DEEPSPEED | MPIRUN | {"OMPI_COMM_WORLD_SIZE": "9"}, launch("deepspeed", 2), id="deepspeed below mpirun"
        ),
        pytest.param(TORCHRUN, launch("torchrun", 2), id="torchrun"),
        pytest.param(TORCHRUN | STEP | {"SLURM_NTASKS": "2"}, launch("torchrun", 2), id="torchrun as a task of srun"),
        pytest.param(TORCHRUN | {"CROSS_RANK": "0"}, launch("torchrun", 2), id="torchrun and a stale CROSS_RANK"),
        pytest.param(OWN, launch("the environment"), id="a script of one's own"),
        pytest.param(
            OWN | STEP | {"SLURM_PROCID": "1", "LOCAL_SIZE": "2"},
            launch("the environment", 2),
            id="MPICH by deepspeed in a step of srun, one of which starts several ranks",
        ),
        pytest.param(MPIRUN, launch("mpirun"), id="mpirun"),
        pytest.param(MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, launch("mpirun", 2), id="mpirun with a local size"),
        pytest.param(MPIRUN | {"RANK": "", "WORLD_SIZE": " "}, launch("mpirun"), id="mpirun and empty variables"),
        pytest.param(MPIRUN | {"LOCAL_RANK": "0"}, launch("mpirun"), id="mpirun and a stale LOCAL_RANK"),
        pytest.param(MPIRUN | STEP, launch("mpirun"), id="mpirun in a job of SLURM"),
        pytest.param(SRUN, launch("srun"), id="srun"),
        pytest.param(STEP | {"SLURM_NTASKS": "1"}, launch("srun"), id="srun in a job of one task"),
        pytest.param(STEP | {"CUDA_VISIBLE_DEVICES": "3"}, launch("srun"), id="srun --gpus-per-task"),
        pytest.param(
            STEP | OWN | {"LOCAL_RANK": "0"}, Launch("srun", 3, 0, 4), id="srun, exported, one card for each task"
        ),
        pytest.param({**SRUN, "SLURM_STEP_ID": ""}, None, id="sbatch"),
        pytest.param({**SRUN, "SLURM_STEP_ID": "4294967290"}, None, id="salloc's shell"),
        pytest.param({**SRUN, "SLURM_STEP_ID": "4294967291"}, None, id="a batch step"),
        pytest.param(PTY, None, id="srun --pty bash"),
        pytest.param({**PTY, "SLURM_NTASKS": "4"}, None, id="srun --pty bash in a job of four tasks"),
        pytest.param(POD, Launch("the environment", 1, 0, 2, 1, one_per_host=True), id="Kubeflow"),
        pytest.param(POD | {"LOCAL_RANK": ""}, Launch("the environment", 1, 0, 2, 1, True), id="an empty LOCAL_RANK"),
        pytest.param({"RANK": "0", "WORLD_SIZE": "1", **ADDRESS}, None, id="Kubeflow, one pod"),
        pytest.param({"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": ""}, None, id="empty variables"),
        pytest.param({"RANK": "0"}, None, id="a notebook's RANK=0"),
        pytest.param({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None, id="a notebook's WORLD_SIZE=1"),
        pytest.param({"CROSS_RANK": "0", "LOCAL_SIZE": "2"}, None, id="a stale CROSS_RANK"),
        pytest.param({"TORCHELASTIC_RUN_ID": "x"}, None, id="a stale run of torchrun"),
    ],
)
def test_who_started_it(environment: dict[str, str], expected: Launch | None) -> None:
    assert read_launch(environment) == expected


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "1"}, "RANK=1 is set without WORLD_SIZE; unset RANK"),
        ({"WORLD_SIZE": "2", **ADDRESS}, "WORLD_SIZE=2 is set without RANK; unset WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "without LOCAL_RANK and MASTER_ADDR and MASTER_PORT; unset"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "without LOCAL_RANK and MASTER_PORT; unset"),
        (OWN | {"RANK": "4"}, "RANK=4 LOCAL_RANK=1 WORLD_SIZE=4 cannot be"),
        (OWN | {"LOCAL_RANK": "7"}, "LOCAL_RANK=7 WORLD_SIZE=4 cannot be"),
        (OWN | {"WORLD_SIZE": "0"}, "cannot be"),
        (OWN | {"RANK": "one"}, "RANK=one is no number"),
        (OWN | {"RANK": "-1"}, "RANK=-1 is no number"),
        (OWN | {"RANK": "²"}, "RANK=² is no number"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE=x is no number"),
        (MPIRUN | {"RANK": "0"}, "RANK=0 contradicts mpirun, which says 3; unset RANK, LOCAL_RANK and WORLD_SIZE"),
        (STEP | {"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 contradicts srun"),
        (STEP | OWN | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8 contradicts srun, which says 4"),
        (STEP | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4 SLURM_LOCALID=1 SLURM_STEP_NUM_TASKS=4 cannot be"),
    ],
)
def test_what_does_not_fit_together_is_one_line(environment: dict[str, str], says: str) -> None:
    with pytest.raises(MachineError) as caught:
        read_launch(environment)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, True)),
        ({"RANK": "1"}, (0, True)),
        (OWN | {"RANK": "x"}, (0, True)),
        (DEEPSPEED, (3, False)),
        (STEP, (3, False)),
        (STEP | {"SLURM_PROCID": "0"}, (0, True)),
        (POD, (1, True)),
    ],
)
def test_only_ranks_of_a_launcher_are_silent(environment: dict[str, str], expected: tuple[int, bool]) -> None:
    assert reporting_rank(environment) == expected


def test_stale_variables_go_and_the_launchers_own_stay() -> None:
    stale = {"CROSS_RANK": "0", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", **ADDRESS}

    def left(launcher: str | None) -> dict[str, str]:
        environment = {**OWN, **stale, "LOCAL_WORLD_SIZE": "2"}
        drop_stale_variables(environment, launcher)
        return environment

    assert left(None) == ADDRESS
    assert left("srun") == {**OWN, **ADDRESS, "LOCAL_WORLD_SIZE": "2"}
    assert "CROSS_RANK" in left("deepspeed") and "TORCHELASTIC_RUN_ID" not in left("deepspeed")
    assert "CROSS_RANK" not in left("torchrun") and "TORCHELASTIC_USE_AGENT_STORE" in left("torchrun")


def test_a_stale_rank_mutes_no_verb_and_torch_is_not_needed_to_know() -> None:
    code = (
        "import sys; from lumina_ds.cli.main import cli, run_command\n"
        "assert run_command(cli, ['plan', '--config', 'nowhere']) == 2\n"
        "assert run_command(cli, ['train', '--config', 'debug']) == 4\n"
        "assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"RANK": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.splitlines()
    assert first.startswith("error: ") and "nowhere" in first
    assert second.startswith("error: RANK=1 is set without WORLD_SIZE")
