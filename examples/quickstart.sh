#!/usr/bin/env bash
# The main job on small real input: give a language model a long-term memory and measure what it gains.
#
#   make demo                              on the source files of Python's standard library
#   make demo TEXT=directory-or-file       on your own documents (UTF-8; .txt, .jsonl, .gz, .zst)
#
# Results are in demo/ (DEMO=directory): report.json, report.md, report.png. Finished steps are not repeated; an
# interrupted training continues from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
demo=${DEMO:-demo}
updates=${UPDATES:-200}
memories=(0 1024 4096 16384 65536)
shipped=examples/pretrained/mini
data=$demo/data
began=$(date +%s)
. examples/steps.sh

mkdir -p "$demo/eval" "$demo/logs"
note_source "$demo" "${TEXT:-the standard library} $(python --version)" DEMO

if [ ! -e "$data/manifest.json" ]; then
  say "1. Documents: ${TEXT:-the modules of the standard library}"
  python -m examples.quickstart.standard_library ${TEXT:+--text "$TEXT"} --destdir "$demo/documents"
  python -m preprocess.binarize_documents --train "$demo/documents/train.jsonl" \
    --valid "$demo/documents/valid.jsonl" --test "$demo/documents/test.jsonl" \
    --tokenizer $shipped/sentencepiece.model --dict $shipped/dict.txt --destdir "$data"
fi

if [ ! -e "$demo/copying.txt" ]; then
  say "2. The backbone, and whether it copies within its window"
  python -m preprocess.convert_safetensors $shipped/backbone.safetensors "$demo/backbone.pt"
  python -m examples.quickstart.copying --path "$demo/backbone.pt" --data "$data" 2>/dev/null | tee "$demo/copying.new"
  mv "$demo/copying.new" "$demo/copying.txt"
fi

common=("$data" --user-dir longmem_fairseq --task longmem_language_modeling)
if [ ! -e "$demo/logs/train.log" ]; then
  say "3. Memory-augmented adaptation: $updates updates (log: $demo/logs/train.log.part)"
  logged "$demo/logs/train.log" fairseq-train "${common[@]}" --arch longmem_gpt2_mini \
    --pretrained-model-path "$demo/backbone.pt" --memory-size 16384 --k 32 --chunk-size 2 \
    --criterion longmem_cross_entropy --tokens-per-sample 256 --batch-size 16 --max-update "$updates" \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --lr 1e-3 --lr-scheduler cosine \
    --warmup-updates 20 --without-memory-interval 10 --save-dir "$demo/checkpoints" --save-interval-updates 50 \
    --keep-interval-updates 1 --no-epoch-checkpoints --disable-validation --log-interval 10 --log-format simple --seed 1 \
    --tensorboard-logdir "$demo/tensorboard" "${device[@]}"
fi

say "4. Perplexity of the held-out documents (fairseq-eval-lm)"
evaluate() { # name, checkpoint, further options
  local name=$1 path=$2
  shift 2
  [ -e "$demo/eval/$name.log" ] || logged "$demo/eval/$name.log" fairseq-eval-lm "${common[@]}" --path "$path" \
    --gen-subset test --batch-size 8 --log-format simple "$@" "${device[@]}"
  sed -n "s/.*Perplexity: \([0-9.]*\)$/$name: \1/p" "$demo/eval/$name.log"
}
evaluate backbone "$demo/backbone.pt" --tokens-per-sample 256
for memory in "${memories[@]}"; do
  evaluate "memory-$memory" "$demo/checkpoints/checkpoint_last.pt" --model-overrides "{'memory_size': $memory}"
done

python -m examples.quickstart.demo_report --demo "$demo" --seconds $(($(date +%s) - began))
