#!/usr/bin/env bash
# What there is to know of the language model on one GPU, in at most nine minutes; a section that fails or hangs
# costs itself alone, and makes the exit code 1.
#
#     benchmarks/gpu_suite.sh [--dry] [OUT.md]
#
# Needs an 80 GB GPU and torch, deepspeed, megatron-core, transformers and webdataset. --dry runs tiny sizes on a CPU, to show that all
# of it works. PYTHON chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

dry=()
if [[ "${1:-}" == --dry ]]; then
  dry=(--dry)
  shift
fi
out="${1:-benchmarks/gpu.md}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

{
  printf '# The language model on one GPU\n\n'
  # shellcheck disable=SC2016 # backquotes of Markdown
  printf '`benchmarks/gpu_suite.sh %s`, %s, commit %s.\n\n' "${dry[*]:-}" "$(date -u '+%-d %B %Y')" "$(git rev-parse --short HEAD)"
} | tee "$out"

failed=0
section() { # NAME SECONDS
  if ! timeout --kill-after=5 "$2" "${PYTHON:-python3}" -W ignore benchmarks/gpu.py --section "$1" --output "$out" "${dry[@]}"; then
    printf '\nThe section on %s failed, at least in part, or took longer than %d seconds.\n\n' "$1" "$2" | tee -a "$out"
    failed=1
  fi
}

section attention 45
section memory 20
section curve 75
section speed 390
exit "$failed"
