#!/usr/bin/env bash
# A real result at a size that a GPU trains in about 20 minutes: a backbone of 46 million parameters, trained on long
# documents; LongMem adapted on it; perplexity of held-out documents by memory size; recall over 64,000 tokens.
#
#   bash examples/benchmark/gpu_result.sh OUT --train P... --valid P... --test P... [--tiny]
#
# P are text files, JSON lines, or directories of them; one file is one document. Writes OUT/report.json, report.md and
# report.png. Finished steps are not repeated, and an interrupted training continues. Where a command may only run for a
# limited time, set BUDGET=seconds and call it again until its exit status is 0 (it is 3 if the time ran out).
# POSITIONS=alibi uses ALiBi instead of learned positions. --tiny trains a tiny model for a few updates, on any machine
# and without the recall.
set -euo pipefail
usage="usage: gpu_result.sh OUT --train P... --valid P... --test P... [--tiny]"
out=${1:?$usage}
shift
tiny='' split='' train=() valid=() test=()
for argument; do
  case $argument in
    --train | --valid | --test) split=${argument#--} ;;
    --tiny) tiny=--tiny ;;
    *)
      [ -n "$split" ] || { echo "$usage" >&2; exit 2; }
      declare -n paths=$split
      paths+=("$(realpath "$argument")")
      ;;
  esac
done
[ ${#train[@]} -gt 0 ] && [ ${#valid[@]} -gt 0 ] && [ ${#test[@]} -gt 0 ] || { echo "$usage" >&2; exit 2; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/../.."
python=${PYTHON:-$(command -v python3 || command -v python)}
positions=${POSITIONS:-learned}
deadline=$(($(date +%s) + ${BUDGET:-86400}))

device=(--cpu)
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then device=(--fp16); fi
if [ -n "$tiny" ]; then
  vocabulary=400 repetitions=3000 layers=2 width=16 heads=2 layer=1 segment=256 k=8 memory=1024
  rows=4 pretraining=4 lanes=2 adaptation=4 memories=(0 1024) workers=0 interval=1
else
  vocabulary=16000 repetitions=2400000 layers=12 width=512 heads=8 layer=9 segment=1024 k=64 memory=65536
  rows=64 pretraining=3000 lanes=16 adaptation=600 memories=(0 1024 4096 16384 65536) workers=4 interval=50
fi

# Run a step that is not finished yet, until the deadline; its output goes to a log.
step() { # name, command
  local name=$1 began left status=0
  shift
  [ ! -e "$out/$name.log" ] || return 0
  began=$(date +%s)
  left=$((deadline - began))
  if [ $left -gt 10 ]; then
    echo "$name (log: $name.log.part)"
    timeout -k 10 "$left" "$@" >>"$out/$name.log.part" 2>&1 || status=$?
    echo "$(($(date +%s) - began)) $name" >>"$out/seconds.txt"
  fi
  if [ $left -le 10 ] || [ $status = 124 ] || [ $status = 137 ]; then
    echo "out of time in $name: call the same command again, which continues from there" >&2
    exit 3
  fi
  [ $status = 0 ] || { tail -n 25 "$out/$name.log.part" >&2; echo "failed; all of it: $name.log.part" >&2; exit 1; }
  mv "$out/$name.log.part" "$out/$name.log"
}

data=$out/data pre=$out/pretraining
step data "$python" -m preprocess.binarize_documents --train "${train[@]}" --valid "${valid[@]}" --test "${test[@]}" \
  --tokenizer sentencepiece --vocab-size $vocabulary --destdir "$data" --workers 2
# Repeated spans teach a small model to copy (see examples/pretrained/README.md); only the backbone is trained on them.
mkdir -p "$pre"
ln -sf "$data"/{dict.txt,train.bin,train.idx,valid.bin,valid.idx} "$pre"
step repetitions "$python" -m examples.pretrained.repetitions --data "$pre" --tokens $repetitions

architecture=(--arch transformer_lm --decoder-normalize-before --decoder-learned-pos)
[ "$positions" = learned ] || architecture=(--user-dir longmem_fairseq --arch alibi_lm)
optimizer=(--optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --lr-scheduler cosine)
log=(--save-interval-updates 250 --keep-interval-updates 1 --no-epoch-checkpoints --disable-validation --seed 1
  --log-interval $interval --log-format simple --num-workers $workers)
step backbone fairseq-train "$pre" --task language_modeling --sample-break-mode none --tokens-per-sample $segment \
  "${architecture[@]}" --activation-fn gelu --no-scale-embedding --share-decoder-input-output-embed \
  --decoder-layers $layers --decoder-attention-heads $heads --decoder-embed-dim $width --decoder-input-dim $width \
  --decoder-output-dim $width --decoder-ffn-embed-dim $((4 * width)) --dropout 0.1 --batch-size $rows \
  --max-update $pretraining "${optimizer[@]}" --weight-decay 0.1 --lr 1e-3 --warmup-updates $((pretraining / 10)) \
  --min-lr 1e-4 --save-dir "$out/backbone" "${log[@]}" "${device[@]}"
backbone=$out/backbone/checkpoint_last.pt

step copying "$python" -m examples.quickstart.copying --path "$backbone" --data "$data"
common=("$data" --user-dir longmem_fairseq --task longmem_language_modeling)
step adaptation fairseq-train "${common[@]}" --arch longmem_gpt2_small --retrieval-layer-index $layer \
  --pretrained-model-path "$backbone" --memory-size $memory --k $k --chunk-size 4 --tokens-per-sample $segment \
  --criterion longmem_cross_entropy --batch-size $lanes --max-update $adaptation "${optimizer[@]}" --lr 1e-3 \
  --warmup-updates $((adaptation / 20)) --save-dir "$out/checkpoints" "${log[@]}" "${device[@]}"

evaluate() { # name, checkpoint, further options
  local name=$1 path=$2
  shift 2
  step "eval-$name" fairseq-eval-lm "${common[@]}" --path "$path" --gen-subset test --batch-size 8 \
    --results-path "$out/results/$name" --log-format simple --num-workers $workers "$@" "${device[@]}"
}
evaluate backbone "$backbone" --tokens-per-sample $segment
for size in "${memories[@]}"; do
  evaluate "memory-$size" "$out/checkpoints/checkpoint_last.pt" --model-overrides "{'memory_size': $size}"
done
[ -n "$tiny" ] || step recall bash examples/recall/run.sh "$out/recall"
"$python" -m examples.benchmark.gpu_result_report "$out" $tiny
