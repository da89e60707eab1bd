# Sourced by build.sh and test.sh: the project directory and forge, installed from package-lock.json when missing.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FORGE="$PWD/node_modules/@foundry-rs/forge-linux-amd64/bin/forge"

# npm writes this file last: when it is older than our lock, the tools are not the ones the lock names.
if [ ! -x "$FORGE" ] || [ package-lock.json -nt node_modules/.package-lock.json ]; then
    command -v npm >/dev/null || { echo "npm is not installed: install Node.js 18 or newer" >&2; exit 22; }
    npm ci --no-progress --loglevel=error
    touch node_modules/.package-lock.json
fi
[ -x "$FORGE" ] || { echo "$FORGE is missing: no build of forge for this platform" >&2; exit 22; }
