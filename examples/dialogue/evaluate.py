"""Responses in dialogues of several sessions: BLEU-4 of generated ones, perplexity of the true ones.

    python examples/dialogue/evaluate.py --path CHECKPOINT --data msc.test.jsonl --valid msc.valid.jsonl \
        --results-path DIR

--data has the layout of MSC, LoCoMo, Conversation Chronicles or ours (README, "Evaluations").
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
from longmem_fairseq.evaluation.command import main  # noqa: E402
from longmem_fairseq.evaluation.dialogue import Dialogue  # noqa: E402

if __name__ == "__main__":
    print(main(Dialogue()))
