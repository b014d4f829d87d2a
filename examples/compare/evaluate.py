"""All evaluations for several checkpoints, in one report with paired bootstrap intervals between them.

    python -m examples.compare.evaluate --path backbone=BACKBONE.pt longmem=CHECKPOINT --data DATA --results-path DIR

--data is a directory of the data that plan.json, beside this file, names; --plan names another plan. Each evaluation is
one of those in the other folders, with its own options (docs/evaluation.md).
"""

import os

from examples.books.evaluate import read_texts
from examples.recall.needle import make_haystack
from longmem_fairseq.evaluation.books import Books
from longmem_fairseq.evaluation.chapterbreak import ChapterBreak
from longmem_fairseq.evaluation.compare import main
from longmem_fairseq.evaluation.dialogue import Dialogue
from longmem_fairseq.evaluation.in_context import InContext
from longmem_fairseq.evaluation.needle import Needle
from longmem_fairseq.evaluation.qa import QuestionAnswering

PLAN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "plan.json")
EVALUATIONS = {
    "books": lambda: Books(read_texts),
    "in_context": InContext,
    "chapterbreak": ChapterBreak,
    "dialogue": Dialogue,
    "needle": lambda: Needle(make_haystack),
    "qa": QuestionAnswering,
}

if __name__ == "__main__":
    print(main(EVALUATIONS, PLAN))
