"""Models of this package in EleutherAI's lm-evaluation-harness.

    python -m longmem_fairseq.integrations.lm_eval --model_args path=CHECKPOINT,data=DIR,memory_size=65536 --tasks ...

All other options are the harness's own. From Python, :class:`LongMemHarness` is an ``lm`` for
``lm_eval.simple_evaluate``.

Legend: T tokens of a window and of a segment.
"""

import contextlib
import importlib.util
import json
import sys
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from fairseq.search import Sampling

from ..data.manifest import dictionary_fingerprint
from ..evaluation.command import configure_logging, sentence
from ..evaluation.scoring.document_stream import DocumentStream
from ..evaluation.scoring.generate import generate_texts
from ..tasks.pretrained import choose_device
from .harness_arguments import AUTO, GenerationArguments, load_scorer, rows_at_once
from .shared_contexts import Request, SharedContexts, grouped

PROG = "python -m longmem_fairseq.integrations.lm_eval"
NAME = "longmem"
_COMMANDS = ("run", "ls", "validate")  # of the harness's command line

if importlib.util.find_spec("lm_eval") is None:
    _MISSING = "the harness needs the Python package lm-eval: pip install 'longmem_fairseq[lm-eval]'"
    raise SystemExit(f"{PROG}: {_MISSING}") if __name__ == "__main__" else ImportError(_MISSING)

from lm_eval.__main__ import cli_evaluate  # noqa: E402  (behind the check of the package)
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402
from tqdm import tqdm  # noqa: E402

EncodedRequest = Tuple[Optional[Tuple[str, str]], List[int], List[int]]  # texts, context and continuation


@register_model(NAME)
class LongMemHarness(TemplateLM):
    """A LongMem, a released LongMem or a backbone alone as a model of the harness.

    The window holds the end of a context and its continuation. What does not fit is memorized, once for requests whose
    contexts begin alike; a system without a memory does not see it. Log-probabilities are over the model's own symbols:
    those that the conversion of a Hugging Face model added are left out, so that they equal transformers'.

    Args:
        path: Path of a checkpoint, of a directory of checkpoints, or of a model directory.
        data: Directory of ``dict.txt`` and the tokenizer; by default that of the checkpoint.
        system: ``memory``, ``off`` (the side network without its memory) or ``backbone``; by default ``memory`` where
            the model has one.
        max_length: Number of tokens of a window, T; by default as trained.
        max_gen_toks: Largest number of new tokens of a task that does not set it.
        batch_size: Largest number of continuations that are read side by side; ``auto`` counts tokens.
        max_batch_size: Not supported.
        add_bos_token: Whether contexts start with an end-of-sentence, as documents do; by default as transformers has
            it for a converted model, and true for others.
        settings: Settings in place of the checkpoint's, such as ``memory_size``, ``k``, ``chunk_size`` and
            ``memory_dtype``; ``device``; and ``backbone``, the path of a backbone that has moved.

    Raises:
        ValueError: An argument does not fit the model, or the others.
        FileNotFoundError: The checkpoint or the dictionary is missing.
    """

    def __init__(
        self,
        path: str,
        data: Optional[str] = None,
        system: Optional[str] = None,
        max_length: Optional[int] = None,
        max_gen_toks: int = 256,
        batch_size: Union[int, str] = AUTO,
        max_batch_size: Optional[int] = None,
        add_bos_token: Optional[bool] = None,
        **settings,
    ):
        super().__init__()
        if add_bos_token not in (None, True, False):
            raise ValueError(f"add_bos_token={add_bos_token} is neither True nor False: change it")
        self.rows_at_once = rows_at_once(batch_size, max_batch_size)
        self.scorer = load_scorer(path, data, system, max_length, settings)
        (self.system,) = self.scorer.systems
        self.max_gen_toks, self._device = max_gen_toks, self.scorer.device
        starts_texts = self.scorer.tokenizer.starts_texts if len(self.scorer.excluded) else True
        self.add_bos_token = starts_texts if add_bos_token is None else add_bos_token

    @property
    def max_length(self) -> int:
        """Number of tokens of a window, T."""
        return self.scorer.size

    @property
    def eot_token_id(self) -> int:
        """Token id of end-of-sentence, with which documents start."""
        return self.scorer.tokenizer.eos

    @property
    def tokenizer_name(self) -> str:
        """Name that tells tokenizations apart: the dictionary's fingerprint."""
        return dictionary_fingerprint(self.scorer.tokenizer.dictionary.symbols)

    def get_model_info(self) -> Dict[str, Any]:
        """Describe the model for the harness's report, in plain JSON types."""
        return {"system": self.system, "add_bos_token": self.add_bos_token, **self.scorer.describe()}

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        """Refuse the option, since a dictionary has no chat template."""
        raise ValueError("--apply_chat_template is not supported, since models here have no template: leave it out")

    def tok_encode(self, string: str, add_special_tokens: Optional[bool] = None, **unused) -> List[int]:
        """Encode a text.

        Args:
            string: Text of any length.
            add_special_tokens: Whether an end-of-sentence precedes it; None for ``add_bos_token``.
            unused: Ignored options.

        Returns:
            Token ids.
        """
        starts = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [self.eot_token_id] * bool(starts) + self.scorer.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[EncodedRequest], disable_tqdm: bool = False, **unused
    ) -> List[Tuple[float, bool]]:
        T, sorted_requests = self.max_length, []
        for number, (texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= T:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens ({str(texts and texts[1])!r:.60}) does not have "
                    f"from 1 to {T} tokens, those of a window: correct the task, or raise max_length"
                )
            past = tuple(context[1:])
            beyond = max(0, len(past) + len(continuation) - T)
            whole = beyond // T * T
            key = (past[whole:], beyond - whole)
            sorted_requests.append(Request((context[0], *past[:whole]), key, number))
        groups = grouped(sorted_requests)
        contexts = SharedContexts(self.scorer, [group[0].start for group in groups])
        answers: List[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as progress:
            for place, group in enumerate(groups):
                prefix, beyond = group[0].key
                state = contexts.state(place, more=T)
                room = T - (len(prefix) - beyond)
                window = self.scorer.window(state, torch.tensor(prefix, dtype=torch.int64), room)
                for part in _parts(group, self.rows_at_once):
                    texts = [torch.tensor(requests[request.number][2]) for request in part]
                    for request, scores in zip(part, window.compare(texts)):
                        tokens = scores[self.system]
                        answer = (float(tokens.log_probs.double().sum()), bool(tokens.likeliest.all()))
                        answers[request.number] = answer
                        key = requests[request.number][0]
                        if key is not None:
                            self.cache_hook.add_partial("loglikelihood", key, answer)
                    progress.update(len(part))
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> List[float]:
        """Score whole texts, every token once.

        Behind a memory a text is read segment by segment, as ``fairseq-eval-lm`` does; without one in the harness's
        windows, the last of which is full.

        Args:
            requests: Requests of the harness.
            disable_tqdm: Whether progress is not shown.

        Returns:
            Log-probability of each text, natural logarithm.
        """
        answers = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            tokens = self.scorer.tokenizer.encode(text)
            if self.scorer.has_memory:
                stream = DocumentStream(self.scorer, [self.scorer.memory_size])
                (scores,) = stream.read(tokens).values() if len(tokens) else (tokens,)
                answer = float(scores.double().sum())
            else:
                windows = get_rolling_token_windows(tokens.tolist(), self.prefix_token_id, self.max_length, 1)
                parts = [(None, *make_disjoint_window(window)) for window in windows]
                answer = sum(score for score, _ in self._loglikelihood_tokens(parts, disable_tqdm=True))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
            answers.append(answer)
        return answers

    def generate_until(self, requests, disable_tqdm: bool = False) -> List[str]:
        """Continue contexts up to stop strings.

        Args:
            requests: Requests of the harness.
            disable_tqdm: Whether progress is not shown.

        Returns:
            The continuations, cut before a stop string.
        """
        by_arguments: Dict[str, List[int]] = {}
        for number, request in enumerate(requests):
            by_arguments.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers: List[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as progress:
            for numbers in by_arguments.values():
                arguments = GenerationArguments(requests[numbers[0]].args[1], self.max_gen_toks)
                contexts = {number: self._context(requests[number].args[0]) for number in numbers}
                for answered, texts in self._generate(contexts, arguments):
                    for number, text in zip(answered, texts):
                        answers[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    progress.update(len(answered))
        return answers

    def _context(self, text: str) -> List[int]:
        return self.tok_encode(text) or [self.prefix_token_id]

    def _generate(
        self, contexts: Dict[int, List[int]], arguments: GenerationArguments
    ) -> Iterator[Tuple[List[int], List[str]]]:
        """Yield numbers of contexts, and their continuations."""
        scorer, T = self.scorer, self.max_length
        options = dict(arguments.options)
        if arguments.sampling is not None:
            options["search_strategy"] = Sampling(scorer.tokenizer.dictionary, *arguments.sampling)
        room = min(arguments.max_new_tokens + 1, T // 2)
        whole = {number: max(0, len(tokens) - 1 + room - T) // T * T for number, tokens in contexts.items()}
        groups = grouped([Request(tuple(tokens[: 1 + whole[i]]), (), i) for i, tokens in contexts.items()])
        starts = SharedContexts(scorer, [group[0].start for group in groups])
        for place, group in enumerate(groups):
            state = starts.state(place, more=T)
            for part in _parts(group, self.rows_at_once):
                numbers = [request.number for request in part]
                prompts = [torch.tensor(contexts[i][1 + whole[i] :], dtype=torch.int64) for i in numbers]
                texts = generate_texts(
                    scorer, self.system, state, prompts, arguments.max_new_tokens, arguments.stops, **options
                )
                yield numbers, [self._as_transformers(text) for text in texts]

    def _as_transformers(self, text: str) -> str:
        """Leave out the space that transformers does not decode at the beginning of a text."""
        return text[1:] if self.scorer.tokenizer.adds_space and text.startswith(" ") else text


def _parts(group: List[Request], size: Optional[int]) -> Iterator[List[Request]]:
    size = size or len(group)
    for begin in range(0, len(group), size):
        yield group[begin : begin + size]


@contextlib.contextmanager
def _arguments(argv: List[str]) -> Iterator[None]:
    """Let the harness, which reads the arguments of the process, read others."""
    before = sys.argv
    sys.argv = [PROG, *argv]
    try:
        yield
    finally:
        sys.argv = before


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the harness's command line with this package's models; exit with one sentence if it fails.

    Args:
        argv: Command line; by default that of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = [arguments.pop(0)] if arguments and arguments[0] in _COMMANDS else []
    if arguments and command in ([], ["run"]):
        defaults = ["--model", NAME]
        if not {"--config", "-C"} & set(arguments):  # whose values they would replace
            defaults += ["--batch_size", AUTO, "--device", str(choose_device(None))]
        arguments = defaults + arguments
    configure_logging()
    try:
        with _arguments(command + arguments):
            cli_evaluate()
    except (ValueError, OSError) as error:
        sys.exit(f"{PROG}: {sentence(error)}")


if __name__ == "__main__":
    main()
