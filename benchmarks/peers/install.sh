#!/bin/sh
# Installs what the benchmarks compare with into benchmarks/.venv-peers and .venv-curator, and builds benchmarks/native.
#
#     sh benchmarks/peers/install.sh
#
# Needs uv (the one of .venv, else the one on PATH) and cargo. Does nothing where nothing changed.
set -eu
cd "$(dirname "$0")/.."
UV=../.venv/bin/uv
test -x "$UV" || UV=uv
export VIRTUAL_ENV=.venv-peers
READY=.venv-peers/ready

if ! test -e "$READY" || test peers/requirements.txt -nt "$READY" || test peers/trainers.txt -nt "$READY"; then
    "$UV" venv --quiet --clear --python ../.venv/bin/python .venv-peers
    "$UV" pip install --quiet --requirements peers/requirements.txt
    # One by one: what does not install on this machine is shown as such in its row of the tables.
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
# From inside the crate, because its settings (target-cpu=native) are looked for from there.
cd native && CARGO_TARGET_DIR=target cargo build --quiet --release --locked
