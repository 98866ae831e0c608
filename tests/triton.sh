#!/usr/bin/env bash
# Tests the Triton kernels without a GPU: what they compute, in Triton's interpreter on the CPU, and that
# they compile for an H100's architecture. torch's CUDA builds bring Triton with them, those for the CPU do
# not: it is installed (200 MB to fetch, 700 MB on disk) into build/ and nowhere else.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
version=3.7.1 # what torch 2.13.0 for CUDA asks for
triton=$root/build/triton-$version

# shellcheck source=scripts/venv.sh
source "$root/scripts/venv.sh"
prepare_venv dev
if [[ ! -d $triton ]]; then
    echo "installing triton $version into $triton"
    rm -rf "$triton.part"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
        --target "$triton.part" "triton==$version"
    mv "$triton.part" "$triton"
fi
cd "$project_root"
export PYTHONPATH=$triton TRITON_CACHE_DIR=$root/build/triton-cache
"$venv/bin/python" -m pytest -q --numprocesses 2 tests/worker/test_triton_compiled.py
TRITON_INTERPRET=1 "$venv/bin/python" -m pytest -q --numprocesses 2 \
    tests/worker/test_triton_kernels.py tests/worker/test_deterministic.py
