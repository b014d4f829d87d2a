#!/usr/bin/env bash
# Does the memory recall? Facts stated up to 60,000 tokens back, queried at the end (see facts.py, evaluate.py).
#
#   bash examples/recall/run.sh [DIR] [--quick]        DIR: recall by default; --quick: up to 8,000 tokens, two minutes
#
# The shipped backbone, which copies in its window, is adapted by fairseq-train on documents of 2,600 and 9,000 tokens,
# then evaluated on documents of 64,000. A finished training is not repeated.
set -euo pipefail
dir=recall quick=()
for argument; do
  if [ "$argument" = --quick ]; then quick=(--quick); else dir=$argument; fi
done
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
cd "$(dirname "$0")/../.."
updates=600
[ ${#quick[@]} -eq 0 ] || updates=90
. examples/steps.sh

python -m examples.recall.facts --destdir "$dir/data" "${quick[@]}" 2>/dev/null
python -m preprocess.convert_safetensors examples/pretrained/mini/backbone.safetensors "$dir/backbone.pt" 2>/dev/null
if [ ! -e "$dir/checkpoints/checkpoint_last.pt" ]; then
  echo "adapting: $updates updates (log: $dir/train.log)"
  fairseq-train "$dir/data" --user-dir longmem_fairseq --task longmem_language_modeling --arch longmem_gpt2_mini \
    --pretrained-model-path "$dir/backbone.pt" --memory-size 16384 --k 64 --chunk-size 1 \
    --criterion longmem_cross_entropy --tokens-per-sample 256 --batch-size 8 --max-update $updates \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --lr 4e-3 --lr-scheduler cosine --warmup-updates 10 \
    --save-dir "$dir/checkpoints" --no-epoch-checkpoints --disable-validation --num-workers 0 \
    --log-interval 5 --log-format simple --without-memory-interval 5 --seed 1 "${device[@]}" >"$dir/train.log" 2>&1 ||
    { tail -n 20 "$dir/train.log" >&2; exit 1; }
fi
python -m examples.recall.evaluate --path "$dir/checkpoints/checkpoint_last.pt" --data "$dir/data" \
  --results-path "$dir" "${device[@]}" 2>"$dir/evaluate.log" || { tail -n 20 "$dir/evaluate.log" >&2; exit 1; }
