#!/usr/bin/env bash
# Starts the server: ./launch.sh --workers 4 (every option: ./launch.sh --help).
#
# The first start makes .venv beside this file and installs the pinned packages into it; so does the
# first one after the pins changed. Every other start goes straight to the server.
set -euo pipefail

# shellcheck source=scripts/venv.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/venv.sh"

prepare_venv runtime
exec "$venv/bin/tpserve" serve "$@"
