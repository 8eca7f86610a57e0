#!/usr/bin/env bash
# Run the GPU benchmark on a bare machine without network: Python 3.12, torch 2.11, transformers 5.17, peft, pyarrow.
#
#     scripts/benchmarks/gpu.sh --prepare prepared      # here, with network: wheels, configs and plans
#     scripts/benchmarks/gpu.sh prepared results.jsonl  # there, in the copied checkout; at most 8 minutes
#     scripts/benchmarks/gpu.sh --tiny prepared results.jsonl  # both steps here on tiny networks, without wheels
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD
python=${PYTHON:-python}

if [ "$1" = --tiny ]; then
    "$python" scripts/benchmarks/gpu.py prepare --tiny --folder "$2"
    exec "$python" scripts/benchmarks/gpu.py run --folder "$2" --output "$3"
fi

if [ "$1" = --prepare ]; then
    mkdir -p "$2/wheels"
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 -d "$2/wheels" -c constraints.txt \
        diffusers accelerate datasets trl xxhash multiprocess dill pandas bitsandbytes pytest pluggy iniconfig
    # Half of bitsandbytes is libraries for other devices and for versions of CUDA that torch 2.11 does not come with.
    "$python" - "$2"/wheels/bitsandbytes-*.whl <<'END'
import re, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    files = {each: wheel.read(each) for each in wheel.infolist()}
unused = re.compile(r"bitsandbytes/libbitsandbytes_(rocm|xpu|cuda11|cuda12[0-5])")
with zipfile.ZipFile(sys.argv[1], "w", zipfile.ZIP_DEFLATED) as wheel:
    for each, content in files.items():
        if each.filename.endswith("/RECORD"):
            content = b"".join(line for line in content.splitlines(True) if not unused.match(line.decode()))
        if not unused.match(each.filename):
            wheel.writestr(each, content)
END
    size=$(du -sm "$2/wheels" | cut -f1)
    echo "wheels: $size MiB"
    if [ "$size" -gt 60 ]; then
        echo "more than 60 MiB: bitsandbytes is left out, and its cases will say that it is missing" >&2
        rm -f "$2"/wheels/bitsandbytes-*
    fi
    exec "$python" scripts/benchmarks/gpu.py prepare --folder "$2"
fi

"$python" -m pip install --quiet --no-index --no-deps --find-links "$1/wheels" "$1"/wheels/*.whl
timeout 360 "$python" scripts/benchmarks/gpu.py run --folder "$1" --output "$2" --seconds 300 || echo "stopped: $?" >&2
timeout 90 "$python" -m pytest -q -m gpu -p no:cacheprovider -o addopts= tests
