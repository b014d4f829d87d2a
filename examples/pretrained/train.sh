#!/usr/bin/env bash
# Pretrain the backbone of the quick start: 6 layers of width 256 on code and books (see README.md here).
#
#   bash examples/pretrained/train.sh DATA SAVE_DIR [further fairseq-train options]
#
# Minutes on one GPU; it is an ordinary fairseq training of an ordinary language model.
set -euo pipefail
data=$1 save=$2
shift 2
here=$(cd "$(dirname "$0")/../.." && pwd)
fairseq-train "$data" --user-dir "$here/longmem_fairseq" --task language_modeling --arch alibi_lm_mini \
  --sample-break-mode none --tokens-per-sample 256 --batch-size 256 --max-update 6000 \
  --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --weight-decay 0.1 --dropout 0 \
  --lr 2e-3 --lr-scheduler cosine --warmup-updates 300 --warmup-init-lr 1e-6 --min-lr 2e-4 \
  --save-dir "$save" --no-epoch-checkpoints --keep-last-epochs 1 \
  --save-interval-updates 0 --log-interval 100 --log-format simple --num-workers 4 --seed 1 "$@"
