"""Responses in dialogues of several sessions: BLEU-4 of generated ones, perplexity of the true ones.

    python -m examples.dialogue.evaluate --path CHECKPOINT --data msc.test.jsonl --valid msc.valid.jsonl \
        --results-path DIR

--data has the layout of MSC, MiSC, LoCoMo, Conversation Chronicles, or JSON lines (docs/evaluation.md).
DIR/judge.jsonl is for examples.dialogue.judge.
"""

from longmem_fairseq.evaluation.command import main
from longmem_fairseq.evaluation.dialogue import Dialogue

if __name__ == "__main__":
    print(main(Dialogue()))
