"""Inference with the products of weights in half precision, and everything between them in float32.

The linear layers hold nearly all weights and take nearly all time. What is small or delicate stays as it is: the
residual stream, of whose differences the side network lives, LayerNorms, attention, the memory's search and reading,
and the softmax over the vocabulary.
"""

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn


def compute_products_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every linear layer of a model in float32 multiply in ``dtype``; it still takes and gives float32.

    The weights are converted, once; checkpoints can be loaded into the model before or after. ``torch.autocast`` would
    convert those of a frozen backbone again in every call, which costs more than it gains where few tokens are read.

    Args:
        model: of which no gradients are wanted; changed in place. To be called once.
        dtype: ``torch.bfloat16``; the narrow range of ``torch.float16`` would be that of all activations.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
            module.register_forward_pre_hook(_round_input)
            module.register_forward_hook(_float_output)
        elif isinstance(module, nn.Embedding):  # a table shared with the output projection was converted with it
            module.register_forward_hook(_float_output)
        elif isinstance(module, MultiheadAttention):  # stock attention else takes weights from its projections
            module._set_skip_embed_dim_check()  # noqa: SLF001  (fairseq has no public switch)


def _round_input(module: nn.Linear, inputs):
    # Rows that lie one behind the other are one product; of a transposed batch PyTorch makes one for each row.
    return (inputs[0].to(module.weight.dtype, memory_format=torch.contiguous_format),)


def _float_output(module: nn.Module, inputs, output: Tensor) -> Tensor:
    return output.float()
