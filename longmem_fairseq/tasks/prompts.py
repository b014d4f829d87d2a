"""Prompts of generation as a dataset, and text as tokens."""

import codecs
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset, data_utils
from torch import Tensor

_NEWLINE = "<0x0A>"  # in the lines that fairseq's commands read and print


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


def encode_text(text: str, dictionary: Dictionary, bpe=None, tokenizer=None) -> Tensor:
    """Tokens of a text, shape (length,), int64, without an end-of-sentence.

    Args:
        text: of any number of lines.
        dictionary: of the tokens.
        bpe, tokenizer: fairseq's, as its commands build them.

    Raises:
        ValueError: there is nothing in it.
    """
    if tokenizer is not None:
        text = tokenizer.encode(text)
    if hasattr(bpe, "sp"):  # fairseq joins the pieces by spaces, in which those with a newline in them would be lost
        ids = [dictionary.index(_visible(piece)) for piece in bpe.sp.encode(text, out_type=str)]
        tokens = torch.tensor(ids, dtype=torch.int64)
    else:
        line = text if bpe is None else bpe.encode(text)
        tokens = dictionary.encode_line(line, append_eos=False, add_if_not_exist=False).long()
    if not len(tokens):
        raise ValueError("the text is empty")
    return tokens


def decode_text(tokens: Tensor, dictionary: Dictionary, bpe=None, tokenizer=None) -> str:
    """The text of tokens (length,), without end-of-sentence; the inverse of :func:`encode_text`."""
    symbols = [dictionary[token] for token in tokens.tolist() if token not in (dictionary.eos(), dictionary.pad())]
    if hasattr(bpe, "sp"):
        pieces = {_visible(piece): piece for piece in map(bpe.sp.id_to_piece, range(bpe.sp.get_piece_size()))}
        text = bpe.sp.decode([pieces.get(symbol, symbol) for symbol in symbols])
    else:
        line = " ".join(symbols)
        text = line if bpe is None else bpe.decode(line)
    return text if tokenizer is None else tokenizer.decode(text)


def token_texts(tokens: Tensor, dictionary: Dictionary, bpe=None) -> List[str]:
    """What each token (length,) adds to the text: end to end they are :func:`decode_text`, as far as there is one.

    A character that several tokens share the bytes of belongs to the last of them, the others are empty. Tokens that
    are no text, such as an end-of-sentence, keep their name.

    Raises:
        ValueError: the BPE is another one than sentencepiece and GPT-2's.
    """
    symbols = [dictionary[token] for token in tokens.tolist()]
    if bpe is None:
        return [f"{symbol} " for symbol in symbols[:-1]] + symbols[-1:]
    texts = _symbol_texts(symbols, _bytes_of_symbols(bpe))
    if texts and texts[0].startswith(" ") and "".join(texts)[1:] == decode_text(tokens, dictionary, bpe):
        texts[0] = texts[0][1:]  # sentencepiece may have put a space before the text
    return texts


class OneLineBPE:
    """A BPE for fairseq's commands, whose prompts and answers are lines: a newline in one is written ``<0x0A>``.

    Without it a newline ends a prompt, and sentencepiece's pieces of bytes and newlines are printed by their names.

    Args:
        bpe: fairseq's, sentencepiece or GPT-2's; anything else asked of this object is asked of it.
    """

    def __init__(self, bpe):
        self._bpe, self._bytes = bpe, _bytes_of_symbols(bpe)

    def __getattr__(self, name: str):
        return getattr(self._bpe, name)

    def encode(self, line: str) -> str:
        text = line.replace(_NEWLINE, "\n")
        if hasattr(self._bpe, "sp"):
            return " ".join(map(_visible, self._bpe.sp.encode(text, out_type=str)))
        return self._bpe.encode(text)

    def decode(self, symbols: str) -> str:
        return "".join(_symbol_texts(symbols.split(), self._bytes)).strip().replace("\n", _NEWLINE)


def one_line(bpe):
    """A BPE as :class:`OneLineBPE`, if it is of a kind that has one."""
    return OneLineBPE(bpe) if hasattr(bpe, "sp") or _is_gpt2(bpe) else bpe


def _is_gpt2(bpe) -> bool:
    return hasattr(getattr(bpe, "bpe", None), "byte_decoder")


def _bytes_of_symbols(bpe) -> Dict[str, bytes]:
    """What the dictionary's symbols stand for, those that are text."""
    if hasattr(bpe, "sp"):
        ids = (i for i in range(bpe.sp.get_piece_size()) if not (bpe.sp.is_control(i) or bpe.sp.is_unknown(i)))
        return {_visible(bpe.sp.id_to_piece(i)): _piece_bytes(bpe.sp, i) for i in ids}
    if _is_gpt2(bpe):
        return {str(i): bytes(bpe.bpe.byte_decoder[char] for char in piece) for i, piece in bpe.bpe.decoder.items()}
    raise ValueError(f"{type(bpe).__name__} cannot tell the text of single tokens: sentencepiece and GPT-2's can")


def _symbol_texts(symbols: Sequence[str], known: Dict[str, bytes]) -> List[str]:
    """The text of each symbol; one that is no text is its own name."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(known.get(symbol, symbol.encode())) for symbol in symbols]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def _piece_bytes(sp, piece: int) -> bytes:
    """The text of a piece of sentencepiece, by its number."""
    text = sp.id_to_piece(piece)
    return bytes([int(text[3:5], 16)]) if sp.is_byte(piece) else text.replace("\u2581", " ").encode()


def _visible(piece: str) -> str:
    """A piece as the dictionary has it: whitespace, which dict.txt cannot hold, as bytes (``<0x0A>``)."""
    return "".join(
        "".join(f"<0x{byte:02X}>" for byte in char.encode()) if char.isspace() else char for char in piece
    )
