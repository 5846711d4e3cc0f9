#!/usr/bin/env bash
# Parts of benchmarks/gpu.py, one after the other, each with a time limit of its own in seconds, so
# that one that hangs does not take the others along: `benchmarks/gpu.sh 1`, then 2, each under 9
# minutes on one H100. `benchmarks/gpu.sh 1 --dry-run` does the same in small on a CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
python=${PYTHON:-python}
case ${1:-} in
1) parts="tests:90 embedded:140 ceilings:20 W6:100 W5:170" ;;
2) parts="W6-trl:130 rollout:90 memory:60 resume:50 W5-trl:190" ;;
*) echo "usage: benchmarks/gpu.sh 1|2 [--dry-run]" >&2 && exit 2 ;;
esac
shift
"$python" benchmarks/gpu.py check "$@" || exit 2
failed=""
for part in $parts; do
    timeout --kill-after=5 "${part#*:}" "$python" benchmarks/gpu.py "${part%:*}" "$@" ||
        failed="$failed ${part%:*}($?)"
done
[ -z "$failed" ] || echo "failed, or over their time (124):$failed" >&2
[ -z "$failed" ]
