#!/bin/sh
# Packages for a machine that need not be this one, by this one's pip: nothing of theirs is run.
#
#   docker/packages.sh fetch WHEELS MACHINE PYTHON [EXTRAS]
#   docker/packages.sh install WHEELS MACHINE PYTHON TARGET [EXTRAS]
#
# WHEELS is a folder with meiqa's wheel; fetch adds all that it needs, by the network, and install
# needs neither that nor a compiler. MACHINE is x86_64 or aarch64, PYTHON a version as 3.13.
# EXTRAS are meiqa's, as cpu,serve. Without them install takes what scoring photos on a CPU imports
# and leaves out the rest of what that was fetched with, such as the client of a hub of models that
# tokenizers asks for.
set -eu

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 4 ] || usage
does=$1 wheels=$2 machine=$3 python=$4
shift 4
case $machine in
  x86_64|amd64) machine=x86_64 ;;
  aarch64|arm64) machine=aarch64 ;;
  *) usage ;;
esac

tags="--only-binary=:all: --implementation cp --python-version $python"
for abi in "cp$(echo "$python" | tr -d .)" abi3 none; do tags="$tags --abi $abi"; done
for glibc in 28 27 26 24 17 12 5; do tags="$tags --platform manylinux_2_${glibc}_$machine"; done
tags="$tags --platform manylinux2014_$machine"
pip="python3 -m pip --disable-pip-version-check --quiet"

case $does in
  fetch)
    meiqa=$(ls "$wheels"/meiqa-*_"$machine".whl)
    # shellcheck disable=SC2086
    exec $pip download $tags --dest "$wheels" "${meiqa}[${1:-cpu}]"
    ;;
  install)
    [ $# -ge 1 ] || usage
    given="meiqa onnxruntime numpy pillow tokenizers cachetools click nanobind-backend platformdirs"
    if [ $# -ge 2 ]; then given="meiqa[$2]"; else tags="$tags --no-deps"; fi
    # Which versions fit the other machine's Python was found when they were fetched.
    # shellcheck disable=SC2086
    exec $pip install $tags --ignore-requires-python --no-index --find-links "$wheels" \
      --no-compile --target "$1" $given
    ;;
  *) usage ;;
esac
