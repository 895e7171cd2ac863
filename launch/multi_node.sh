#!/usr/bin/env bash
# Train on every GPU of the hosts in a hostfile; all arguments go to `lumina train`.
#
#   bash launch/multi_node.sh --config b7 --data shards/train --zero 3 --expert-parallel 8
#       starts the other hosts from this one, by pdsh and ssh (deepspeed's way)
#   NODE_RANK=0 bash launch/multi_node.sh --config b7 ...
#       without ssh: the same command on every host, with NODE_RANK counting the hostfile's lines from 0
#
# HOSTFILE     lines of "HOST slots=GPUS" (launch/hostfile.example); else ./hostfile
# MASTER_ADDR  address of the first host as the others reach it; else its name in the hostfile
# MASTER_PORT  a port that is free there and open to the others; else 29500
# `lumina doctor --hostfile HOSTFILE` looks at the hosts first.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "$2"
}

command -v lumina > /dev/null ||
    fail "lumina is not on the PATH; activate the environment (. .venv/bin/activate) or pip install it" 4
[[ " $* " != *" -- "* ]] || fail "runner arguments after -- are this script's own; use lumina train for them" 2

hostfile=${HOSTFILE:-hostfile}
[[ -r $hostfile ]] || fail "HOSTFILE=$hostfile cannot be read; copy launch/hostfile.example and change it" 2
hosts=$(awk '!/^[[:space:]]*(#|$)/ { print $1 }' "$hostfile")
[[ -n $hosts ]] || fail "HOSTFILE=$hostfile names no host; write lines of HOST slots=GPUS" 2
num_hosts=$(wc -l <<< "$hosts")

# lumina train judges the names: with = one that begins with a hyphen is no option.
runner=(--hostfile "$hostfile" --master_addr="${MASTER_ADDR:-${hosts%%$'\n'*}}" --master_port "${MASTER_PORT:-29500}")
if [[ -n ${NODE_RANK:-} ]]; then
    if [[ ! $NODE_RANK =~ ^[0-9]+$ ]] || ((NODE_RANK >= num_hosts)); then
        fail "NODE_RANK=$NODE_RANK is none of the $num_hosts hosts of $hostfile; count its lines from 0" 2
    fi
    runner+=(--no_ssh --node_rank "$NODE_RANK")
elif ((num_hosts > 1)); then
    command -v pdsh > /dev/null ||
        fail "pdsh is not installed; apt-get install pdsh, or set NODE_RANK and start this on every host" 4
fi

command=(lumina train "$@" -- "${runner[@]}")
printf '+'
printf ' %q' "${command[@]}"
printf '\n'
exec "${command[@]}"
