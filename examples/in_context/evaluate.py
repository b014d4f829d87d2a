"""In-context learning with demonstrations in the window and in the memory: SST-2, MR, Subj, SST-5, MPQA.

    python examples/in_context/evaluate.py --path CHECKPOINT --data icl/ --chunk-size 2 --results-path DIR

prints mean and deviation over six draws of demonstrations, raw and calibrated, beside the majority baseline. The README
("Evaluations") says which formats it reads and where to get the sets.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
from longmem_fairseq.evaluation.command import main  # noqa: E402
from longmem_fairseq.evaluation.in_context import InContext  # noqa: E402

if __name__ == "__main__":
    print(main(InContext()))
