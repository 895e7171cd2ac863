#!/usr/bin/env bash
# Train on every GPU of this machine (one rank on CPU when it has none); all arguments go to `lumina train`.
#
#   bash launch/single_node.sh --config b1 --data shards/train --zero 2 --expert-parallel 4
#
# NUM_GPUS limits the GPUs; CUDA_VISIBLE_DEVICES is respected. Needs the package installed (README.md).
set -euo pipefail

command -v lumina > /dev/null || {
    echo "error: lumina is not on the PATH; activate the environment (. .venv/bin/activate) or pip install it" >&2
    exit 4
}
if [[ " $* " == *" -- "* ]]; then
    echo "error: runner arguments after -- are this script's own; use lumina train for them" >&2
    exit 2
fi

gpus=${NUM_GPUS:-$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')}
# Ranks of one machine share its cores; without this every rank starts a thread per core.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + gpus - 1) / gpus))}

command=(lumina train "$@" -- --num_gpus "$gpus")
printf '+'
printf ' %q' "${command[@]}"
printf '\n'
exec "${command[@]}"
