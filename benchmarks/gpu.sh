#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: all tests that need one, then the measurements, in one command.
#   benchmarks/gpu.sh [arguments of benchmarks/gpu.py]
# Writes tests.txt, gpu.json and gpu.md into $OUT (default build/gpu). Takes some 8 minutes on an H200.
#
# Uses $PYTHON (default python3) as it is when its torch sees a GPU; packages that are missing there are
# installed into build/gpu-packages, from the registry or from where pip's own variables say (PIP_FIND_LINKS,
# PIP_NO_INDEX). Without such a torch it makes .venv, as launch.sh does, whose torch is the registry's for
# CUDA. Triton comes with torch, but wants a C compiler; without one torch's own functions compute.
# SKIP_TESTS=1 only measures.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
cd "$root"
out=${OUT:-$root/build/gpu}
python=${PYTHON:-python3}
packages=$root/build/gpu-packages
export PYTHONPATH=$root:$packages TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$root/build/triton-cache}

sees_gpu() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

if ! sees_gpu "$python"; then
    # shellcheck source=scripts/venv.sh
    source scripts/venv.sh
    prepare_venv dev
    python=$venv/bin/python
    sees_gpu "$python" || {
        echo "benchmarks/gpu.sh: neither the torch of ${PYTHON:-python3} nor that of $python sees a GPU" >&2
        exit 1
    }
fi

# What the worker, the server, the tests and the comparison import, as PACKAGE:MODULE.
wanted=(msgspec:msgspec numpy:numpy pyzmq:zmq safetensors:safetensors tokenizers:tokenizers jinja2:jinja2
    huggingface_hub:huggingface_hub platformdirs:platformdirs psutil:psutil pytest:pytest
    pytest-timeout:pytest_timeout pytest-xdist:xdist sqlalchemy:sqlalchemy alembic:alembic transformers:transformers)
missing=()
for item in "${wanted[@]}"; do
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('${item#*:}') is None)" ||
        missing+=("${item%:*}")
done
if ((${#missing[@]})); then
    echo "$python lacks ${missing[*]}: installing into $packages"
    mkdir -p "$packages"
    pinned=()
    for name in "${missing[@]}"; do
        pinned+=("$(grep -ihE "^$name==" requirements.lock requirements-dev.lock | head -n 1 || true)")
    done
    "$python" -m pip install --quiet --target "$packages" "${pinned[@]}" ||
        echo "that failed; what needs them will say so"
fi

mkdir -p "$out"
status=0
if [[ -z ${SKIP_TESTS:-} ]]; then
    # Those of the kernels compile some hundred variants, which takes the processor more time than the GPU.
    kernels=tests/worker/test_triton_kernels.py
    "$python" -m pytest -m gpu -q --numprocesses 8 "$kernels" 2>&1 | tee "$out/tests.txt" || status=$?
    "$python" -m pytest -m gpu -q tests/worker tests/e2e/test_device.py --ignore "$kernels" 2>&1 |
        tee --append "$out/tests.txt" || status=$?
fi
"$python" -m benchmarks.gpu --out "$out" "$@" || status=$?
exit "$status"
