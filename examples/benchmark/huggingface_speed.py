"""Speed of a Hugging Face model as a backbone of this project, beside transformers on the same weights and tokens.

    python -m examples.benchmark.huggingface_speed --model SmolLM2-135M/ --markdown speed.md
    python -m examples.benchmark.huggingface_speed --model model.Q4_K_M.gguf --dtypes bfloat16 --threads 2

The model is converted first, as preprocess.convert_huggingface does it, and a GGUF also to a Hugging Face directory,
since transformers does not read each kind. Both libraries run in this process and take turns; figures are medians.

*Prefill* computes the logits of all tokens of a segment. *A token* is one step of greedy decoding behind a prompt whose
keys and values are cached; the prompt's own time does not count. In float32 both compute everything in float32. In
bfloat16 transformers computes everything in it (``model.to(torch.bfloat16)``), and this project the products with
weights (``--backbone-dtype bfloat16``).

The largest difference between the logits of both, and whether they generate the same tokens, show that they compute the
same model. For LongMem on the same backbone see ``examples.benchmark.throughput --backbone``.

Legend: B rows, T tokens, V tokens of the vocabulary.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import torch
from fairseq.data import Dictionary
from torch import Tensor
from tqdm import tqdm

import longmem_fairseq  # noqa: F401  (registers the models)
from examples.benchmark.command import require_at_least, require_device, stop, synchronize
from examples.benchmark.machine import describe_machine
from examples.benchmark.tables import bullet_list, table
from longmem_fairseq.backbones.loading import load_backbone
from longmem_fairseq.files import write_json, write_text
from preprocess.convert_huggingface import CHECKPOINT, DICTIONARY, from_huggingface, to_huggingface
from preprocess.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BackboneVariant:
    """The model as a backbone of this project.

    Args:
        directory: Directory that ``preprocess.convert_huggingface`` wrote.
        dtype: Precision of the weights and of the products with them.
        device: Device of the weights.
        vocabulary: Number of tokens of the model, V.
    """

    name = "this project"

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device, vocabulary: int):
        dictionary = Dictionary.load(str(directory / DICTIONARY))
        self.backbone = load_backbone(str(directory / CHECKPOINT), dictionary, dtype=dtype).to(device)
        self.symbols = torch.tensor([dictionary.index(str(i)) for i in range(vocabulary)], device=device)  # (V,)

    def prefill(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, T, V) of token ids (B, T), in the order of the model's tokens."""
        return self._logits(self.backbone.encode(self.symbols[tokens]))[..., self.symbols]

    def run_prefill(self, tokens: Tensor) -> None:
        """Compute the logits of token ids (B, T)."""
        self._logits(self.backbone.encode(self.symbols[tokens]))

    def decoder(self, prompt: Tensor) -> Callable[[Tensor], Tensor]:
        """Read a prompt (B, T); return a function from the next tokens (B, 1) to the logits behind them (B, 1, V)."""
        state: Dict = {}
        self.backbone.encode(self.symbols[prompt], state)
        position = prompt.size(1)

        def step(tokens: Tensor) -> Tensor:
            nonlocal position
            encoded = self.backbone.encode(self.symbols[tokens], state, position)
            position += 1
            return self._logits(encoded)[..., self.symbols]

        return step

    def _logits(self, encoded) -> Tensor:
        return self.backbone.output(self.backbone.final_hidden(encoded))


class TransformersVariant:
    """The model in transformers; arguments are those of :class:`BackboneVariant`."""

    name = "transformers"

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()

    def prefill(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits

    def run_prefill(self, tokens: Tensor) -> None:
        self.prefill(tokens)

    def decoder(self, prompt: Tensor) -> Callable[[Tensor], Tensor]:
        cache = self.model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        return lambda tokens: self.model(tokens, past_key_values=cache, use_cache=True).logits


def generate(variant, prompt: Tensor, new_tokens: int, device: torch.device) -> Tuple[List[int], float]:
    """Continue a prompt greedily.

    Args:
        variant: One of the variants.
        prompt: Token ids, shape (1, T), int64.
        new_tokens: Number of steps.
        device: Device of the model.

    Returns:
        Generated token ids, and the seconds of a step.
    """
    step = variant.decoder(prompt[:, :-1])
    token, generated = prompt[:, -1:], []
    synchronize(device)
    start = time.perf_counter()
    for _ in range(new_tokens):
        token = step(token)[:, -1:].argmax(dim=-1)
        generated.append(token)
    synchronize(device)
    return torch.cat(generated, dim=1)[0].tolist(), (time.perf_counter() - start) / new_tokens


def prefill_seconds(variant, tokens: Tensor, device: torch.device) -> float:
    """Return the seconds in which a variant computes the logits of token ids (B, T)."""
    synchronize(device)
    start = time.perf_counter()
    variant.run_prefill(tokens)
    synchronize(device)
    return time.perf_counter() - start


@torch.inference_mode()
def measure(variants: List, options: argparse.Namespace, vocabulary: int) -> Tuple[List[Dict], Dict]:
    """Measure variants in turns.

    Args:
        variants: This project's variant and that of transformers.
        options: Options of this command.
        vocabulary: Number of tokens of the model.

    Returns:
        One row for each variant, and how far their results agree.
    """
    generator = torch.Generator().manual_seed(0)
    size = (options.rounds, options.batch, options.segment)
    segments = torch.randint(vocabulary, size, generator=generator).to(options.device)
    prompt = torch.randint(vocabulary, (1, options.prompt), generator=generator).to(options.device)
    here, reference = (variant.prefill(segments[0]).float() for variant in variants)  # also warms up
    difference = float((here - reference).abs().max())
    del here, reference
    texts = [generate(variant, prompt, 2, options.device)[0] for variant in variants]
    prefills, steps = [[] for _ in variants], [[] for _ in variants]
    for segment in tqdm(segments, desc="measuring", leave=False, mininterval=2):
        for i, variant in enumerate(variants):
            prefills[i].append(prefill_seconds(variant, segment, options.device))
        for i, variant in enumerate(variants):
            texts[i], seconds = generate(variant, prompt, options.new_tokens, options.device)
            steps[i].append(seconds)
    rows = [
        {
            "implementation": variant.name,
            "tokens_per_second": options.batch * options.segment / statistics.median(prefill),
            "slowest_prefill": max(prefill),
            "token_ms": 1000 * statistics.median(step),
            "slowest_token_ms": 1000 * max(step),
        }
        for variant, prefill, step in zip(variants, prefills, steps)
    ]
    rows[0]["prefill_ratio"] = rows[0]["tokens_per_second"] / rows[1]["tokens_per_second"]
    rows[0]["token_ratio"] = rows[1]["token_ms"] / rows[0]["token_ms"]
    same = sum(a == b for a, b in zip(*texts))
    return rows, {"largest_logit_difference": difference, "same_tokens": same, "of_tokens": options.new_tokens}


def run(options: argparse.Namespace) -> Dict:
    """Convert the model, and measure it in each precision."""
    rows, agreement = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        converted, directory = Path(temporary) / "backbone", options.model
        from_huggingface(options.model, converted)
        if options.model.is_file():
            directory = Path(temporary) / "huggingface"
            to_huggingface(converted / CHECKPOINT, directory)
        for name in options.dtypes:
            other = TransformersVariant(directory, DTYPES[name], options.device)
            vocabulary = other.model.config.vocab_size
            backbone = BackboneVariant(converted, DTYPES[name], options.device, vocabulary)
            measured, agreement[name] = measure([backbone, other], options, vocabulary)
            rows += [{"dtype": name, **row} for row in measured]
            del backbone, other
            gc.collect()
    settings = {name: str(value) if name in ("device", "model") else value for name, value in vars(options).items()}
    return {"machine": describe_machine(), "options": settings, "rows": rows, "agreement": agreement}


def markdown(result: Dict, options: argparse.Namespace) -> str:
    """Format the result as a report in Markdown."""
    columns = {
        "dtype": "precision",
        "implementation": "",
        "tokens_per_second": "prefill, tokens/s",
        "prefill_ratio": "of transformers",
        "token_ms": "ms per token",
        "token_ratio": "speed of transformers",
    }
    lines = [
        f"## {options.model.name}: segments of {options.segment:,} tokens, batch {options.batch}; "
        f"{options.new_tokens} tokens behind a prompt of {options.prompt:,}; medians of {options.rounds}",
        "",
        table(result["rows"], columns),
        "",
    ]
    for name, agreement in result["agreement"].items():
        lines.append(
            "{}: logits differ by at most {largest_logit_difference:.2g}; {same_tokens} of {of_tokens} generated "
            "tokens are the same.".format(name, **agreement)
        )
    return "\n".join([*lines, ""])


def parse(arguments: List[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark.huggingface_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="directory of a Hugging Face model, or a GGUF file")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="precisions (default: both)")
    add("--segment", type=int, default=1024, help="number of tokens in a segment (default: %(default)s)")
    add("--batch", type=int, default=1, help="number of segments side by side (default: %(default)s)")
    add("--prompt", type=int, default=900, help="number of tokens of the prompt (default: %(default)s)")
    add("--new-tokens", type=int, default=50, help="number of generated tokens (default: %(default)s)")
    add("--rounds", type=int, default=5, help="number of measurements (default: %(default)s)")
    add("--threads", type=int, help="number of threads on the CPU (default: PyTorch's)")
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default: %(default)s)")
    add("--json", help="path of a JSON file for the result")
    add("--markdown", help="path of a file for the printed table")
    options = parser.parse_args(arguments)
    require_at_least(options, 1, "segment", "batch", "new_tokens", "rounds")
    require_at_least(options, 2, "prompt")
    require_device(options.device)
    return options


def main(arguments: List[str]) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        result = run(options)
    except ImportError as error:
        stop(f"{error}: install transformers to measure it")
    except (InputError, ValueError, OSError) as error:
        stop(str(error))
    text = markdown(result, options) + "\n" + "\n".join(bullet_list(result["machine"]))
    print(text)
    if options.json:
        write_json(options.json, result)
    if options.markdown:
        write_text(options.markdown, text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
