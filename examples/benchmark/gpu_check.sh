#!/usr/bin/env bash
# All GPU checks in one command: tests, search, throughput at the published shape, and a short real training.
#
#   bash examples/benchmark/gpu_check.sh OUT           # on a machine with a GPU, under 9 minutes
#   bash examples/benchmark/gpu_check.sh OUT --tiny    # tiny shapes, on any machine: checks the commands themselves
#
# PYTHON=... chooses the Python. Writes OUT/report.json and OUT/report.md, even if a part fails: each part has its own
# time limit, its failure is reported and the next part runs. The exit status is 0 only if all parts passed.
# BUDGET=seconds (default 520) limits the whole run; parts that no longer fit are reported as left out.
set -uo pipefail
out=${1:?usage: gpu_check.sh OUT [--tiny]}
tiny=${2:-}
if [ -n "$tiny" ] && [ "$tiny" != --tiny ]; then
  echo "gpu_check.sh: $tiny is unknown: the only option is --tiny" >&2
  exit 2
fi
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
deadline=$(($(date +%s) + ${BUDGET:-$([ -z "$tiny" ] && echo 520 || echo 3600)}))
python=${PYTHON:-$(command -v python3 || command -v python)}

if [ -z "$tiny" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check.sh: PyTorch finds no GPU here; --tiny checks the commands without one" >&2
  exit 2
fi

# part NAME LIMIT COMMAND...: run a command for at most LIMIT seconds; write its status, seconds and output to $work.
part() {
  local name=$1 limit=$2 began left status
  shift 2
  [ -z "$tiny" ] || limit=600 # a machine that also runs other tests may be slow
  began=$(date +%s)
  left=$((deadline - began))
  if [ $left -lt 15 ]; then
    status=left-out
  else
    [ $left -lt "$limit" ] && limit=$left
    timeout -k 5 "$limit" "$@" >"$work/$name.log" 2>&1
    status=$?
  fi
  echo "$status $(($(date +%s) - began)) $limit" >"$work/$name.status"
  echo "$name: status $status after $(($(date +%s) - began)) s"
}

if [ -n "$tiny" ]; then
  device=cpu
  search=(--tokens 256 1024 --heads 2 --queries 16 --steps 2)
  shape=(--layers 2 --dim 32 --heads 2 --vocab 100 --retrieval-layer-index 1 --segment 16 --k 8 --steps 2)
  sizes=(0 64)
  windows=(32)
else
  device=cuda
  search=(--seconds 1)
  shape=(--layers 24 --dim 1024 --heads 16 --vocab 50264 --retrieval-layer-index 17 --segment 1024 --k 64 --steps 7
    --dtype bfloat16)
  sizes=(0 4096 16384 65536)
  windows=(4096 8192)
fi
throughput() { # name, limit, mode, batch, further options
  local name=$1 limit=$2 mode=$3 batch=$4
  shift 4
  part "throughput-$name" "$limit" "$python" -m examples.benchmark.throughput "${shape[@]}" --device $device \
    --mode "$mode" --batch "$batch" --json "$work/throughput-$name.json" "$@"
}
xdist=()
"$python" -c 'import xdist' 2>/dev/null && [ -z "$tiny" ] && xdist=(-n 6)
tests() { # name, limit, what
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider --tb=short "${xdist[@]}" "$@"
}

part environment 60 bash -c "(nvidia-smi || true); '$python' -m examples.benchmark.machine"
tests tests 150 -k "(gpu or cuda) and not commands" tests/gpu tests/memory tests/modules
throughput eval-8 90 eval 8 --memory-search torch --memory-sizes "${sizes[@]}" --full-windows "${windows[@]}"
part search 80 "$python" -m examples.benchmark.search_speed --device $device "${search[@]}" --json "$work/search.json"
throughput train-8 80 train 8 --memory-search torch --memory-sizes "${sizes[@]}"
part training 120 bash examples/benchmark/short_training.sh "$work/training" $tiny
if [ -z "$tiny" ]; then # the same commands on other shapes
  throughput eval-1 70 eval 1 --memory-search torch --memory-sizes "${sizes[@]}" --full-windows "${windows[@]}"
  throughput train-1 60 train 1 --memory-search torch --memory-sizes "${sizes[@]}"
  throughput eval-8-faiss 60 eval 8 --memory-search faiss --memory-sizes "${sizes[0]}" "${sizes[-1]}"
  # ALiBi's bias prevents the fastest kernel of full attention; learned positions have no bias.
  throughput eval-1-learned 60 eval 1 --memory-search torch --positions learned --memory-sizes "${sizes[0]}" \
    "${sizes[-1]}" --full-windows "${windows[@]}"
  tests commands 200 tests/gpu/test_commands.py
fi
"$python" -m examples.benchmark.gpu_report "$work" "$out" $tiny
