#!/bin/sh
# Installs the peers of the benchmarks into benchmarks/.venv-peers and .venv-curator, and builds benchmarks/native.
#
#     sh benchmarks/peers/install.sh
#
# Needs uv (from .venv or else from PATH) and cargo. Skips what is up to date.
set -eu
cd "$(dirname "$0")/.."
UV=../.venv/bin/uv
test -x "$UV" || UV=uv
export VIRTUAL_ENV=.venv-peers
READY=.venv-peers/ready

if ! test -e "$READY" || test peers/requirements.txt -nt "$READY" || test peers/trainers.txt -nt "$READY"; then
    "$UV" venv --quiet --clear --python ../.venv/bin/python .venv-peers
    "$UV" pip install --quiet --requirements peers/requirements.txt
    # One by one: a package that cannot be installed on this machine says so in its row of the tables.
    grep -v '^#' peers/trainers.txt | while read -r trainer; do
        "$UV" pip install --quiet --no-deps "$trainer" || echo "not installed: $trainer" >&2
    done
    touch "$READY"
fi
READY=.venv-curator/ready
if ! test -e "$READY" || test peers/curator.txt -nt "$READY"; then
    "$UV" venv --quiet --clear --python ../.venv/bin/python .venv-curator
    VIRTUAL_ENV=.venv-curator "$UV" pip install --quiet --requirements peers/curator.txt
    touch "$READY"
fi
# cargo looks for the settings of the crate (target-cpu=native) in the current folder.
cd native && CARGO_TARGET_DIR=target cargo build --quiet --release --locked
