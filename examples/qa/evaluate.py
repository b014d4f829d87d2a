"""Open-book question answering: exact match and F1 with an article's passages in the memory.

    python examples/qa/evaluate.py --path CHECKPOINT --data dev-v1.1.json --train train-v1.1.json --results-path DIR

--data and --train are SQuAD 1.1's JSON or our JSON lines (README, "Evaluations").
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
from longmem_fairseq.evaluation.command import main  # noqa: E402
from longmem_fairseq.evaluation.qa import QuestionAnswering  # noqa: E402

if __name__ == "__main__":
    print(main(QuestionAnswering()))
