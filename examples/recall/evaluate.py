"""How many answers a model gives right, by the distance of the fact, with the memory on and off.

    python examples/recall/evaluate.py --path CHECKPOINT --data DATA --results-path DIR [--cpu]

prints a table and writes DIR/report.json and DIR/report.png. On and off are one model in one run: off is what its side
network says when it reads nothing. An answer is right if it is the most probable of all symbols.
"""

import argparse
import json
import os
import sys
import time
from argparse import Namespace

import numpy as np
import torch
from fairseq import checkpoint_utils, utils
from tqdm import tqdm

sys.path[:0] = [os.path.join(os.path.dirname(__file__), "..", ".."), os.path.dirname(__file__)]
from facts import N_VALUES, questions_of, symbols  # noqa: E402

BUCKETS = (0, 256, 1_024, 4_096, 16_384, 32_768, 50_000, 66_000)


def load(path: str, data: str, memory_size: int):
    """The model in evaluation mode and its task, reading ``data``."""
    utils.import_user_module(Namespace(user_dir=os.path.join(os.path.dirname(__file__), "../../longmem_fairseq")))
    overrides = {"data": data, "memory_size": memory_size}
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides=overrides)
    model = models[0].eval()
    model.score_without_memory = True
    return model, task


@torch.no_grad()
def answers(model, task, device):
    """For each question of the test documents: distance, right with the memory, right without; shape (n, 3)."""
    task.load_dataset("test")
    dataset = task.dataset("test")
    documents = [dataset.read(i, 0, dataset.size(i)) for i in range(len(dataset))]
    names = symbols(task.source_dictionary)[0]
    asked = [dict(zip(*questions_of(tokens, names))) for tokens in documents]
    rows = []
    batches = task.eval_lm_dataloader(dataset, batch_size=len(documents), num_workers=0)
    for sample in tqdm(batches, unit="segments", leave=False):
        segments, target = sample["net_input"]["segments"], sample["target"]
        logits, extra = model(**utils.apply_to_sample(lambda x: x.to(device), sample["net_input"]))
        found = logits.argmax(-1).cpu(), extra["logits_without_memory"].argmax(-1).cpu()
        for row in range(len(segments)):
            start = int(segments.starts[row])
            for t in range(int(segments.lengths[row])):
                distance = asked[int(segments.streams[row])].get(start + t)
                if distance is not None:
                    rows.append((distance, *(int(x[row, t] == target[row, t]) for x in found)))
    return np.array(rows)


def by_distance(results: np.ndarray) -> list:
    """Accuracy in each bucket of distances that has questions."""
    table = []
    for low, high in zip(BUCKETS, BUCKETS[1:]):
        here = results[(results[:, 0] > low) & (results[:, 0] <= high)]
        if len(here):
            on, off = 100 * here[:, 1:].mean(axis=0)
            row = {"from": low, "to": high, "questions": len(here)}
            table.append({**row, "memory_on": round(on, 1), "memory_off": round(off, 1)})
    return table


def plot(table: list, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), constrained_layout=True)
    for key, style in (("memory_on", "o-"), ("memory_off", "s--")):
        axes.plot(range(len(table)), [row[key] for row in table], style, label=key.replace("_", " "))
    axes.axhline(100 / N_VALUES, color="grey", linewidth=0.8, label="chance among values")
    axes.set_xticks(range(len(table)), [f"to {row['to']:,}" for row in table], rotation=20)
    axes.set_xlabel("tokens back to the fact")
    axes.set_ylabel("right answers (%)")
    axes.set_ylim(-3, 103)
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--path", required=True, help="checkpoint of a longmem_lm")
    parser.add_argument("--data", required=True, help="what facts.py made")
    parser.add_argument("--results-path", required=True)
    parser.add_argument("--memory-size", type=int, default=65536)
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    model, task = load(args.path, args.data, args.memory_size)
    began = time.time()
    table = by_distance(answers(model.to(device), task, device))
    report = {"chance": 100 / N_VALUES, "memory_size": args.memory_size, "accuracy": table}
    report["seconds"] = round(time.time() - began)
    os.makedirs(args.results_path, exist_ok=True)
    base = os.path.join(args.results_path, "report")
    plot(table, base + ".part.png")
    with open(base + ".part.json", "w") as file:
        json.dump(report, file, indent=2)
    for kind in ("png", "json"):
        os.replace(f"{base}.part.{kind}", f"{base}.{kind}")
    print("| tokens back | questions | memory on | memory off |\n| --- | ---: | ---: | ---: |")
    for row in table:
        tokens = f"{row['from']:,} to {row['to']:,}"
        print(f"| {tokens} | {row['questions']} | {row['memory_on']} % | {row['memory_off']} % |")
    print(f"\nchance among the {N_VALUES} values: {100 / N_VALUES:.1f} %; report: {base}.json, {base}.png")


if __name__ == "__main__":
    main()
