"""BABILong: accuracy by task and length of the text in which the facts are hidden.

    python -m examples.babilong.evaluate --path CHECKPOINT --data babilong/ --no-cache --results-path DIR

--data has the files of https://huggingface.co/datasets/RMT-team/babilong, or what examples.babilong.generate makes.
"""

from longmem_fairseq.evaluation.babilong import BabiLong
from longmem_fairseq.evaluation.command import main

if __name__ == "__main__":
    print(main(BabiLong()))
