"""The compiled loop of layout.py. numba compiles it at first use; import it only where numba may be missing."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def fill_documents(
    contents: np.ndarray,
    offsets: np.ndarray,
    roles: np.ndarray,
    first_turns: np.ndarray,
    role_ids: np.ndarray,
    trained_role: int,
    bos_id: int,
    end_id: int,
    ids: np.ndarray,
    mask: np.ndarray,
    lengths: np.ndarray,
    first_trained: np.ndarray,
) -> None:
    """Write the documents of layout.Documents. contents, offsets: the ids of all turns' contents, flat.

    role_ids: int64 [roles], the marker of each. bos_id: -1 for none.
    """
    to = 0
    for row in range(len(lengths)):
        begin = to
        first_trained[row] = -1
        if bos_id >= 0:
            ids[to], mask[to] = bos_id, 0
            to += 1
        for turn in range(first_turns[row], first_turns[row + 1]):
            is_trained = roles[turn] == trained_role
            ids[to], mask[to] = role_ids[roles[turn]], 0
            to += 1
            if is_trained and first_trained[row] < 0:
                first_trained[row] = to - begin
            count = offsets[turn + 1] - offsets[turn]
            ids[to : to + count] = contents[offsets[turn] : offsets[turn + 1]]
            ids[to + count] = end_id
            mask[to : to + count + 1] = is_trained
            to += count + 1
        lengths[row] = to - begin
