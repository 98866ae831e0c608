# Makes, completes and repairs .venv. Sourced by launch.sh, tests/run.sh and .ci/run; not run itself.
#
#   prepare_venv runtime   what the server needs: requirements.lock and the project, editable
#   prepare_venv dev       that, and what tests and checks need: requirements-dev.lock
#
# Read from the environment:
#   PYTHON                 the interpreter .venv is made with; else the newest of python3.11 and up
#   TORCH_CPU_INDEX_URL    where torch's CPU build comes from; empty: from the ordinary registry
# and of pip's own variables those that say where packages come from.
#
# To choose Python or the build of torch anew, remove .venv.
# shellcheck shell=bash

project_root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
venv=$project_root/.venv
setup_log=$venv/setup.log
# Stands while packages are being installed: who finds it knows that a set-up was cut short.
unfinished=$venv/unfinished
torch_cpu_index=${TORCH_CPU_INDEX_URL-https://download.pytorch.org/whl/cpu}

say() { printf 'tpserve: %s\n' "$*" >&2; }

die() {
    say "$*"
    exit 1
}

prepare_venv() {
    if ! is_ready runtime; then
        complete_venv runtime
    fi
    if [[ $1 == dev ]] && ! is_ready dev; then
        complete_venv dev
    fi
}

# --- is there anything to do? ---------------------------------------------------------------------

stamp() { printf '%s' "$venv/ready-$1"; }

# One line that changes when packages may have to be installed again. The folder is part of it
# because the scripts in .venv/bin name it: a copied or moved project must not run the original.
fingerprint() {
    local files=("$project_root/pyproject.toml" "$project_root/requirements.lock")
    if [[ $1 == dev ]]; then
        files+=("$project_root/requirements-dev.lock")
    fi
    {
        "$venv/bin/python" -I -S -c 'import sys; print(sys.version_info[:2])' 2>/dev/null &&
            printf '%s\n' "$project_root" &&
            cat "${files[@]}"
    } | sha256sum
}

is_ready() {
    local now
    [[ -f $(stamp "$1") ]] && now=$(fingerprint "$1") && [[ $(<"$(stamp "$1")") == "$now" ]]
}

mark_ready() {
    fingerprint "$1" >"$venv/stamp.new"
    mv "$venv/stamp.new" "$(stamp "$1")"
}

# --- installing -----------------------------------------------------------------------------------

# A subshell: the lock ends with it, so that the server started afterwards does not hold it.
complete_venv() (
    trap 'exit 130' INT
    trap 'exit 143' TERM
    exec 9>"$project_root/.venv.lock"
    if ! flock --nonblock 9; then
        say "another set-up of .venv is running; waiting for it ..."
        flock 9
    fi
    if is_ready "$1"; then
        exit
    fi

    unset PYTHONHOME PYTHONPATH
    drop_pip_overrides
    if [[ -e $unfinished ]] || ! venv_works; then
        make_venv
    fi
    touch "$unfinished"
    rm -f "$(stamp "$1")"
    if [[ $1 == runtime ]]; then
        say "installing pinned packages into .venv (first start, or they changed) ..."
        if ! has_nvidia_driver; then
            install_cpu_torch
        fi
        install --requirement "$project_root/requirements.lock"
        install --no-deps --no-build-isolation --editable "$project_root"
    else
        say "installing what tests and checks need into .venv ..."
        install --requirement "$project_root/requirements-dev.lock"
    fi
    mark_ready "$1"
    rm "$unfinished"
)

venv_works() {
    "$venv/bin/python" -I -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

make_venv() {
    local python
    python=$(find_python)
    say "making .venv with Python $(python_version "$python")"
    rm -rf "$venv"
    mkdir "$venv"
    touch "$unfinished"
    "$python" -m venv "$venv" >>"$setup_log" 2>&1 || fail_with_log "making .venv"
}

# Prints the interpreter to use, or says on stderr what is missing.
find_python() {
    local candidates=(python3.14 python3.13 python3.12 python3.11 python3)
    local candidate version problem=""
    if [[ -n ${PYTHON:-} ]]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        version=$(python_version "$candidate") || continue
        if [[ ! $version =~ ^(3\.([0-9]+)) ]] || ((BASH_REMATCH[2] < 11)); then
            : "${problem:=$candidate is Python $version}"
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            # Debian and Ubuntu split them off, and `python -m venv` would fail half-way.
            : "${problem:=$candidate has no venv module (apt install python${BASH_REMATCH[1]}-venv)}"
        else
            printf '%s' "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed, but ${problem:-none of ${candidates[*]} is there}." \
        "Install it, or set PYTHON to its path, and start again"
}

python_version() {
    "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null
}

has_nvidia_driver() {
    [[ -e /proc/driver/nvidia/version ]] || timeout 10 nvidia-smi -L &>/dev/null
}

# The registry's torch for Linux comes with gigabytes of CUDA; PyTorch's CPU index has it without.
# Where that does not work out nothing is lost: requirements.lock gets torch from the registry.
install_cpu_torch() {
    local torch
    if [[ -z $torch_cpu_index ]] || ! torch=$(grep '^torch==' "$project_root/requirements.lock"); then
        return
    fi
    if ! index_answers "$torch_cpu_index/torch/"; then
        say "$torch_cpu_index does not answer: torch comes from the ordinary registry"
    elif ! pip_install --no-deps --index-url "$torch_cpu_index" "$torch+cpu"; then
        say "$torch_cpu_index has no $torch for this machine: it comes from the ordinary registry"
    fi
}

# Asked before pip is, because pip with its patience for downloads takes minutes to give up.
index_answers() {
    timeout 10 "$venv/bin/python" -I -c \
        'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5).close()' \
        "$1" 2>>"$setup_log"
}

# Settings of the user's pip that say what to do with packages (PIP_USER, PIP_TARGET, PIP_NO_DEPS,
# PIP_REQUIRE_VIRTUALENV ...) are not meant for this; those that say where to get them are.
drop_pip_overrides() {
    local name
    for name in "${!PIP_@}"; do
        case $name in
            PIP_*INDEX* | PIP_FIND_LINKS | PIP_TRUSTED_HOST | PIP_*CERT | PIP_PROXY) ;;
            PIP_*TIMEOUT | PIP_RETRIES | PIP_*CACHE* | PIP_KEYRING_PROVIDER | PIP_CONFIG_FILE) ;;
            *) unset "$name" ;;
        esac
    done
}

install() { pip_install "$@" || fail_with_log "installing packages"; }

pip_install() {
    "$venv/bin/python" -I -m pip install --no-input --no-user --progress-bar off \
        --disable-pip-version-check "$@" >>"$setup_log" 2>&1
}

fail_with_log() {
    tail -n 20 "$setup_log" >&2
    die "$1 failed: the reason is above, all of it in $setup_log"
}
