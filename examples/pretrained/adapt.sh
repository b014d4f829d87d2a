#!/usr/bin/env bash
# Adapt LongMem on the shipped backbone, with the corpus it was trained on: the side network in mini/ (see README.md).
#
#   bash examples/pretrained/adapt.sh DATA SAVE_DIR [further fairseq-train options]
#
# DATA is what README.md's "Rebuild" makes. Half an hour on two CPU cores; a training that was stopped continues from its
# last checkpoint. Afterwards the checkpoint is written as a model directory, SAVE_DIR/model.
set -euo pipefail
usage="usage: adapt.sh DATA SAVE_DIR [options]"
data=$(realpath "${1:?$usage}") save=${2:?$usage}
shift 2
mkdir -p "$save"
save=$(cd "$save" && pwd)
cd "$(dirname "$0")/../.."
. examples/steps.sh

python -m preprocess.convert_safetensors examples/pretrained/mini/backbone.safetensors "$save/backbone.pt"
fairseq-train "$data" --user-dir longmem_fairseq --task longmem_language_modeling --arch longmem_gpt2_mini \
  --pretrained-model-path "$save/backbone.pt" --memory-size 16384 --k 32 --chunk-size 2 \
  --criterion longmem_cross_entropy --tokens-per-sample 256 --batch-size 16 --max-update 600 \
  --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --lr 1e-3 --lr-scheduler cosine --warmup-updates 20 \
  --without-memory-interval 10 --save-dir "$save" --save-interval-updates 50 --keep-interval-updates 1 \
  --no-epoch-checkpoints --disable-validation --seed 1 --log-interval 10 --log-format simple --num-workers 0 \
  "${device[@]}" "$@"
python -m preprocess.convert_safetensors "$save/checkpoint_last.pt" "$save/model" --half
