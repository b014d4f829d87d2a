#!/usr/bin/env bash
# BABILong on the quick start's backbone: adapted on facts that are told far apart in books, then questioned about facts
# that are hidden in other books (see generate.py, stories.py, evaluate.py).
#
#   bash examples/babilong/run.sh BOOKS_TRAIN BOOKS_TEST [DIR]     DIR: babilong by default
#
# BOOKS_TRAIN and BOOKS_TEST are text files or directories of them. Environment variables set the rest:
#   UPDATES=1200                  length of the adaptation, in updates of 2,048 tokens
#   DOCUMENTS=500                 documents to adapt on
#   LENGTHS="0k 1k 4k 16k 64k"    lengths of the texts
#   SAMPLES=25                    questions of each task and length
#   TASKS="qa1 qa2 qa3 qa4 qa5"   tasks to evaluate
#   BABILONG=DIR                  the public files, in place of our own: their lengths are those of LENGTHS
# A finished step is not repeated.
set -euo pipefail
usage="usage: run.sh BOOKS_TRAIN BOOKS_TEST [DIR]"
train=$(realpath "${1:?$usage}") test=$(realpath "${2:?$usage}") out=${3:-babilong}
mkdir -p "$out/logs"
out=$(cd "$out" && pwd)
samples=${BABILONG:+$(realpath "$BABILONG")}
samples=${samples:-$out/samples}
cd "$(dirname "$0")/../.."
shipped=examples/pretrained/mini
read -ra lengths <<<"${LENGTHS:-0k 1k 4k 16k 64k}"
read -ra tasks <<<"${TASKS:-qa1 qa2 qa3 qa4 qa5}"
. examples/steps.sh

step() { # name, command
  local name=$1
  shift
  [ ! -e "$out/logs/$name.log" ] || return 0
  say "$name (log: $out/logs/$name.log.part)"
  logged "$out/logs/$name.log" "$@"
}

step documents python -m examples.babilong.generate --books "$train" --tokenizer $shipped --destdir "$out/documents" \
  --documents "${DOCUMENTS:-500}"
step data python -m preprocess.binarize_documents --train "$out/documents/train.jsonl" \
  --tokenizer $shipped/sentencepiece.model --dict $shipped/dict.txt --destdir "$out/data"
step backbone python -m preprocess.convert_safetensors $shipped/backbone.safetensors "$out/backbone.pt"
step adaptation fairseq-train "$out/data" --user-dir longmem_fairseq --task longmem_language_modeling \
  --arch longmem_gpt2_mini --pretrained-model-path "$out/backbone.pt" --memory-size 16384 --k 64 --chunk-size 1 \
  --criterion longmem_cross_entropy --tokens-per-sample 256 --batch-size 8 --max-update "${UPDATES:-1200}" \
  --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --lr 4e-3 --lr-scheduler cosine --warmup-updates 10 \
  --save-dir "$out/checkpoints" --no-epoch-checkpoints --save-interval-updates 100 --keep-interval-updates 1 \
  --disable-validation --num-workers 0 --log-interval 10 --log-format simple --without-memory-interval 5 --seed 1 \
  "${device[@]}"
[ "$samples" != "$out/samples" ] || step samples python -m examples.babilong.generate --books "$test" \
  --tokenizer $shipped --destdir "$samples" --lengths "${lengths[@]}" --samples "${SAMPLES:-25}" --seed 2
cpu=()
[ ${#device[@]} -eq 0 ] || cpu=(--cpu)
say "evaluation ($out/results/report.md)"
python -m examples.babilong.evaluate --path "$out/checkpoints/checkpoint_last.pt" --tokenizer $shipped \
  --data "$samples" --tasks "${tasks[@]}" --lengths "${lengths[@]}" --limit "${SAMPLES:-25}" --memory-size 131072 \
  --no-cache --results-path "$out/results" "${cpu[@]}"
