"""Prompts of generation as a dataset."""

from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset, data_utils
from torch import Tensor


class PromptDataset(FairseqDataset):
    """Prompts behind an end-of-sentence, as in training; batches are padded behind the tokens.

    Args:
        prompts: tokens of each, shape (length,), int64; an end-of-sentence at the end is left out.
        dictionary: of the tokens.
        segment: tokens of a segment: a prompt is read in such pieces, so a longer one takes no more room in a batch.
        in_order: keep the prompts' order; otherwise those of one length come together.
        targets: what follows each prompt, if that is known.
        ids: numbers of the prompts in what is printed, by default from 0.
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
        # Without a known continuation it is what predicts the prompt itself, for scoring it.
        target = torch.cat([prompt[1:], prompt.new_tensor([self.dictionary.pad()])])
        if self.targets is not None:
            target = self.targets[index]
        return {"id": self.ids[index], "source": prompt, "target": target}

    def __len__(self) -> int:
        return len(self.prompts)

    def num_tokens(self, index: int) -> int:
        """Tokens that are read at a time."""
        return min(int(self.sizes[index]), self.segment)

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    def ordered_indices(self) -> np.ndarray:
        return np.arange(len(self)) if self.in_order else np.argsort(self.sizes, kind="stable")

    def batch_by_size(
        self, indices, max_tokens=None, max_sentences=None, required_batch_size_multiple=1
    ) -> List[List[int]]:
        """Batches of prompts in the order of ``indices``, padded to no more than ``max_tokens`` read at a time.

        A prompt that is longer is a batch by itself. Batches need not be multiples of anything; fairseq's own function
        leaves out the last prompts where they are not (0.12.3).
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
        """``src_tokens`` (B, longest), ``src_lengths`` (B,), ``target`` (B, longest) and ``id`` (B,), all int64."""
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
