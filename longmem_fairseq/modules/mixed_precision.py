"""Inference with the products of weights in half precision, and everything between them in float32.

The linear layers hold nearly all weights and take nearly all time. What is small or delicate stays as it is: the
residual stream, whose differences feed the side network, LayerNorms, attention, the memory's search and reading,
and the softmax over the vocabulary.
"""

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn


def compute_products_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every linear layer of a float32 model multiply in another precision; inputs and outputs stay float32.

    The weights are converted, once; checkpoints can be loaded into the model before or after. ``torch.autocast`` would
    convert those of a frozen backbone again in every call, which costs more than it gains where few tokens are read.

    Args:
        model: Model for inference, or frozen part of one, changed in place; parts that compute in this precision
            already stay as they are.
        dtype: Precision of the products, ``torch.bfloat16``; activations would not fit the range of ``torch.float16``.
    """
    for module in model.modules():
        if _round_input in module._forward_pre_hooks.values():  # noqa: SLF001  (torch has no public list of hooks)
            continue
        if isinstance(module, nn.Linear):
            module.to(dtype)
            module.register_forward_pre_hook(_round_input)
            module.register_forward_hook(_float_output)
        elif isinstance(module, nn.Embedding):  # a table shared with the output projection was converted with it
            module.register_forward_hook(_float_output)
        elif isinstance(module, MultiheadAttention):  # stock attention otherwise takes weights from its projections
            module._set_skip_embed_dim_check()  # noqa: SLF001  (fairseq has no public switch)


def _round_input(module: nn.Linear, inputs):
    # Contiguous rows are one product; for a transposed batch PyTorch computes one for each row.
    return (inputs[0].to(module.weight.dtype, memory_format=torch.contiguous_format),)


def _float_output(module: nn.Module, inputs, output: Tensor) -> Tensor:
    return output.float()
