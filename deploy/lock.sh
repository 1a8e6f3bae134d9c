#!/bin/sh
# Makes the locks again: `make lock` keeps the versions that still fit, `make lock UPGRADE=--upgrade` takes the newest.
# The locks name no index, and hold for CPython 3.11 to 3.13 on x86-64 Linux (tool.uv in pyproject.toml).
set -eu
cd "$(dirname "$0")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools"
"$tools/bin/pip" install --quiet uv==0.13.9

lock() { # OUTPUT INPUT...
    output=$1
    shift
    "$tools/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
        --no-annotate --custom-compile-command 'make lock' ${UPGRADE:-} --output-file "$output" "$@"
    echo "$output: $(grep -c '^[a-z0-9].*==' "$output") packages"
}

# setuptools builds the checkout itself, without another download.
echo 'setuptools>=80.9' >"$tools/build.in"
lock deploy/service.lock pyproject.toml "$tools/build.in"
lock deploy/dev.lock --extra dev --constraint deploy/service.lock pyproject.toml "$tools/build.in"
# Without torch, which is installed by itself; what torch needs beside the rest is named here.
printf '%s\n' filelock fsspec jinja2 networkx sympy typing-extensions >"$tools/torch.in"
lock deploy/train.lock --extra train --constraint deploy/service.lock --constraint deploy/dev.lock \
    --override deploy/vllm/overrides.txt pyproject.toml "$tools/build.in" "$tools/torch.in"
lock deploy/vllm/requirements-cpu.lock --override deploy/vllm/overrides.txt deploy/vllm/requirements-cpu.in
lock benchmarks/requirements.lock --override deploy/vllm/overrides.txt benchmarks/requirements.in
