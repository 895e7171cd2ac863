"""Does a packing plan, which may come from anywhere, fit the documents beside it?

fault_of_rows() is asked whenever a plan is read: what it lets pass keeps every index inside its array. fault_of_segments()
needs the length of every document, so verification asks it; who reads rows meets the same bounds shard by shard.
"""

from __future__ import annotations

import numpy as np

from lumina_ds.data.packing import PackingPlan

_ROWS_AT_A_TIME = 1 << 16  # a mapped plan may be larger than memory


def fault_of_rows(plan: PackingPlan, seq_length: int, num_documents: int) -> str | None:
    """What is wrong with rows or numbers of documents, as a phrase; None for nothing."""
    if plan.seq_length != seq_length:
        return f"is of rows of {plan.seq_length} tokens, not {seq_length}"
    offsets = plan.row_offsets
    for begin in range(0, plan.num_rows, _ROWS_AT_A_TIME):
        own = offsets[begin : begin + _ROWS_AT_A_TIME + 1].astype(np.int64)
        if not (own[1:] > own[:-1]).all():
            return "has a row without a segment"
        documents, starts, lengths = (
            column[own[0] : own[-1]] for column in (plan.documents, plan.starts, plan.lengths)
        )
        if documents.min() < 0 or documents.max() >= num_documents:
            return f"names a conversation that is none of the {num_documents}"
        if starts.min() < 0 or lengths.min() < 1:
            return "has a segment without a token"
        if np.add.reduceat(lengths, own[:-1] - own[0], dtype=np.int64).max() > seq_length:
            return f"has a row of more than {seq_length} tokens"
    return None


def fault_of_segments(plan: PackingPlan, lengths: np.ndarray) -> str | None:
    """What is wrong with segments of documents of these `lengths`, as a phrase; None for nothing.

    Each lies inside its document, and no two hold the same tokens, but for the last token of a piece with which the next
    one begins. What no row holds was counted as dropped.
    """
    ends = plan.starts.astype(np.int64) + plan.lengths
    if (ends > lengths[plan.documents]).any():
        return "names tokens beyond the end of a conversation"
    pieces = np.bincount(plan.documents, minlength=len(lengths))
    cut = np.flatnonzero(pieces[plan.documents] > 1)
    order = cut[np.lexsort((plan.starts[cut], plan.documents[cut]))]
    is_next = plan.documents[order][1:] == plan.documents[order][:-1]
    if (is_next & (plan.starts[order][1:] < ends[order][:-1] - 1)).any():
        return "holds tokens of a conversation twice"
    missing = int((pieces == 0).sum())
    if missing > plan.num_dropped + plan.num_without_labels:
        return f"leaves out {missing} conversations, and counts {plan.num_dropped + plan.num_without_labels}"
    return None
