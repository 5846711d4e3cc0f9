#!/usr/bin/env bash
# Parts of benchmarks/gpu.py, one after the other, each with a time limit of its own in seconds, so
# that one that hangs does not take the others along: `benchmarks/gpu.sh 1`, then 2 and 3, each
# under 9.5 minutes on one H100 (vLLM's part apart). With `--dry-run` after the number it does the
# same in small on a CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
case ${1:-} in
1) parts="tests:110 embedded:140 resume:110 ceilings:30 rollout:155" ;;
2) parts="W6:160 W6-trl:140 memory:70 W6-compile:170" ;;
3) parts="W5:220 W5-trl:310 vllm:240" ;;  # vLLM, where it is installed, starts slowly
*) echo "usage: benchmarks/gpu.sh 1|2|3 [--dry-run]" >&2 && exit 2 ;;
esac
shift
timeout 30 "$python" benchmarks/gpu_check.py "$@" || {
    [ $? != 124 ] || echo "error: benchmarks/gpu_check.py took over 30 s" >&2
    exit 2
}
failed=""
for part in $parts; do
    # at once, with all that it has started: a stage would note a softer signal and go on
    timeout --signal=KILL "${part#*:}" "$python" benchmarks/gpu.py "${part%:*}" "$@" ||
        failed="$failed ${part%:*}($?)"
done
[ -z "$failed" ] || echo "failed, or over their time (137):$failed" >&2
[ -z "$failed" ]
