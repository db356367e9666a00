#!/usr/bin/env bash
# All that takes a GPU, measured in under 8 minutes on one card:
#   experiments/gpu.sh pack FOLDER --data DATA --weights FILE   where there is a network: what must travel, under 64 MiB
#   experiments/gpu.sh FOLDER                                   on the GPU machine, from what the folder holds
#   experiments/gpu.sh --dry                                    the same at tiny sizes on the CPU, to see that it runs
# PYTHON names the interpreter (python3). -h, after pack too, tells the rest.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$top/src${PYTHONPATH:+:$PYTHONPATH}"
if [ "${1:-}" = pack ]; then
    shift
    exec "$python" "$top/experiments/gpu_pack.py" "$@"
fi
exec "$python" "$top/experiments/gpu.py" "$@"
