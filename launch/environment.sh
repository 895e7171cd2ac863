# shellcheck shell=bash
# The virtual environment of launch/quickstart.sh and tests/run.sh, made once and reused; sourced by both.
#
#   prepare_environment         the package and the pinned versions of what it needs
#   prepare_environment test    also what its tests need
#   step COMMAND ...            print a command so that it can be repeated by hand, then run it
#   fail MESSAGE [CODE]         one line on stderr, and the end
#
# PYTHON       interpreter to begin with, 3.10 to 3.13; else python3, python3.13, python3.12, python3.11, python3.10
# LUMINA_VENV  folder of the environment; else .venv in the checkout
# pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) choose where packages come from.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${LUMINA_VENV:-$ROOT/.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV

# Commands are shown where the script began to write, also when a step's own output goes to a file.
exec 3>&1

prepare_environment() {
    local extra=${1:-} digest
    if [[ -d $VENV && ! -f $VENV/pyvenv.cfg && -n $(ls -A "$VENV") ]]; then
        fail "$VENV is not a virtual environment; set LUMINA_VENV to an empty or new folder" 4
    fi
    digest=$(environment_digest)
    if ! installed "$digest" "$extra"; then
        make_environment
        install_package "$extra"
        printf '%s\n' "$digest" > "$(stamp "$extra")"
    fi
    activate_environment
}

step() {
    local word line=+
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./=,:+@%-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
    done
    printf '%s\n' "$line" >&3
    "$@"
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-1}"
}

# What the installed packages depend on. The checkout's place counts too: the package is installed from there.
environment_digest() {
    { cat "$ROOT/constraints.txt" "$ROOT/setup.py"; printf '%s' "$ROOT"; } | sha256sum | cut -d ' ' -f 1
}

stamp() {
    printf '%s/.lumina-installed%s' "$VENV" "${1:+-$1}"
}

# An environment with an extra serves those who need none.
installed() {
    local file
    for file in "$(stamp "$2")" "$(stamp test)"; do
        if [[ -f $file && $(< "$file") == "$1" ]]; then return 0; fi
    done
    return 1
}

make_environment() {
    local python
    if [[ -x $VENV/bin/python ]] && supported "$VENV/bin/python" && "$VENV/bin/python" -m pip --version > /dev/null 2>&1; then
        return
    fi
    python=$(find_python) || exit
    # --clear: what is there is half made, or of another Python.
    step "$python" -m venv --clear "$VENV" ||
        fail "$python cannot make a virtual environment; install its venv module (Debian and Ubuntu: python3-venv)" 4
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        supported "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.10, 3.11, 3.12 or 3.13; set PYTHON to one" 4
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if supported "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "no Python 3.10, 3.11, 3.12 or 3.13 found; install one, or set PYTHON to it" 4
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' > /dev/null 2>&1
}

# torch first, and by the constraints: pip then meets a fitting torch when it resolves deepspeed, instead of
# fetching the newest one with its CUDA packages. A user may also have put a build of their own there.
install_package() {
    local extra=$1 pip=("$VENV/bin/python" -m pip --disable-pip-version-check install) target=$ROOT
    [[ -t 1 ]] || pip+=(--quiet)
    step "${pip[@]}" --constraint "$ROOT/constraints.txt" torch
    [[ -z $extra ]] || target+="[$extra]"
    step "${pip[@]}" --constraint "$ROOT/constraints.txt" --editable "$target"
}

activate_environment() {
    # A module folder of another project in front of ours would be tested instead.
    unset PYTHONPATH PYTHONHOME
    printf '+ . %s/bin/activate\n' "$VENV" >&3
    # shellcheck disable=SC1091
    . "$VENV/bin/activate"
}
