#!/usr/bin/env bash
# Builds the web page from gateway/webui: scripts/web.sh. With --check the sources are checked first,
# and the build must be equal to gateway/webui/dist as it is committed. Needs Node 20.19 or newer.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
check=0
if [[ ${1-} == --check && $# == 1 ]]; then
    check=1
elif (($# > 0)); then
    echo "scripts/web.sh: unknown arguments: $*; it takes --check or nothing" >&2
    exit 2
fi
if ! command -v npm >/dev/null; then
    echo "scripts/web.sh: there is no npm: install Node.js 20.19 or newer" >&2
    exit 3
fi

cd "$root/gateway/webui"
npm ci --no-audit --no-fund
if ((check)); then
    npm run check
fi
npm run build
if ((check)) && [[ -n $(git status --porcelain -- dist) ]]; then
    echo "gateway/webui/dist is not what its sources build: run scripts/web.sh and commit the result" >&2
    git status --short -- dist >&2
    exit 1
fi
