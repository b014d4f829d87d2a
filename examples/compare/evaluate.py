"""All evaluations for several checkpoints, in one report with paired bootstrap intervals between them.

    python examples/compare/evaluate.py --path backbone=BACKBONE.pt longmem=CHECKPOINT --data DATA --results-path DIR

--data is a directory that holds what plan.json, beside this file, says; another plan is given with --plan. Each
evaluation is one of those in the other folders, with its own options (README, "Evaluations").
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, "..", ".."), os.path.join(HERE, "..", "recall")]
from needle import make_haystack  # noqa: E402

from longmem_fairseq.evaluation.books import Books  # noqa: E402
from longmem_fairseq.evaluation.chapterbreak import ChapterBreak  # noqa: E402
from longmem_fairseq.evaluation.compare import main  # noqa: E402
from longmem_fairseq.evaluation.dialogue import Dialogue  # noqa: E402
from longmem_fairseq.evaluation.in_context import InContext  # noqa: E402
from longmem_fairseq.evaluation.needle import Needle  # noqa: E402
from longmem_fairseq.evaluation.qa import QuestionAnswering  # noqa: E402
from preprocess.documents import iter_documents  # noqa: E402

EVALUATIONS = {
    "books": lambda: Books(lambda paths: ((document.name, document.text) for document in iter_documents(paths))),
    "in_context": InContext,
    "chapterbreak": ChapterBreak,
    "dialogue": Dialogue,
    "needle": lambda: Needle(make_haystack),
    "qa": QuestionAnswering,
}

if __name__ == "__main__":
    print(main(EVALUATIONS, os.path.join(HERE, "plan.json")))
