#!/usr/bin/env bash
# Tests and benchmarks on a CUDA machine: bench/gpu.sh [--budget 9m] [--out DIR] [-- arguments of bench/run.py]
#
# Runs the kernel and op tests compiled for the device, then the attention and the modulation suite, and writes
# pytest.log, environment.json, attention.json, modulate.json and table.md to DIR (default: $OUT if set, else
# bench/results/<device>). The arguments after -- go to the attention suite.
# Needs torch, triton, numpy, einops, pytest; no network and no installation of this package.
# Exit code: that of the tests if they failed, else that of the benchmarks.
set -uo pipefail

budget=9m
out=${OUT:-}
python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
    echo "bench/gpu.sh: $*" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --budget) [ $# -ge 2 ] || die "--budget needs a value"; budget=$2; shift 2 ;;
        --out) [ $# -ge 2 ] || die "--out needs a value"; out=$2; shift 2 ;;
        --) shift; break ;;
        *) die "unknown argument $1 (there are: --budget 9m, --out DIR, -- arguments of bench/run.py)" ;;
    esac
done
[[ $budget =~ ^([0-9]+)([smh]?)$ ]] || die "--budget must be like 90s, 9m, 1h, got $budget"
seconds=${BASH_REMATCH[1]}
case ${BASH_REMATCH[2]} in m) seconds=$((seconds * 60)) ;; h) seconds=$((seconds * 3600)) ;; esac
started=$SECONDS
cd "$root" || die "cannot enter $root"

command -v nvidia-smi >/dev/null || die "nvidia-smi is not on PATH: this needs a machine with an NVIDIA GPU"
device=$("$python" -c 'import sys, torch
torch.cuda.is_available() or sys.exit("torch.cuda.is_available() is False (torch %s)" % torch.__version__)
print(torch.cuda.get_device_name())') || die "no usable CUDA device"
name=$(printf %s "$device" | tr '[:upper:]' '[:lower:]' | sed -E 's/[^a-z0-9]+/-/g; s/^-+//; s/-+$//')
out=${out:-bench/results/$name}
mkdir -p "$out" || die "cannot write in $out"
out=$(cd "$out" && pwd)
echo "device: $device; results: $out; budget: ${seconds} s"

unset TRITON_INTERPRET  # the kernels run compiled here
# The package's layout without an installation: kernels/ becomes minidiff_fast/kernels.
site=$(mktemp -d) || die "no temporary folder"
trap 'rm -rf "$site"' EXIT
cp -r minidiff_fast "$site/" && rm -rf "$site/minidiff_fast/kernels" && cp -r kernels "$site/minidiff_fast/kernels" ||
    die "cannot copy the package to $site"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

"$python" - "$out/environment.json" <<'PY' || die "cannot write $out/environment.json"
import importlib.metadata, json, os, platform, subprocess, sys
import torch

def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

properties = torch.cuda.get_device_properties(0)
packages = ("torch", "triton", "numpy", "einops", "pytest", "flash-attn", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
facts = {
    "device": torch.cuda.get_device_name(),
    "capability": list(torch.cuda.get_device_capability()),
    "multiprocessors": properties.multi_processor_count,
    "memory_bytes": properties.total_memory,
    "python": platform.python_version(),
    "packages": {name: version(name) for name in packages},
    "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version(),
    "cpus": os.cpu_count(),
    "nvidia_smi": subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout.splitlines(),
}
with open(sys.argv[1] + ".tmp", "w") as file:
    json.dump(facts, file, indent=1)
os.replace(sys.argv[1] + ".tmp", sys.argv[1])
PY

# Tests: at most 40 % of the budget. Plugins named in pyproject.toml may be missing here, hence our own addopts,
# and the empty sys.path entry goes, because the repository's root holds a folder named kernels.
folders=()
for folder in tests/kernels tests/ops; do [ -d "$folder" ] && folders+=("$folder"); done
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
tests=5  # pytest's code for "no tests"
if [ ${#folders[@]} -gt 0 ]; then
    timeout --kill-after=10 $((seconds * 2 / 5)) "$python" -c '
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import pytest
sys.exit(pytest.main(sys.argv[1:]))' "${folders[@]}" -m "not slow" -q -p no:cacheprovider \
        -o addopts="--import-mode=importlib -ra" "${workers[@]}" 2>&1 | tee "$out/pytest.log"
    tests=${PIPESTATUS[0]}
else
    echo "there is neither tests/kernels nor tests/ops" | tee "$out/pytest.log"
fi
[ "$tests" -eq 0 ] || echo "bench/gpu.sh: the tests ended with code $tests" | tee -a "$out/pytest.log" >&2

left=$((seconds - (SECONDS - started) - 15))
bench=0
if [ "$left" -gt 0 ]; then
    "$python" bench/run.py attention --device cuda --budget "$((left * 2 / 3))s" --out "$out" "$@"
    bench=$?
    left=$((seconds - (SECONDS - started) - 15))
    [ "$left" -le 0 ] || "$python" bench/run.py modulate --device cuda --budget "${left}s" --out "$out" || bench=$?
    left=$((seconds - (SECONDS - started) - 15))
    # The one ecosystem that needs torch alone.
    [ "$left" -le 60 ] || "$python" bench/run.py integrations --only torch_modules --device cuda --out "$out" || bench=$?
else
    echo "bench/gpu.sh: no time is left for the benchmarks" >&2
    bench=1
fi
if [ -f "$out/attention.json" ]; then
    "$python" bench/report.py "$out" --no-figures || bench=$?
fi
[ "$tests" -eq 0 ] || exit "$tests"
exit "$bench"
