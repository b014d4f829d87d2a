"""Suffix identification: the true beginning of the next chapter against false ones, given the chapters so far.

    python -m examples.chapterbreak.evaluate --path CHECKPOINT --data chapterbreak_test.jsonl \
        --valid chapterbreak_valid.jsonl --results-path DIR

--data is the official ChapterBreak JSON or JSON lines (docs/evaluation.md).
"""

from longmem_fairseq.evaluation.chapterbreak import ChapterBreak
from longmem_fairseq.evaluation.command import main

if __name__ == "__main__":
    print(main(ChapterBreak()))
