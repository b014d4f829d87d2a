#!/usr/bin/env bash
# The models of examples/results/compare: the shipped backbone trained on with books and LaTeX, and LongMem adapted on it.
#
#   bash examples/compare/train.sh DATA OUT      DATA: that of evaluate.py, with books_* and arxiv_math/{train,valid,test}
#
# An hour on two CPU cores. A finished step is not repeated; an interrupted training continues from its last
# checkpoint. Then: python -m examples.compare.evaluate --path backbone=OUT/backbone/checkpoint_last.pt
# longmem=OUT/longmem/checkpoint_last.pt --tokenizer OUT/data --data DATA --results-path OUT/results
set -euo pipefail
usage="usage: train.sh DATA OUT"
data=$(realpath "${1:?$usage}") out=${2:?$usage}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/../.."
shipped=examples/pretrained/mini
. examples/steps.sh

step() { # name, command
  local name=$1
  shift
  [ ! -e "$out/$name.log" ] || return 0
  echo "$name (log: $out/$name.log.part)"
  logged "$out/$name.log" "$@"
}

step data python -m preprocess.binarize_documents --train "$data/books_train" "$data/arxiv_math/train" \
  --valid "$data/books_valid" "$data/arxiv_math/valid" --test "$data/books_test" "$data/arxiv_math/test" \
  --tokenizer $shipped/sentencepiece.model --dict $shipped/dict.txt --destdir "$out/data"
# Repeated spans, so that it does not forget how to copy (see examples/pretrained/README.md); only the backbone sees them.
mkdir -p "$out/pretraining"
ln -sf "$out/data"/{dict.txt,train.bin,train.idx,valid.bin,valid.idx} "$out/pretraining"
step repetitions python -m examples.pretrained.repetitions --data "$out/pretraining" --tokens 600000
step shipped python -m preprocess.convert_safetensors $shipped/backbone.safetensors "$out/shipped.pt"

optimizer=(--optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --lr 1e-3 --lr-scheduler cosine)
log=(--save-interval-updates 50 --keep-interval-updates 1 --no-epoch-checkpoints --disable-validation --seed 1
  --log-interval 10 --log-format simple --num-workers 0)
step backbone fairseq-train "$out/pretraining" --task language_modeling --sample-break-mode none --tokens-per-sample 256 \
  --arch transformer_lm --decoder-normalize-before --decoder-learned-pos --activation-fn gelu --no-scale-embedding \
  --share-decoder-input-output-embed --decoder-layers 6 --decoder-attention-heads 4 --decoder-embed-dim 256 \
  --decoder-input-dim 256 --decoder-output-dim 256 --decoder-ffn-embed-dim 1024 --dropout 0 \
  --finetune-from-model "$out/shipped.pt" --batch-size 48 --max-update 200 "${optimizer[@]}" --weight-decay 0.1 \
  --warmup-updates 10 --min-lr 1e-4 --save-dir "$out/backbone" "${log[@]}" "${device[@]}"
step copying python -m examples.quickstart.copying --path "$out/backbone/checkpoint_last.pt" --data "$out/data"
step longmem fairseq-train "$out/data" --user-dir longmem_fairseq --task longmem_language_modeling \
  --arch longmem_gpt2_mini --pretrained-model-path "$out/backbone/checkpoint_last.pt" \
  --memory-size 16384 --k 32 --chunk-size 2 --criterion longmem_cross_entropy --tokens-per-sample 256 --batch-size 16 \
  --max-update 300 "${optimizer[@]}" --warmup-updates 20 --without-memory-interval 10 --save-dir "$out/longmem" \
  "${log[@]}" "${device[@]}"
