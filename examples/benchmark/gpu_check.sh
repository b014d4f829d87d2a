#!/usr/bin/env bash
# All GPU checks in one command: tests, throughput at the published shape with and without CUDA graphs, beside full
# attention, search, profiles, fairseq's commands, and a short real training.
#
#   bash examples/benchmark/gpu_check.sh OUT           # on a machine with a GPU, under 9 minutes
#   bash examples/benchmark/gpu_check.sh OUT --tiny    # tiny shapes, on any machine: checks the commands themselves
#
# PYTHON=... chooses the Python. Writes OUT/report.json and OUT/report.md, even if a part fails: each part has its own
# time limit, its failure is reported and the next part runs; OUT/logs has what each part printed. The exit status is 0
# only if all parts passed. The parts are in the order of their value: BUDGET=seconds (default 520) limits the whole run,
# and those that no longer fit are reported as left out. SEARCH=... chooses another search than triton.
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
  device=cpu search=torch
  speed=(--tokens 256 1024 --heads 2 --queries 16 --steps 2)
  shape=(--layers 2 --dim 32 --heads 2 --vocab 100 --retrieval-layer-index 1 --segment 16 --k 8 --steps 2
    --tflops 1 --gbps 10)
  sizes=(0 64)
  windows=(32)
  contexts=(48)
  graphs=(auto off)
else
  device=cuda search=${SEARCH:-triton}
  speed=(--seconds 1)
  shape=(--layers 24 --dim 1024 --heads 16 --vocab 50264 --retrieval-layer-index 17 --segment 1024 --k 64 --steps 7
    --dtype bfloat16)
  sizes=(0 65536)
  windows=(4096 8192)
  contexts=(16384 65536)
  graphs=(off on)
fi
shape+=(--device $device --memory-search "$search" --noise)
throughput() { # name, limit, mode, batch, further options
  local name=$1 limit=$2 mode=$3 batch=$4
  shift 4
  part "throughput-$name" "$limit" "$python" -m examples.benchmark.throughput "${shape[@]}" \
    --mode "$mode" --batch "$batch" --json "$work/throughput-$name.json" "$@"
}
profile() { # name, limit, batch
  part "profile-$1" "$2" "$python" -m examples.benchmark.profile_step "${shape[@]}" --batch "$3" \
    --memory-sizes "${sizes[1]}" --json "$work/profile-$1.json"
}
xdist=()
"$python" -c 'import xdist' 2>/dev/null && [ -z "$tiny" ] && xdist=(-n 6)
tests() { # name, limit, what
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider --tb=short "${xdist[@]}" "$@"
}

part environment 60 bash -c "(nvidia-smi || true); '$python' -m examples.benchmark.machine"
tests tests 150 -k "(gpu or cuda) and not commands${tiny:+ and not triton}" tests/gpu tests/memory tests/modules
[ -z "$tiny" ] && throughput eval-8 80 eval 8 --memory-sizes "${sizes[@]}" --cuda-graphs "${graphs[@]}"
[ -z "$tiny" ] && throughput eval-1 80 eval 1 --memory-sizes "${sizes[@]}" 1048576 --cuda-graphs "${graphs[@]}"
part search 80 "$python" -m examples.benchmark.search_speed --device $device "${speed[@]}" --json "$work/search.json"
# ALiBi keeps full attention from its fastest kernel, so it is measured with learned positions.
throughput full-8 90 eval 8 --positions learned --memory-sizes "${sizes[@]}" --cuda-graphs "${graphs[@]}" \
  --full-windows "${windows[@]}" --full-contexts "${contexts[@]}"
throughput train-8 80 train 8 --memory-sizes "${sizes[@]}" --cuda-graphs "${graphs[@]}"
profile 8 50 8
if [ -z "$tiny" ]; then # the same commands on other shapes
  profile 1 40 1
  tests commands 180 tests/gpu/test_commands.py # also on two GPUs, where they are
fi
part training 110 bash examples/benchmark/short_training.sh "$work/training" $tiny
if [ -z "$tiny" ]; then
  throughput full-1 60 eval 1 --positions learned --memory-sizes "${sizes[@]}" --cuda-graphs on \
    --full-windows "${windows[@]}" --full-contexts "${contexts[@]}"
  throughput eval-8-million 60 eval 8 --memory-sizes 0 1048576 --cuda-graphs on
  throughput generate-1 50 generate 1 --memory-sizes "${sizes[@]}"
  throughput train-1 50 train 1 --memory-sizes "${sizes[@]}" --cuda-graphs "${graphs[@]}"
  throughput eval-8-faiss 50 eval 8 --memory-search faiss --memory-sizes "${sizes[@]}"
fi
"$python" -m examples.benchmark.gpu_report "$work" "$out" $tiny
