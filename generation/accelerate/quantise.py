"""Linear layers in 4 bits: NF4 (Dettmers et al., 2023, arXiv:2305.14314) through bitsandbytes.

The loaders of diffusers and transformers know bitsandbytes too, but that of transformers leaves a fifth of T5 in 16
bits (1.5 GB more), and that of diffusers refuses to work without a GPU, where tests could not see it.
"""

from __future__ import annotations

import torch
from torch import nn


def quantise_linears(model: nn.Module, device: str) -> None:
    """Replace every linear layer in ``model`` by an NF4 one on ``device``, one after the other.

    A weight takes four bits, and each 64 weights an eight-bit scale. Arithmetic is in the dtype that the layer had.
    Other layers stay as they are. Raises ImportError without bitsandbytes.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise ImportError(f"4-bit weights: {error}: scripts/install.sh gpu") from error
    linears = [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear]
    while linears:
        name, layer = linears.pop()  # popped, so that its 16-bit weights are freed when it is replaced
        dtype = layer.weight.dtype
        with torch.device("meta"):
            small = Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_storage=dtype
            )
        # quant_storage is the layer's dtype, because T5 casts its activations to the dtype of its weights.
        weight = Params4bit(layer.weight.data, quant_type="nf4", quant_storage=dtype, module=small)
        small.weight = weight.to(device)  # type: ignore[misc]  # quantises
        small.bias = None if layer.bias is None else nn.Parameter(layer.bias.data.to(device), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, small)
        del layer
