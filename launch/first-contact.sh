#!/usr/bin/env bash
# The first hour on GPUs: what to run, in which order, and what each result means. From the root of the project:
#   launch/first-contact.sh [OUT]      OUT (default: first-contact) gets a log of every part, and report.md, which can
#                                      be pasted into an issue
#   launch/first-contact.sh --list     the parts, without running any
# With one GPU the parts for several say "not run"; start it again on a machine of eight. On a CPU it takes a few minutes
# and says which parts were not run. A part that fails does not end the script.
# shellcheck disable=SC2329 # `part` calls the functions
set -uo pipefail
cd "$(dirname "$0")/.." || exit
list=false
if [ "${1:-}" = --list ]; then
  list=true
  shift
fi
out=${1:-first-contact}
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
several=$gpus # processes that a part for two or more gets; on CPUs two
[ "$gpus" != 0 ] || several=2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
helper=benchmarks/first_contact.py
ranks() {
  local number=$1
  shift
  if [ "$number" = 1 ]; then
    python "$@"
    return
  fi
  python -m torch.distributed.run --standalone --nproc-per-node="$number" "$@"
}
failed=0

# part NAME NEEDS MEANING COMMAND...: NEEDS is cpu, pair (two GPUs, or a CPU) or gpu.
part() {
  local name=$1 needs=$2 meaning=$3 began=$SECONDS log verdict
  shift 3
  if $list; then
    printf '%-18s %-5s %s\n' "$name" "$needs" "$meaning"
    return
  fi
  log=$out/$name.log
  if [ "$needs" = gpu ] && [ "$gpus" = 0 ]; then
    verdict="not run: no GPU"
  elif [ "$needs" = pair ] && [ "$several" -lt 2 ]; then
    verdict="not run: one GPU"
  elif "$@" >"$log" 2>&1; then
    verdict=ok
  else
    verdict="FAILED (exit code $?)"
    failed=1
  fi
  { printf '\n## %s: %s (%s s)\n\n%s\n' "$name" "$verdict" "$((SECONDS - began))" "$meaning"
    [ ! -s "$log" ] || { printf '\n~~~text\n'; tail -n 25 "$log"; echo '~~~'; }
  } | tee -a "$out/report.md"
}

bits() { # the same SHA-256 of weights and moments for every number of processes, twice on one, and with recompute
  local reference='' run world name sum
  for run in 1-false 1-again 1-true 2-false 4-false 8-false 8-true; do
    world=${run%-*} name=$out/bits/$run
    [ "$world" -le "$several" ] || continue
    rm -rf "$name"
    ranks "$world" -m rkdo_dist train configs/digits-rkdo.yaml data.shards="$out/digits" train.max_steps=5 \
      train.global_batch=256 train.micro_batch=32 evaluate.at_end=false data.workers=0 "run.dir=$name" \
      train.recompute="$([ "${run#*-}" = true ] && echo true || echo false)" >"$out/bits.txt" 2>&1 \
      || { cat "$out/bits.txt"; return 1; }
    sum=$(cat "$name"/checkpoints/5/*.safetensors | sha256sum | cut -c1-24)
    echo "processes and recompute $run: $sum"
    reference=${reference:-$sum}
    [ "$sum" = "$reference" ] || return 1
  done
}

lost() { # killed|memory: every process ends within seconds, and the others name rank 1
  rm -rf "${out:?}/${1:?}"
  timeout 120 python -m torch.distributed.run --standalone --nproc-per-node=2 "$helper" "$1" "$out/digits" "$out" && return 1
  python -m rkdo_dist status "$out/$1"
  grep -q '"message": "rank 1' "$out/$1/status.json"
}

outlasted() {
  rm -rf "$out/slow"
  ranks 2 "$helper" slow "$out/digits" "$out" && ls "$out/slow/evaluations"
}

versions() {
  [ "$gpus" = 0 ] || nvidia-smi
  python "$helper" environment
}

tests() { python -m pytest -q -rs tests/test_triton.py tests/test_precision.py tests/test_views.py -k 'gpu or cuda or triton'; }

throughput() {
  python -c 'import lightly' 2>/dev/null || set -- --without-lightly
  python benchmarks/throughput.py "$out/digits" --batch 256 --steps 20 --rounds 3 --workers 8 "$@"
}

if ! $list; then
  mkdir -p "$out/bits"
  printf '# First contact: %s, %s GPUs\n' "$(date -u +%Y-%m-%d)" "$gpus" | tee "$out/report.md"
fi
fresh() { rm -rf "${out:?}/${1:?}" && python "$helper" "$1" "$out/digits" "$out"; }
prepared() { [ -e "$out/digits/index.json" ] || python -m rkdo_dist prepare digits --out "$out/digits"; }

part environment cpu "What an issue needs first: driver, GPUs, CUDA, cuDNN, torch." versions
part data cpu "Digits as shards; without them nothing below runs." prepared
part doctor cpu "Must end with: nothing stands in the way of training. 'kernel of the field' says fused on a GPU." \
  python -m rkdo_dist doctor configs/digits-rkdo.yaml data.shards="$out/digits" run.dir="$out/doctor"
part kernels gpu "Triton against eager at every depth and dtype. A failure: train all the same (eager), report it." \
  python "$helper" kernels
part tests gpu "Tests that need a GPU: kernels, half precision, views. All must pass." tests
part bits cpu "One sum for 1, 1 again, 2, 4, 8 processes and both kinds of memory. Another sum: exact is not exact here." bits
part killed pair "kill -9 of rank 1: all end within seconds, status failed, the message names rank 1. SIGABRT is a fault." \
  lost killed
part out-of-memory pair "A lone OutOfMemoryError: the same, and the message says what to lower." lost memory
part evaluation pair "Rank zero scores for 25 s with run.timeout=10: the run completes." outlasted
part synchronisations gpu "Waits of the host for the device in a step, by line; the budget is in docs/accelerators.md." \
  fresh synchronisations
part trace cpu "Profile of a step; open trace.json in https://ui.perfetto.dev. Gaps between kernels are host time." fresh trace
part throughput gpu "End to end against the model alone (at least 0.95) and lightly's recipe (above 1)." throughput
part loss gpu "The loss against linear_cross_entropy and the ceiling that it prints." \
  python benchmarks/loss.py --device cuda --batches 4096 16384 --dims 128 --rounds 5
exit "$failed"
