#!/usr/bin/env bash
# Installs what optional peers need into build/peers/NAME, beside the environment and invisible to it.
#   bench/peers/setup.sh [NAME...]     default: all that requirements/ names
set -euo pipefail
cd "$(dirname "$0")/../.."
names=("$@")
((${#names[@]})) || mapfile -t names < <(basename -s .txt bench/peers/requirements/*.txt)
for name in "${names[@]}"; do
  list=bench/peers/requirements/$name.txt
  [[ -f $list ]] || { echo "peers: no $list" >&2; exit 1; }
  rm -rf "build/peers/$name" "build/peers/$name.part"
  echo "peers: $name into build/peers/$name"
  # Without dependencies: torch and numpy are the environment's, every other package has its pin in the list.
  .venv/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-deps \
    --target "build/peers/$name.part" --requirement "$list"
  mv "build/peers/$name.part" "build/peers/$name"
done
