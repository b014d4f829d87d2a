"""Suffix identification: the true next-chapter beginning against false ones, given the chapters so far.

    python examples/chapterbreak/evaluate.py --path CHECKPOINT --data chapterbreak_test.jsonl \
        --valid chapterbreak_valid.jsonl --results-path DIR

--data is the official ChapterBreak JSON or our JSON lines (README, "Evaluations").
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
from longmem_fairseq.evaluation.chapterbreak import ChapterBreak  # noqa: E402
from longmem_fairseq.evaluation.command import main  # noqa: E402

if __name__ == "__main__":
    print(main(ChapterBreak()))
