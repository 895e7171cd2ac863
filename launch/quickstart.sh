#!/usr/bin/env bash
# From a fresh clone to a small model that talks: environment, human chats, tokenizer, shards, memory plan, training
# on two DeepSpeed ranks with a stop and a resume, evaluation, a reply. Prints every command before it runs it.
#
#   bash launch/quickstart.sh
#
# QUICKSTART_DIR    where the output goes (./quickstart in the checkout); what an earlier quickstart left is replaced
# QUICKSTART_STEPS  optimizer steps of the run (400)
# PYTHON, LUMINA_VENV: see launch/environment.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"

DIR=${QUICKSTART_DIR:-quickstart}
STEPS=${QUICKSTART_STEPS:-400}
RUN=$DIR/runs/quickstart
PROMPT="Hello, how are you today?"
[[ $STEPS =~ ^[1-9][0-9]*$ && $STEPS -ge 2 ]] || fail "QUICKSTART_STEPS=$STEPS is no number from 2 on" 2

current=""
trap '[[ $? == 0 || -z $current ]] || printf "error: the quickstart failed in: %s\n" "$current" >&2' EXIT

# Begins a stage: notes the time of the one before, and what to name when something fails.
stage() {
    if [[ -n $current ]]; then printf '%d %s\n' $((SECONDS - stage_start)) "$current" >> "$DIR/times.txt"; fi
    current=$1
    stage_start=$SECONDS
    [[ -z $1 ]] || printf '\n## %s\n' "$1"
}

mkdir -p "$DIR"
# One by one: QUICKSTART_DIR may be a folder that holds other things.
rm -rf "$DIR"/{train.jsonl,eval.jsonl,tokenizer.model,tokenizer.vocab,tokenizer.json,shards,runs,reply.json,times.txt}

stage "environment"
prepare_environment
export OMP_NUM_THREADS=1

stage "human chats"
step pip install --quiet --disable-pip-version-check chitchat-dataset==0.9.0
step python launch/chitchat_to_jsonl.py --out "$DIR"

stage "tokenizer"
step lumina tokenizer train "$DIR/train.jsonl" --vocab-size 1024 --model-type bpe --out "$DIR/tokenizer.model"

stage "preprocessing"
for part in train eval; do
    step lumina preprocess "$DIR/$part.jsonl" --tokenizer "$DIR/tokenizer.model" --seq-length 256 --overlong split \
        --out "$DIR/shards/$part"
done

num_gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
device=cuda ranks=2
if ((num_gpus == 0)); then device=cpu; fi
if ((num_gpus == 1)); then
    ranks=1
    printf '\nThis machine has one GPU, so the run has one rank, and expert parallelism 1.\n'
fi
layout=(--zero 2 --expert-parallel "$ranks")

stage "memory plan"
step lumina plan --config debug --gpus "$ranks" --device "$device" "${layout[@]}"

half=$((STEPS / 2))
train=(lumina train --config debug --data "$DIR/shards/train" --eval-shards "$DIR/shards/eval" "${layout[@]}"
    --experiment-name quickstart --runs-dir "$DIR/runs" --max-steps "$STEPS")

stage "training, first half"
step "${train[@]}" --stop-at-step "$half" -- --num_gpus "$ranks"
[[ -d $RUN/checkpoints/$(printf 'step-%08d' "$half") ]] || fail "the run stopped without a checkpoint of step $half"

stage "training, resumed"
step "${train[@]}" -- --num_gpus "$ranks"
step lumina checkpoint verify "$RUN"

stage "evaluation"
step lumina evaluate "$RUN" --data "$DIR/shards/eval"

stage "a reply"
step lumina generate "$RUN" --prompt "$PROMPT" --max-new-tokens 40 --temperature 0.7 --top-p 0.9 --seed 1 \
    --json > "$DIR/reply.json"
cat "$DIR/reply.json"

stage ""
current="the checks"
python launch/quickstart_report.py "$RUN" --steps "$STEPS" --stopped-at "$half" --reply "$DIR/reply.json" --times "$DIR/times.txt"
