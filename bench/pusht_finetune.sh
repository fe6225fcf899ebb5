#!/usr/bin/env bash
# Push-T: imitation, fine-tuning by reinforcement learning, and the compute-matched control, measured.
#
#   bench/pusht_finetune.sh [options of bench/pusht_finetune.py]        (--help lists them)
#
# Stops and resumes: run it again with the same options and it goes on where it was. About 50 minutes on 2 cores.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
exec "${PYTHON:-python3}" "$root/bench/pusht_finetune.py" "$@"
