#!/usr/bin/env bash
# Compiles the contracts and writes ABI and creation code of each into p2pflock/chain/artifacts/ (committed).
set -euo pipefail
# shellcheck source=paths.sh
source "$(dirname "$0")/paths.sh"

"$FORGE" build --skip test --quiet
node tools/export.js
