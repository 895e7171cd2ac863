"""Whether a run compiles its model, and why."""

from __future__ import annotations

import shutil

from lumina_ds.config.schema import RunConfig


def choose_compile(config: RunConfig, device: str) -> tuple[bool, str]:
    """(compile or not, one sentence that says why) on cuda or cpu; `auto` is on only where it works and may gain.

    `on` is taken at its word: what it cannot do is refused by config/checks.py, device_faults.
    """
    asked = config.train.compile
    if asked != "auto":
        return asked == "on", f"torch.compile is {asked} as asked"
    if device == "cpu":
        return False, "torch.compile is off: on a CPU every new arrangement of documents would be compiled anew"
    if config.model.num_experts:
        return False, "torch.compile is off: the dispatch to experts reads their loads on the host, which breaks graphs"
    if config.deepspeed.sequence_parallel_size > 1:
        return False, "torch.compile is off: it cannot trace the exchange of heads between ranks that share rows"
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return False, "torch.compile is off: its Triton kernels need a C compiler (cc, gcc or clang), and there is none"
    return True, "torch.compile is on: a dense model on a GPU, with a compiler at hand"
