#!/usr/bin/env bash
# Runs the tests: tests/run.sh [pytest arguments]. Sets .venv and the native library up as launch.sh
# does, and adds pytest. Without arguments it runs all of them, two files at a time: most wait for
# processes that start.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
# shellcheck source=scripts/venv.sh
source "$root/scripts/venv.sh"
# shellcheck source=scripts/native.sh
source "$root/scripts/native.sh"

prepare_venv dev
prepare_native
cd "$project_root"
if (($# == 0)); then
    set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder
fi
exec "$venv/bin/python" -m pytest "$@"
