"""Start and end of a rank: the launcher's environment, DeepSpeed's process group, and a clean exit.

What DeepSpeed 0.19.8 gets wrong around starting and stopping is handled here, and nowhere else.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lumina_ds.data.loader import RowShare
from lumina_ds.engine.cards import device_index, obey_cards
from lumina_ds.engine.deepspeed.shared_memory_op import skip_shared_memory_op
from lumina_ds.engine.launchers import Launch, drop_stale_variables, read_launch
from lumina_ds.engine.meeting_point import TOKEN, common_token
from lumina_ds.engine.rendezvous import RENDEZVOUS_SECONDS, Place, meet, stay_alone
from lumina_ds.errors import LuminaError, MachineError
from lumina_ds.files import cache_folder

DEEPSPEED_VERSION = "0.19.8"

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run. `device` is cuda or cpu, and `local_rank` numbers the card among those
    that this process sees; neighbouring ranks share rows when `sequence_parallel_size` is above 1. `places` is
    where every rank is, () where nobody met."""

    rank: int
    local_rank: int
    size: int
    device: str
    sequence_parallel_size: int = 1
    places: tuple[Place, ...] = ()

    @property
    def share(self) -> RowShare:
        """The rows that this rank reads, and the part of each."""
        parts = self.sequence_parallel_size
        return RowShare(self.rank // parts, self.size // parts, self.rank % parts, parts)

    @property
    def torch_device(self) -> Any:
        import torch

        return torch.device("cuda", self.local_rank) if self.device == "cuda" else torch.device("cpu")


def check_deepspeed_version() -> None:
    """Refuse any DeepSpeed but the one whose internals this package was tested against."""
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise MachineError(f"deepspeed is not installed; pip install deepspeed=={DEEPSPEED_VERSION}") from None
    if found != DEEPSPEED_VERSION:
        raise MachineError(
            f"deepspeed {found} is installed, and the checkpoints and expert parallelism used here are tested "
            f"with {DEEPSPEED_VERSION} only; pip install deepspeed=={DEEPSPEED_VERSION}"
        )


def start(
    rendezvous_seconds: float = RENDEZVOUS_SECONDS, timeout_minutes: float = 30, shared: Path | None = None
) -> World:
    """Join the process group of the launcher that started this rank, or form a group of one.

    `rendezvous_seconds` limits the wait for missing ranks and hosts, `timeout_minutes` each collective after that. A
    folder that all ranks have is `shared`: it keeps the token by which they know one another.
    """
    check_deepspeed_version()
    launch = read_launch(os.environ) or Launch("nobody", 0, 0, 1, local_size=1)
    rank, local_rank, size = launch.rank, launch.local_rank, launch.size
    obey_cards(os.environ)

    import torch

    from lumina_ds.engine.resources import name_accelerator

    name_accelerator(os.environ)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = ""
    if device == "cuda":
        local_rank = device_index(launch, torch.cuda.device_count())
        card = str(torch.cuda.get_device_properties(local_rank).uuid)
        torch.cuda.set_device(local_rank)
    else:
        from lumina_ds.model.cpu_products import prefer_onednn

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (launch.local_size or size)))
        prefer_onednn()
    _complete_environment(launch, local_rank)

    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch 2.13 is about to retire; nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    skip_shared_memory_op()
    world = World(rank, local_rank, size, device)
    backend, timeout = "nccl" if device == "cuda" else "gloo", timedelta(minutes=timeout_minutes)
    if size > 1:
        token = os.environ.get(TOKEN) or ("" if shared is None else common_token(shared))
        meeting = meet(rank, size, rendezvous_seconds, card, token, all_here=launch.local_size == size)
    else:
        meeting = stay_alone()
    world = replace(world, places=meeting.places)
    # DeepSpeed takes a group that is there already as it is (deepspeed/comm/comm.py, init_distributed).
    torch.distributed.init_process_group(
        backend,
        store=meeting.store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=world.torch_device if device == "cuda" and size > 1 else None,
    )
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout)
    return world


def start_rehearsal(rank: int, size: int) -> World:
    """Become one rank on the CPU of a group whose other ranks are not there: torch's fake one, which sends nothing.

    Once in a process, and for what only sets up: DeepSpeed keeps its groups in the module.
    """
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lumina_ds.engine.resources import name_accelerator

    name_accelerator(os.environ, "cpu")
    # The fake group has no default port; any number will do.
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size), **address}
    # DeepSpeed asks fake tensors for their address to check its alignment, which torch deprecates.
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    import deepspeed

    logging.disable(logging.ERROR)
    skip_shared_memory_op()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    deepspeed.init_distributed(dist_backend="gloo")
    return World(rank, 0, size, "cpu")


def stop(code: int, clean: bool) -> NoReturn:
    """End this rank with `code`. `clean` says that every rank gets here, so that they may wait for one another.

    os._exit: about one run in twenty otherwise ends in "terminate called without an active exception", because
    a gloo thread touches Python while the interpreter shuts down.
    """
    import torch.distributed as dist

    try:
        if dist.is_initialized() and clean:
            dist.barrier()
            dist.destroy_process_group()
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def on_rank_0(world: World, action: Callable[[], T], group: Any = None) -> T:
    """What `action` returns on rank 0, on every rank; a LuminaError that it raises there is raised on every rank.

    A collective of `group`, the default group when None. The answer is pickled; no other rank calls `action`.
    """
    import torch.distributed as dist

    answer: list[Any] = [None, None]
    if world.rank == 0:
        try:
            answer[0] = action()
        except LuminaError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, group=group)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def free_port() -> int:
    """A TCP port that is free now. DeepSpeed's fixed default, 29500, collides between two runs on one machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _complete_environment(launch: Launch, local_rank: int) -> None:
    """Tell DeepSpeed and torch what the launcher said, by their names; a variable left over says otherwise."""
    drop_stale_variables(os.environ, launch.launcher)
    size = launch.size
    os.environ |= {"RANK": str(launch.rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(size)}
    if launch.local_size is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(launch.local_size)
    if size == 1:
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free_port()))):
            os.environ[name] = os.environ.get(name) or value
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise MachineError(
            f"{size} ranks were started by {launch.launcher} without {' and '.join(missing)}; export the address and a "
            "free port of rank 0's host before mpirun or srun, and unset RANK and WORLD_SIZE where nothing was started"
        )
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_extensions_folder()))


def _extensions_folder() -> Path:
    """Where DeepSpeed builds its ops: a folder of our own that only this user can write.

    A lock that another program's killed build left in torch's shared folder would make a run wait for ever.
    """
    folder = cache_folder() / "lumina-ds" / f"torch-extensions-{DEEPSPEED_VERSION}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Below /tmp, somebody else may have made it.
        if cache_folder().stat().st_uid == os.getuid() or os.environ.get("HOME"):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lumina-ds-ops-"))
