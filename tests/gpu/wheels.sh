#!/usr/bin/env bash
# Gather the wheels of wheels.txt for CPython 3.12 on x86-64 Linux, for a machine with torch and without a network:
#
#     tests/gpu/wheels.sh build/gpu-wheels           # here; as `make gpu-wheels`
#     python3 -m tests.gpu --wheels build/gpu-wheels # there, in a checkout that holds this folder
#
# DeepSpeed is published as source: it is built here, without its compiled ops, which no step needs. That imports torch, so
# PYTHON is one that has it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?usage: tests/gpu/wheels.sh FOLDER}
python=${PYTHON:-python3}

wanted=$(grep -v '^#' "$here/wheels.txt")
binary=$(grep -v '^deepspeed==' <<<"$wanted")
source=$(grep '^deepspeed==' <<<"$wanted")
platforms=()
for version in 2_28 2_27 2_24 2_17; do
    platforms+=(--platform "manylinux_${version}_x86_64")
done
platforms+=(--platform manylinux2014_x86_64)

rm -rf "$folder"
mkdir -p "$folder"
# shellcheck disable=SC2086  # one requirement a word
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest "$folder" $binary
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" "$source"
ls -l "$folder"
du --summarize --human-readable "$folder"
