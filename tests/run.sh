#!/usr/bin/env bash
# Runs the tests: tests/run.sh [pytest arguments]. Sets .venv up as launch.sh does, and adds pytest.
set -euo pipefail

# shellcheck source=scripts/venv.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../scripts/venv.sh"

prepare_venv dev
cd "$project_root"
exec "$venv/bin/python" -m pytest "$@"
