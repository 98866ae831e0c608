#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: all tests that need one, then the measurements, as a Markdown table.
# Uses the Python of $PYTHON (default python3), which needs torch for CUDA, the project's requirements
# and, for the comparison, transformers. Arguments go to benchmarks/gpu.py.
set -euo pipefail

cd "$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "benchmarks/gpu.sh: the torch of $python sees no GPU" >&2
    exit 1
}
"$python" -m pytest -m gpu tests
"$python" -m benchmarks.gpu "$@"
