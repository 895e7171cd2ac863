#!/usr/bin/env bash
# The whole test suite, on a fresh clone or again: makes or reuses the environment, then ruff, mypy, pytest.
#
#   bash tests/run.sh                       everything, 11 to 25 minutes on two cores
#   bash tests/run.sh --quick               some tests of every package, in 3 minutes: all that are not marked slow
#   bash tests/run.sh tests/model -x        arguments go to pytest
#
# PYTHON and LUMINA_VENV choose interpreter and environment (launch/environment.sh).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
cd "$ROOT"

chosen=()
if [[ ${1:-} == --quick ]]; then
    chosen=(-m "not slow and not faults")
    shift
fi
status=0
times=()

# Runs a check and notes its time; a failing one does not hide what the next ones find.
check() {
    local name=$1 start=$SECONDS code=0
    shift
    step "$@" || code=$?
    times+=("$(printf '%-12s %4ds  %s' "$name" $((SECONDS - start)) "$( ((code == 0)) && echo ok || echo "failed ($code)")")")
    if ((code != 0 && status == 0)); then status=$code; fi
}

start=$SECONDS
prepare_environment test
times+=("$(printf '%-12s %4ds  ok' environment $((SECONDS - start)))")

# One thread per process: ranks of a test share the cores, and sums are the same on every machine. Two workers share the
# test files, since many tests wait for processes that start; a file stays whole, with the runs that its tests share.
export OMP_NUM_THREADS=1
check ruff ruff check .
check format ruff format --check .
check mypy mypy
check pytest python -m pytest --durations 10 --numprocesses 2 --dist loadfile --no-loadscope-reorder "${chosen[@]}" "$@"

printf '%s\n' "" "${times[@]}"
exit "$status"
