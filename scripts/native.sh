# Builds the native library when it is missing or its sources have changed. Sourced after venv.sh by
# launch.sh and tests/run.sh; not run itself.
#
# Read from the environment:
#   CXX                    the C++ compiler; else the first of c++, g++ and clang++
# shellcheck shell=bash

# shellcheck disable=SC2154 # project_root and venv are venv.sh's
native=$project_root/worker/native

# Without a compiler, or with sources that do not compile, the server starts all the same; the
# build has then said in one line what is lost.
prepare_native() {
    local status=0
    if ! native_is_ready; then
        # From the project's folder, and with the standard library alone (-ESs).
        (cd "$project_root" && exec "$venv/bin/python" -ESs -m worker.native.build) || status=$?
        if ((status >= 128)); then
            exit "$status" # interrupted
        fi
    fi
}

# Answers without Python, as every start asks. The stamp is build.py's, its first line the compiler's; a
# library outlives the compiler it was made with, but not its sources.
native_is_ready() {
    local stamp compiler
    [[ -f $native/libtpserve.so && -f $native/libtpserve.stamp ]] || return
    stamp=$(<"$native/libtpserve.stamp")
    compiler=$(compiler_version)
    [[ ${stamp#*$'\n'} == "$(native_inputs)" ]] &&
        [[ -z $compiler || ${stamp%%$'\n'*} == "compiler $compiler" ]]
}

# What toolchain.py's find_compiler finds; nothing where there is no compiler.
compiler_version() {
    local candidates=(c++ g++ clang++) candidate command version
    if [[ -n ${CXX:-} ]]; then
        candidates=("$CXX")
    fi
    for candidate in "${candidates[@]}"; do
        read -ra command <<<"$candidate"
        if version=$("${command[@]}" --version 2>/dev/null); then
            printf '%s' "${version%%$'\n'*}"
            return
        fi
    done
}

# The same text as build.py's describe_inputs.
native_inputs() (
    export LC_ALL=C
    shopt -s nullglob
    cd "$native"
    printf 'build release %s\n' "$(uname -m)"
    sha256sum build.py toolchain.py *.cpp *.h
)
