#!/usr/bin/env bash
# Prepares a Debian 12 machine: the system packages of tools/debian-packages.txt and the virtual environment .venv.
# Installs only what is missing, so a second run is quick and needs neither root nor a network.
#   PYTHON           interpreter the environment is made from (default python3; 3.10 or newer)
#   TORCH_INDEX_URL  package index to take torch from, e.g. https://download.pytorch.org/whl/cpu (default: pip's own)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=.venv

die() {
  echo "setup: $*" >&2
  exit 1
}

command -v "$python" >/dev/null || die "no interpreter '$python'; set PYTHON to a Python 3.10 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "'$python' is older than Python 3.10"

# A Python built from source brings venv and its headers; Debian's own has them in packages of their own.
mapfile -t wanted < <(grep -v '^#' tools/debian-packages.txt)
"$python" -c 'import ensurepip' 2>/dev/null || wanted+=(python3-venv)
"$python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null ||
  wanted+=(python3-dev)

missing=()
for package in "${wanted[@]}"; do
  status=$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null || true)
  [[ $status == ii* ]] || missing+=("$package")
done
if ((${#missing[@]})); then
  [[ $(id -u) == 0 ]] || die "these Debian packages are missing: ${missing[*]}
setup: install them as root: apt-get install --no-install-recommends ${missing[*]}"
  echo "setup: installing Debian packages: ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install --quiet --constraint requirements/constraints.txt)
torch_from=()
[[ -z ${TORCH_INDEX_URL:-} ]] || torch_from=(--index-url "$TORCH_INDEX_URL")
echo "setup: Python packages into $venv"
"${pip[@]}" "${torch_from[@]}" --requirement requirements/torch.txt
"${pip[@]}" --requirement requirements/build.txt --requirement requirements/test.txt --requirement requirements/dev.txt
echo "setup: ready"
