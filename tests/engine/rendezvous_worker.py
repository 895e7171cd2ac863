"""One rank that meets the others; what it found, as JSON on its last line of output."""

from __future__ import annotations

import json
import os
import sys
import time

import torch.distributed

from lumina_ds.engine import rendezvous
from lumina_ds.errors import LuminaError, SharedFault


def main(seconds: float, torch_version: str) -> None:
    if torch_version:
        # Another host's installation, as its metadata would tell it.
        own = rendezvous._versions()
        rendezvous._versions = lambda: own | {"torch": torch_version}
    rank, size, began = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), time.monotonic()
    try:
        store = rendezvous.meet(rank, size, seconds, token=os.environ.get("LUMINA_RENDEZVOUS_TOKEN", "")).store
    except LuminaError as error:
        found = {"error": str(error), "shared": isinstance(error, SharedFault), "seconds": time.monotonic() - began}
        print(json.dumps(found), flush=True)
        sys.exit(error.exit_code)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    print(json.dumps({"rank": rank, "total": total.item(), "interface": os.environ.get("GLOO_SOCKET_IFNAME")}))
    sys.stdout.flush()
    torch.distributed.barrier()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
