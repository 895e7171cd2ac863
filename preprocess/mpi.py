"""The offline stage over the ranks of an MPI job: `mpirun -n K python -m preprocess --mpi ...`.

Rank 0 reads the inputs and writes the shards, the others encode blocks; rank 0's output is what one process
writes, byte for byte. So K ranks encode on K-1 of them, and only rank 0 needs to see the inputs and the output;
the tokenizer file must be there on every host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lumina_ds.errors import MachineError
from preprocess.workers import Workers


@contextmanager
def mpi_workers() -> Iterator[Workers | None]:
    """On rank 0 the other ranks as workers, or this process itself where it is alone; on the others None, and they
    encode on the way out until rank 0 has done. Raises MachineError without mpi4py or an MPI library.
    """
    communicator = _mpi().COMM_WORLD
    num_others = communicator.Get_size() - 1
    if not num_others:
        yield Workers()
        return
    from mpi4py.futures import MPICommExecutor

    executor: Any
    with MPICommExecutor(communicator, root=0) as executor:
        yield None if executor is None else Workers(executor, num_others)


def _mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        raise MachineError(
            f"--mpi needs mpi4py and an MPI library ({error}); pip install 'lumina-ds[mpi]' brings both"
        ) from error
    return MPI
