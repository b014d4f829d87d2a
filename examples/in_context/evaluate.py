"""In-context learning with demonstrations in the window and in the memory: SST-2, MR, Subj, SST-5, MPQA.

    python -m examples.in_context.evaluate --path CHECKPOINT --data icl/ --chunk-size 2 --results-path DIR

prints mean and deviation over six draws of demonstrations, raw and calibrated, beside the majority baseline. See
docs/evaluation.md for the formats that it reads and for the sets.
"""

from longmem_fairseq.evaluation.command import main
from longmem_fairseq.evaluation.in_context import InContext

if __name__ == "__main__":
    print(main(InContext()))
