"""Who started this process: the environment of every launcher, read in this one place, without torch.

A launcher tells each rank its number and how many ranks there are, each launcher by names of its own. Shells and
notebooks keep such variables after a run, some schedulers set a part of them, and SLURM sets them in shells too. So what
does not fit together is refused here: a rank that believes a stale number waits for ranks that nobody started.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace

from lumina_ds.errors import MachineError

RANK, LOCAL_RANK, WORLD_SIZE = OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
# DeepSpeed's launch module sets both for every rank (deepspeed/launcher/launch.py).
DEEPSPEED_MARKS = ("CROSS_RANK", "LOCAL_SIZE")
TORCHRUN_MARK = "TORCHELASTIC_RUN_ID"
LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")
# SLURM numbers the steps that are a shell of its own (salloc), a batch script or an adopted ssh session from here on.
_FIRST_SPECIAL_STEP = 0xFFFFFFFA


@dataclass(frozen=True)
class Launch:
    """One rank that `launcher` started: "deepspeed", "torchrun", "mpirun", "srun", or "the environment" where only the
    variables are known. `local_size`: ranks on this host, None where the launcher does not say. `one_per_host`: no
    launcher gave a local rank, as in the pods of Kubeflow."""

    launcher: str
    rank: int
    local_rank: int
    size: int
    local_size: int | None = None
    one_per_host: bool = False

    @property
    def speaks(self) -> bool:
        """Whether it reports what all ranks find alike: the first rank, and ranks with a terminal or log of their own."""
        return self.rank == 0 or self.one_per_host


def read_launch(environment: Mapping[str, str]) -> Launch | None:
    """The rank that this process is, or None when no launcher started it. An empty variable counts as absent.

    Raises MachineError for variables that contradict one another or leave out what ranks need to meet.
    """
    given = {name: value.strip() for name, value in environment.items() if value.strip()}
    if all(name in given for name in OWN) and (launcher := _local_launcher(given)):
        return _launch(given, OWN, launcher)
    tasks = _tasks(given)
    if tasks is not None:
        _check_agreement(given, tasks)
        # A task script may give each task one card, and then local rank 0; a LOCAL_RANK by itself is left over.
        own = all(name in given for name in OWN)
        return replace(tasks, local_rank=_number(given, LOCAL_RANK)) if own else tasks
    return _from_variables(given)


def reporting_rank(environment: Mapping[str, str]) -> tuple[int, bool]:
    """(rank, whether it reports what all ranks find alike); variables that make no sense silence nobody."""
    try:
        launch = read_launch(environment)
    except MachineError:
        launch = None
    return (0, True) if launch is None else (launch.rank, launch.speaks)


def drop_stale_variables(environment: MutableMapping[str, str], launcher: str | None) -> None:
    """Remove what only a rank of another launcher would have; None: of every launcher, before ranks are started."""
    stale = {name for name in environment if name.startswith("TORCHELASTIC_") and launcher != "torchrun"}
    if launcher != "deepspeed":
        stale.add("CROSS_RANK")
    if launcher is None:
        stale |= {*OWN, *DEEPSPEED_MARKS, LOCAL_WORLD_SIZE}
    for name in stale:
        environment.pop(name, None)


def _local_launcher(given: Mapping[str, str]) -> str | None:
    """A launcher that starts several ranks on a host, itself perhaps as a task of srun or mpirun."""
    if TORCHRUN_MARK in given:
        return "torchrun"
    if all(name in given for name in DEEPSPEED_MARKS):
        return "deepspeed"
    # DeepSpeed's own starts through MPICH and Intel MPI give LOCAL_SIZE, and may do so inside a step of srun.
    return "the environment" if LOCAL_WORLD_SIZE in given or "LOCAL_SIZE" in given else None


def _tasks(given: Mapping[str, str]) -> Launch | None:
    """Tasks of mpirun or srun. A single task of srun is a shell (`srun --pty bash`) or a program by itself: no rank."""
    if all(name in given for name in _OPEN_MPI):
        return _launch(given, _OPEN_MPI, "mpirun", "OMPI_COMM_WORLD_LOCAL_SIZE")
    # Of the step; SLURM_NTASKS may be the job's.
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in given else "SLURM_NTASKS"
    names = ("SLURM_PROCID", "SLURM_LOCALID", size)
    # A batch script has a SLURM_PROCID too, and no step.
    if "SLURM_STEP_ID" not in given or any(name not in given for name in names):
        return None
    if _number(given, "SLURM_STEP_ID") >= _FIRST_SPECIAL_STEP or _number(given, size) == 1:
        return None
    return _launch(given, names, "srun")


def _check_agreement(given: Mapping[str, str], tasks: Launch) -> None:
    """A script may export RANK and WORLD_SIZE for its tasks; left over from another run, they are lies."""
    for name, value in ((RANK, tasks.rank), (WORLD_SIZE, tasks.size)):
        if name in given and _number(given, name) != value:
            raise MachineError(
                f"{name}={given[name]} contradicts {tasks.launcher}, which says {value}; unset RANK, LOCAL_RANK and "
                "WORLD_SIZE"
            )


def _from_variables(given: Mapping[str, str]) -> Launch | None:
    """RANK and WORLD_SIZE without a known launcher: a scheduler such as Kubeflow, a script, or what a shell kept."""
    if RANK not in given or WORLD_SIZE not in given:
        harmless = _number(given, RANK, 0) == 0 and _number(given, WORLD_SIZE, 1) == 1
        if harmless:
            return None
        name, other = (RANK, WORLD_SIZE) if RANK in given else (WORLD_SIZE, RANK)
        raise MachineError(
            f"{name}={given[name]} is set without {other}; unset {name}, or let a launcher (torchrun, srun, mpirun, "
            "deepspeed) set both"
        )
    if LOCAL_RANK in given:
        return _launch(given, OWN, "the environment")
    launch = _launch({**given, LOCAL_RANK: "0"}, OWN, "the environment")
    if launch.size == 1:
        return None
    if missing := [name for name in ADDRESS if name not in given]:
        raise MachineError(
            f"RANK={launch.rank} and WORLD_SIZE={launch.size} are set without LOCAL_RANK and {' and '.join(missing)}; "
            "unset RANK and WORLD_SIZE, or set what is missing"
        )
    return Launch("the environment", launch.rank, 0, launch.size, local_size=1, one_per_host=True)


def _launch(given: Mapping[str, str], names: tuple[str, str, str], launcher: str, local_size: str = "") -> Launch:
    rank, local_rank, size = (_number(given, name) for name in names)
    if not (rank < size and local_rank < size):
        shown = " ".join(f"{name}={given[name]}" for name in names)
        raise MachineError(f"{shown} cannot be: a rank is below the number of ranks; unset them, or mend the launcher")
    local_names = (local_size, LOCAL_WORLD_SIZE, "LOCAL_SIZE")
    found = next((_number(given, name) for name in local_names if name in given), None)
    return Launch(launcher, rank, local_rank, size, None if found is None else max(1, min(found, size)))


def _number(given: Mapping[str, str], name: str, absent: int = 0) -> int:
    text = given.get(name, str(absent))
    if not (text.isascii() and text.isdecimal()):
        raise MachineError(f"{name}={text} is no number; unset {name}, or give it a whole one from 0 on")
    return int(text)
