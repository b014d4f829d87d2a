"""Open-book question answering: exact match and F1 with an article's passages in the memory.

    python -m examples.qa.evaluate --path CHECKPOINT --data dev-v1.1.json --train train-v1.1.json --results-path DIR

--data and --train are SQuAD 1.1's JSON or JSON lines (docs/evaluation.md).
"""

from longmem_fairseq.evaluation.command import main
from longmem_fairseq.evaluation.qa import QuestionAnswering

if __name__ == "__main__":
    print(main(QuestionAnswering()))
