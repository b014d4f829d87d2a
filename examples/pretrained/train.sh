#!/usr/bin/env bash
# Pretrain the backbone of the quick start: 6 layers of width 256, on code, books and repetitions (see README.md).
#
#   bash examples/pretrained/train.sh DATA SAVE_DIR [further fairseq-train options, such as --fp16]
#
# Takes minutes on one GPU. This is a plain fairseq training of a plain transformer_lm.
set -euo pipefail
data=$1 save=$2
shift 2
fairseq-train "$data" --task language_modeling --sample-break-mode none --tokens-per-sample 256 \
  --arch transformer_lm --decoder-normalize-before --decoder-learned-pos --activation-fn gelu --no-scale-embedding \
  --share-decoder-input-output-embed --decoder-layers 6 --decoder-attention-heads 4 --decoder-embed-dim 256 \
  --decoder-input-dim 256 --decoder-output-dim 256 --decoder-ffn-embed-dim 1024 --dropout 0 \
  --batch-size 256 --max-update 4200 --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --weight-decay 0.1 \
  --lr 2e-3 --lr-scheduler cosine --warmup-updates 300 --warmup-init-lr 1e-6 --min-lr 2e-4 \
  --save-dir "$save" --no-epoch-checkpoints --disable-validation --save-interval-updates 0 \
  --log-interval 100 --log-format simple --num-workers 4 --seed 1 "$@"
