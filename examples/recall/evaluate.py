"""How many answers a model gives right, by the distance of the fact, with the memory on and off.

    python -m examples.recall.evaluate --path CHECKPOINT --data DATA --results-path DIR [--cpu]

prints a table and writes DIR/report.json and DIR/report.png. On and off are one model in one run: off is its side
network without a memory to read. An answer is right if it is the most probable of all symbols.
"""

import argparse
import os
import time
from typing import Dict, List, Optional

from fairseq.data.data_utils import load_indexed_dataset
from torch import Tensor
from tqdm import tqdm

from examples.recall.facts import N_VALUES, questions_of, symbols
from longmem_fairseq.evaluation.reporting.plots import draw
from longmem_fairseq.evaluation.reporting.statistic import ACCURACY
from longmem_fairseq.evaluation.reporting.system_scores import SystemScores
from longmem_fairseq.evaluation.reporting.table import Table
from longmem_fairseq.evaluation.scoring.document_stream import DocumentStream
from longmem_fairseq.evaluation.scoring.scorer import Scorer
from longmem_fairseq.evaluation.scoring.systems import OFF, ON, with_memory
from longmem_fairseq.files import write_json
from longmem_fairseq.modules.token_mixture import TokenReads

BUCKETS = (0, 256, 1_024, 4_096, 16_384, 32_768, 50_000, 66_000)
CHANCE = 100 / N_VALUES


class AnswerStream(DocumentStream):
    """Read a document and tell which of its tokens are the most probable of all symbols."""

    def plain_scores(
        self, features: Dict[str, Tensor], targets: Tensor, reads: Optional[Dict[str, TokenReads]] = None
    ) -> Dict[str, Tensor]:
        reads = reads or {}
        return {
            system: self.scorer.log_probs(x, reads.get(system)).argmax(-1) == targets for system, x in features.items()
        }


def recall(scorer: Scorer, data: str) -> Table:
    """Read the test documents and count the right answers by distance.

    Args:
        scorer: Scorer of the model.
        data: Path of the directory that facts.py made.

    Returns:
        A table with a column for each bucket of distances that has questions.
    """
    dictionary = scorer.tokenizer.dictionary
    documents = load_indexed_dataset(os.path.join(data, "test"), dictionary)
    names = symbols(dictionary)[0]
    columns: Dict[str, Dict[str, SystemScores]] = {}
    for high in BUCKETS[1:]:
        columns[f"to {high:,}"] = {system: SystemScores({}, ACCURACY) for system in (ON, OFF)}
    for number in tqdm(range(len(documents)), unit=" documents", leave=False):
        tokens = documents[number].long()
        right = AnswerStream(scorer, [scorer.memory_size]).read(tokens)
        for answer, distance in zip(*questions_of(tokens.numpy(), names)):
            high = next(high for high in BUCKETS[1:] if distance <= high)
            for system, name in ((ON, with_memory(scorer.memory_size)), (OFF, OFF)):
                scores = columns[f"to {high:,}"][system]
                scores.items[f"document {number}, token {answer}"] = (float(right[name][answer]), 1)
    columns = {column: rows for column, rows in columns.items() if len(rows[ON])}
    return Table(f"Right answers by tokens back to the fact (chance among values: {CHANCE:.1f} %)", columns, "lines")


def accuracies(table: Table) -> List[Dict[str, float]]:
    """Return a table as the rows of the report, one for each bucket of distances."""
    rows = []
    for low, high in zip(BUCKETS, BUCKETS[1:]):
        column = f"to {high:,}"
        if column in table.columns:
            on, off = (round(table.intervals[column][system].value, 1) for system in (ON, OFF))
            questions = len(table.columns[column][ON])
            rows.append({"from": low, "to": high, "questions": questions, "memory_on": on, "memory_off": off})
    return rows


def main():
    parser = argparse.ArgumentParser(prog="python -m examples.recall.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--path", required=True, help="checkpoint of a longmem_lm")
    parser.add_argument("--data", required=True, help="directory that facts.py made")
    parser.add_argument("--results-path", required=True, help="directory of the report")
    parser.add_argument("--memory-size", type=int, default=65536, help="tokens of the memory (65536)")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    args = parser.parse_args()
    scorer = Scorer.load(args.path, args.data, "cpu" if args.cpu else None, memory_size=args.memory_size)
    started = time.time()
    table = recall(scorer, args.data)
    report = {"chance": CHANCE, "memory_size": args.memory_size, "accuracy": accuracies(table)}
    report["seconds"] = round(time.time() - started)
    os.makedirs(args.results_path, exist_ok=True)
    base = os.path.join(args.results_path, "report")
    draw([table], f"{base}.png")
    write_json(f"{base}.json", report)
    print("| tokens back | questions | memory on | memory off |\n| --- | ---: | ---: | ---: |")
    for row in report["accuracy"]:
        tokens = f"{row['from']:,} to {row['to']:,}"
        print(f"| {tokens} | {row['questions']} | {row['memory_on']} % | {row['memory_off']} % |")
    print(f"\nchance among the {N_VALUES} values: {CHANCE:.1f} %; report: {base}.json, {base}.png")


if __name__ == "__main__":
    main()
