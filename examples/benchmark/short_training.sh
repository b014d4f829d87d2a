#!/usr/bin/env bash
# A short real training in half precision, with the quick start's backbone on some modules of the standard library: it
# trains, resumes, and evaluates the same checkpoint on the GPU and on the CPU.
#
#   bash examples/benchmark/short_training.sh DIR [--tiny]     --tiny: a few updates, in float32 on the CPU
set -euo pipefail
dir=${1:?usage: short_training.sh DIR [--tiny]}
cd "$(dirname "$0")/../.."
shipped=examples/pretrained/mini
python=${PYTHON:-$(command -v python3 || command -v python)}
first=40 last=60 tokens=256 lanes=16 precision=(--fp16)
[ "${2:-}" = --tiny ] && first=2 last=3 tokens=64 lanes=2 precision=(--cpu)

mkdir -p "$dir"
"$python" - "$dir" <<'PY'
import json, sys, sysconfig
from pathlib import Path

files = [path for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) if path.stat().st_size > 20000]
for split, chosen, size in (("train", files[2:50], 60000), ("test", files[:2], 20000)):
    lines = [json.dumps({"text": path.read_text(errors="replace")[:size]}) for path in chosen]
    Path(sys.argv[1], f"{split}.jsonl").write_text("\n".join(lines) + "\n")
PY
"$python" -m preprocess.binarize_documents --train "$dir/train.jsonl" --valid "$dir/test.jsonl" \
  --test "$dir/test.jsonl" --tokenizer $shipped/sentencepiece.model --dict $shipped/dict.txt --destdir "$dir/data"
"$python" -m preprocess.convert_safetensors $shipped/backbone.safetensors "$dir/backbone.pt"
common=("$dir/data" --user-dir longmem_fairseq --task longmem_language_modeling)
train() { # updates, further options
  local updates=$1
  shift
  fairseq-train "${common[@]}" --arch longmem_gpt2_mini --pretrained-model-path "$dir/backbone.pt" \
    --criterion longmem_cross_entropy --memory-size 16384 --k 64 --chunk-size 4 --memory-search torch \
    --tokens-per-sample $tokens --batch-size $lanes --max-update "$updates" --optimizer adam \
    --clip-norm 1.0 --lr 1e-3 --lr-scheduler fixed --save-dir "$dir/checkpoints" --no-epoch-checkpoints \
    --disable-validation --log-interval 10 --log-format simple --num-workers 0 --seed 1 "$@" "${precision[@]}"
}
evaluate() {
  fairseq-eval-lm "${common[@]}" --path "$dir/checkpoints/checkpoint_last.pt" --gen-subset test --batch-size 4 \
    --tokens-per-sample $tokens --num-workers 0 --log-format simple "$@" 2>&1 | tee "$dir/eval.log"
}
train $first
train $last
perplexity() { sed -n 's/.*Perplexity: \([0-9.]*\)$/\1/p' "$dir/eval.log"; }
evaluate --cpu >/dev/null
here=$(perplexity)
there=$here # with --tiny everything ran on the CPU
if [ "${2:-}" != --tiny ]; then
  evaluate "${precision[@]}" >/dev/null
  there=$(perplexity)
fi
echo "perplexity of the test documents after $last updates: $there, evaluated on the CPU in float32: $here"
"$python" -c "import sys; a, b = map(float, sys.argv[1:]); sys.exit(abs(a / b - 1) > 0.005)" "$there" "$here"
