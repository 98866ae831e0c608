#!/usr/bin/env bash
# Starts the server: ./launch.sh --workers 4 (every option: ./launch.sh --help).
#
# The first start makes .venv beside this file, installs the pinned packages into it and compiles the
# native kernels; so does the first one after the pins, or the kernels' sources, changed. Every other
# start goes straight to the server.
set -euo pipefail

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck source=scripts/venv.sh
source "$here/scripts/venv.sh"
# shellcheck source=scripts/native.sh
source "$here/scripts/native.sh"

prepare_venv runtime
prepare_native
exec "$venv/bin/tpserve" serve "$@"
