"""Prompts of generation as a dataset.

Legend: B prompts of a batch.
"""

import logging
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset, data_utils
from torch import Tensor

from ..data.document_dataset import DocumentDataset

logger = logging.getLogger(__name__)


class PromptDataset(FairseqDataset):
    """Prompts behind an end-of-sentence, as in training; batches are padded behind the tokens.

    Args:
        prompts: Token ids of each prompt, shape (length,), int64; an end-of-sentence at the end is left out.
        dictionary: Dictionary of the tokens.
        segment: Number of tokens of a segment. A prompt is read in segments, so a longer one takes no more room in a
            batch.
        in_order: If true, keep the prompts' order; otherwise sort them by length.
        targets: Token ids that follow each prompt, if they are known; otherwise None.
        ids: Numbers of the prompts in the output, by default from 0.

    Attributes:
        sizes: Length of each prompt in tokens, with the end-of-sentence before it, shape (prompts,), int64.
    """

    def __init__(
        self,
        prompts: Sequence[Tensor],
        dictionary: Dictionary,
        segment: int,
        in_order: bool = False,
        targets: Optional[Sequence[Tensor]] = None,
        ids: Optional[Sequence[int]] = None,
    ):
        eos = torch.tensor([dictionary.eos()])
        self.prompts = [
            torch.cat([eos, prompt[:-1] if len(prompt) and prompt[-1] == eos else prompt]) for prompt in prompts
        ]
        self.dictionary, self.segment, self.in_order, self.targets = dictionary, segment, in_order, targets
        self.ids = range(len(self.prompts)) if ids is None else ids
        self.sizes = np.array([len(prompt) for prompt in self.prompts], dtype=np.int64)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        prompt = self.prompts[index]
        if self.targets is not None:
            target = self.targets[index]
        else:  # without a known continuation the prompt itself is scored
            target = torch.cat([prompt[1:], prompt.new_tensor([self.dictionary.pad()])])
        return {"id": self.ids[index], "source": prompt, "target": target}

    def __len__(self) -> int:
        return len(self.prompts)

    def num_tokens(self, index: int) -> int:
        """Return the number of tokens that are read at a time."""
        return min(int(self.sizes[index]), self.segment)

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    def ordered_indices(self) -> np.ndarray:
        return np.arange(len(self)) if self.in_order else np.argsort(self.sizes, kind="stable")

    def batch_by_size(
        self, indices, max_tokens=None, max_sentences=None, required_batch_size_multiple=1
    ) -> List[List[int]]:
        """Put prompts into batches.

        fairseq's own function (0.12.3) leaves out the last prompts where their number is not a multiple of
        ``required_batch_size_multiple``.

        Args:
            indices: Indices of the prompts, in the order of the batches.
            max_tokens: Number of tokens that a padded batch may have, read at a time; a longer prompt is a batch by
                itself. None for no limit.
            max_sentences: Number of prompts that a batch may have; None for no limit.
            required_batch_size_multiple: Ignored.

        Returns:
            Indices of the prompts of each batch.
        """
        batches: List[List[int]] = []
        longest = 0
        for index in indices:
            wider = max(longest, self.num_tokens(index))
            full = not batches or len(batches[-1]) == max_sentences
            if full or (max_tokens is not None and wider * (len(batches[-1]) + 1) > max_tokens):
                batches.append([])
                wider = self.num_tokens(index)
            batches[-1].append(int(index))
            longest = wider
        return batches

    def collater(self, samples: List[Dict[str, Any]]) -> Dict[str, Any]:
        """Put prompts together, padded to the longest.

        Args:
            samples: Prompts as :meth:`__getitem__` returns them.

        Returns:
            ``id`` (B,), ``nsentences``, ``ntokens``, ``net_input`` with ``src_tokens`` (B, longest) and ``src_lengths``
            (B,), and ``target`` (B, longest), all int64; or ``{}`` if there are no prompts.
        """
        if not samples:
            return {}
        pad = self.dictionary.pad()
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "nsentences": len(samples),
            "ntokens": sum(len(sample["source"]) for sample in samples),
            "net_input": {
                "src_tokens": data_utils.collate_tokens([sample["source"] for sample in samples], pad),
                "src_lengths": torch.tensor([len(sample["source"]) for sample in samples]),
            },
            "target": data_utils.collate_tokens([sample["target"] for sample in samples], pad),
        }


def document_prompts(
    documents: DocumentDataset, n: int, dictionary: Dictionary, segment: int, in_order: bool = False
) -> PromptDataset:
    """Use the first tokens of documents as prompts, and the rest as their known continuations.

    Args:
        documents: Documents; those of no more than ``n`` tokens are left out.
        n: Number of tokens of a prompt, ``--prompt-tokens``.
        dictionary: Dictionary of the tokens.
        segment: Number of tokens of a segment.
        in_order: If true, keep the documents' order; otherwise sort the prompts by length.

    Returns:
        The prompts, numbered as their documents.

    Raises:
        ValueError: All documents are too short.
    """
    eos, split, texts = dictionary.eos(), documents.split, {}
    for i in range(len(documents)):
        text = torch.from_numpy(documents.read(i, 0, documents.size(i)))
        if text[-1] == eos:
            text = text[:-1]
        if len(text) > n:
            texts[i] = text
    if len(texts) < len(documents):
        logger.info("%s: %d documents have no more than %d tokens", split, len(documents) - len(texts), n)
    if not texts:
        raise ValueError(f"no document of {split} has more than --prompt-tokens {n} tokens: lower it")
    prompts, targets = [text[:n] for text in texts.values()], [text[n:] for text in texts.values()]
    return PromptDataset(prompts, dictionary, segment, in_order, targets, ids=list(texts))
