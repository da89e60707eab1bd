#!/usr/bin/env bash
# Format, tests, and proof that the committed artifacts equal a fresh build. Changes no file of the repository.
set -euo pipefail
# shellcheck source=paths.sh
source "$(dirname "$0")/paths.sh"

"$FORGE" fmt --check
"$FORGE" test "$@"
"$FORGE" build --skip test --force --quiet
node tools/export.js --check
