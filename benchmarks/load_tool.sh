#!/usr/bin/env bash
# What a load tool of others measures over HTTP: llama-benchy against a server with the bundled models.
#   benchmarks/load_tool.sh [ARGUMENTS OF llama-benchy]
# Without arguments: prompts of 128 and 512 tokens, 64 new ones, 1, 4 and 16 requests at a time. Prints
# its table in Markdown under what it was measured with. Uses .venv, which launch.sh and tests/run.sh
# make; llama-benchy gets an environment of its own in build/load-tool/.
set -euo pipefail

version=0.4.0
root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
built=$root/build/load-tool
tool=$built/venv/bin/llama-benchy

if [[ ! -x $root/.venv/bin/tpserve ]]; then
    echo "there is no $root/.venv yet: run tests/run.sh or ./launch.sh once" >&2
    exit 2
fi

prepare() {
    if [[ $(cat "$built/installed" 2>/dev/null) != "$version" ]]; then
        rm -rf "$built"
        mkdir -p "$built"
        "${PYTHON:-$root/.venv/bin/python}" -m venv "$built/venv"
        "$built/venv/bin/pip" install --quiet --disable-pip-version-check "llama-benchy==$version"
        echo "$version" >"$built/installed"
    fi
}

# Waits until a file has a line that begins so, and prints the rest of the line.
line_of() {
    local file=$1 start=$2 process=$3 found waited
    for ((waited = 0; waited < 1200; waited++)); do
        found=$(sed -n "s|^$start||p" "$file")
        if [[ -n $found ]]; then
            echo "$found"
            return
        fi
        kill -0 "$process" 2>/dev/null || break
        sleep 0.1
    done
    echo "$file has no line that begins with '$start':" >&2
    cat "$file" "$built/server.log" >&2
    return 1
}

stop() {
    # Not SIGINT for the latter: a shell has processes in the background ignore it.
    kill -INT $server 2>/dev/null || true
    kill -TERM $library 2>/dev/null || true
    wait
}

prepare
# The tool takes prompts from a book that it loads from an address; these pages are long enough.
mkdir -p "$built/book" "$built/home"
cat "$root"/docs/*.md >"$built/book/book.txt"

server=
library=
trap stop EXIT
PYTHONPATH=$root "$root/.venv/bin/tpserve" serve --listen 'tcp://127.0.0.1:*' --http 127.0.0.1:0 \
    --database none >"$built/server.out" 2>"$built/server.log" &
server=$!
python3 -u -m http.server 0 --bind 127.0.0.1 --directory "$built/book" \
    >"$built/library.out" 2>>"$built/server.log" &
library=$!
url=$(line_of "$built/server.out" 'gateway ' "$server")
port=$(line_of "$built/library.out" 'Serving HTTP on 127.0.0.1 port ' "$library")
book=http://127.0.0.1:${port%% *}/book.txt

if (($# == 0)); then
    set -- --pp 128 512 --tg 64 --concurrency 1 4 16 --runs 3
fi
rm -rf "$built/home" "$built/table.md"
mkdir -p "$built/home"
HOME=$built/home HF_HUB_OFFLINE=1 NO_PROXY=127.0.0.1 no_proxy=127.0.0.1 "$tool" \
    --base-url "$url/v1" --api-key unused --model chat --tokenizer "$root/models/demo-chat" \
    --book-url "$book" --exact-tg --skip-coherence --exit-on-first-fail \
    --format md --save-result "$built/table.md" "$@" >"$built/tool.log" 2>&1 || {
    cat "$built/tool.log" >&2
    exit 1
}
processor=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
commit=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)
echo "$(date -u +%F), tpserve $("$root/.venv/bin/tpserve" --version | grep -o '[0-9][^ ]*') ($commit)," \
    "llama-benchy $version, ${processor:-unknown processor}, $(nproc) cores;" \
    "arguments: $*"
echo
cat "$built/table.md"
