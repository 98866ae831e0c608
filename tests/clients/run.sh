#!/usr/bin/env bash
# Tests real clients against one server with the bundled models:
#   tests/clients/run.sh [openai] [litellm] [langchain-openai] [llm] [schemathesis]
# Without a name all of them. Each has its own environment in build/clients/, with the versions of
# tests/clients/requirements/. Uses .venv, which launch.sh and tests/run.sh make.
set -euo pipefail

root=$(dirname "$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")")
here=$root/tests/clients
built=$root/build/clients
key=clients-test-key

if [[ ! -x $root/.venv/bin/tpserve ]]; then
    echo "there is no $root/.venv yet: run tests/run.sh or ./launch.sh once" >&2
    exit 2
fi

prepare() {
    local name=$1 pins=$here/requirements/$1.txt
    if ! cmp -s "$pins" "$built/$name/installed.txt"; then
        rm -rf "${built:?}/$name"
        "${PYTHON:-$root/.venv/bin/python}" -m venv "$built/$name"
        "$built/$name/bin/pip" install --quiet --quiet --disable-pip-version-check -r "$pins"
        cp "$pins" "$built/$name/installed.txt"
    fi
}

start_server() {
    # Few places, so that the tests can fill them.
    TPSERVE_API_KEYS=$key PYTHONPATH=$root "$root/.venv/bin/tpserve" serve \
        --listen 'tcp://127.0.0.1:*' --http 127.0.0.1:0 --database none \
        --max-num-seqs 4 --queue-limit 4 >"$built/server.out" 2>"$built/server.log" &
    server=$!
    trap 'kill -INT "$server" 2>/dev/null; wait "$server" || true' EXIT
    local waited
    for ((waited = 0; waited < 1200; waited++)); do
        url=$(sed -n 's/^gateway //p' "$built/server.out")
        if [[ -n $url ]]; then
            return
        fi
        if ! kill -0 "$server" 2>/dev/null; then
            break
        fi
        sleep 0.1
    done
    cat "$built/server.log" >&2
    exit 1
}

test_client() {
    local name=$1
    TPSERVE_URL=$url OPENAI_BASE_URL=$url/v1 OPENAI_API_KEY=$key NO_PROXY=127.0.0.1 \
        "$built/$name/bin/python" -m pytest -q -c /dev/null --rootdir "$here" \
        --confcutdir "$here" -p no:cacheprovider "$here/with_${name//-/_}.py"
}

mkdir -p "$built"
names=("$@")
if ((${#names[@]} == 0)); then
    names=(openai litellm langchain-openai llm schemathesis)
fi
for name in "${names[@]}"; do
    prepare "$name"
done
start_server
failed=()
for name in "${names[@]}"; do
    echo "== $name"
    if [[ $name == schemathesis ]]; then
        # Its test starts servers of its own.
        (cd "$root" && .venv/bin/python -m pytest -q tests/gateway/test_openapi.py) || failed+=("$name")
    else
        test_client "$name" || failed+=("$name")
    fi
done
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
