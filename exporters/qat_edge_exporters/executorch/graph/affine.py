"""Frozen weights as torchao's affine operators, and a decoder traced without rewritten calls.

The rewrites that help XNNPACK help no other backend: Vulkan and CoreML have their own patterns for norms and rotary
embeddings, look for torchao's operators, and lower a model into one delegate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qat_edge_exporters.executorch import compat
from qat_edge_exporters.executorch.graph.attention import Position
from qat_edge_exporters.executorch.graph.quantized_modules import INT8, bits_of
from qat_edge_exporters.executorch.graph.tracing import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPS = torch.ops.torchao


class AffineWeight(nn.Module):
    """Codes (out, in) and scales (out, in // group) of a frozen weight, dequantized by one operator."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: IntxUnpackedToInt8Tensor) -> None:
        super().__init__()
        self.bits = bits_of(weight)
        self.block = [1, int(weight.block_size[1])]
        self.register_buffer("codes", weight.qdata)
        self.register_buffer("scales", weight.scale)
        self.register_buffer("zeros", torch.zeros_like(weight.scale, dtype=torch.int8))

    def matrix(self) -> Tensor:
        """Return the weight in float, (out, in)."""
        # The range of int4 in int8 storage: -8 to 7.
        lowest = -(1 << (self.bits - 1))
        matrix: Tensor = OPS.dequantize_affine(
            self.codes, self.block, self.scales, self.zeros, torch.int8, lowest, -lowest - 1
        )
        return matrix


class AffineLinear(AffineWeight):
    """Frozen linear layer.

    Args:
        weight: codes and scales, (out, in).
        bias: (out,).
        rounds: whether the input is rounded to int8 per token, as in training.
    """

    def __init__(self, weight: IntxUnpackedToInt8Tensor, bias: Tensor | None, rounds: bool) -> None:
        super().__init__(weight)
        self.rounds = rounds
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(_round_per_token(x) if self.rounds else x, self.matrix(), self.bias)


class AffineEmbedding(AffineWeight):
    """Frozen embedding: the whole table is dequantized, and rows of it are looked up."""

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.matrix())


class PlainDecoder(Decoder):
    """The function that the LLM runner calls, without rewritten calls."""

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        positions = (input_pos + torch.arange(tokens.shape[1])).unsqueeze(0)
        self.cache.begin(self.start(input_pos, tokens.shape[1]), positions)
        logits: Tensor = self.model(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1).logits
        return logits

    def start(self, input_pos: Tensor, length: Position) -> Position:
        """Return the first token's position as a number, for a cache that needs one."""
        first: Any = input_pos[0].item()
        compat.constrain(first >= 0)
        compat.constrain(first + length <= self.cache.length)
        return first


def untie(model: PreTrainedModel) -> None:
    """Copy a table that embedding and head share, so that two names in the graph are two weights."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is head.weight:
        embedding.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)


def _round_per_token(x: Tensor) -> Tensor:
    """Round the input to int8 by the operators that the frozen checkpoint itself computes with."""
    # One scale and zero point for each token: a block is one token's channels.
    block = [1] * (x.dim() - 1) + [x.shape[-1]]
    scale, zero = OPS.choose_qparams_affine(x, "ASYMMETRIC", block, torch.int8, *INT8, None, None, torch.int8)
    codes = OPS.quantize_affine(x, block, scale, zero, torch.int8, *INT8)
    rounded: Tensor = OPS.dequantize_affine(codes, block, scale, zero, torch.int8, *INT8)
    return rounded
