#!/usr/bin/env bash
# Runs the CUDA tests and benchmarks on a machine with an NVIDIA device, and prints a table of all findings last.
#
#   bench/gpu_check.sh [OUTPUT]     OUTPUT: a file that gets the whole log too
#
# TIER_ROOT names a directory on the disk that loads are timed from (4 GiB are written there and removed); here by default.
# PYTHON names the interpreter (torch with CUDA, transformers, cuda-bindings, and the node's dependencies); python3 by default.
set -uo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUTPUT=${1:-/dev/null}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
findings=$(mktemp)
trap 'rm -f -- "$findings"' EXIT
failed=0

part() { # part NAME COMMAND...: run it, keep its findings (name<TAB>value lines) under its name
    local name=$1 status
    shift
    echo "== $name"
    "$@" 2>&1 | tee >(awk -F '\t' -v part="$name" 'NF == 2 { printf "%-10s %-44s %s\n", part, $1, $2 }' >>"$findings")
    status=${PIPESTATUS[0]}
    printf '%-10s %-44s %s\n' "$name" "exit status" "$status" >>"$findings"
    ((status == 0)) || failed=1
}

main() {
    date -u +%Y-%m-%d
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || {
        echo "there is no NVIDIA device here"
        return 1
    }
    "$PYTHON" -c 'import platform, torch, transformers; print("Python", platform.python_version(), "torch", torch.__version__, "transformers", transformers.__version__)'
    part tests "$PYTHON" -m pytest -q -p no:cacheprovider -c /dev/null --rootdir . tests/gpu
    part memory "$PYTHON" bench/gpu/device_memory.py
    part tier "$PYTHON" -m bench.gpu.device_tier --root "${TIER_ROOT:-$PWD}"
    part decode "$PYTHON" -m bench.gpu.decode
    sync
    echo
    echo "== findings"
    cat -- "$findings"
    return "$failed"
}

main 2>&1 | tee -- "$OUTPUT"
exit "${PIPESTATUS[0]}"
