"""Frozen weights as torchao's affine operators, and a model traced as its own code is written.

What tracing.py does for XNNPACK helps no other backend: Vulkan and CoreML have patterns of their own for norms and
rotary embeddings, look for torchao's operators, and lower a model in one delegate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qat_edge_exporters.executorch.graph.tracing import Decoder

OPS = torch.ops.torchao
INT8 = (-128, 127)


class AffineWeight(nn.Module):
    """Codes (out, in) and scales (out, in // group) of a frozen weight, dequantized by one operator."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: IntxUnpackedToInt8Tensor) -> None:
        super().__init__()
        self.bits = int(str(weight.target_dtype).removeprefix("torch.int"))
        self.block = [1, int(weight.block_size[1])]
        self.register_buffer("codes", weight.qdata)
        self.register_buffer("scales", weight.scale)
        self.register_buffer("zeros", torch.zeros_like(weight.scale, dtype=torch.int8))

    def matrix(self) -> Tensor:
        """The weight in float, (out, in)."""
        lowest = -(1 << (self.bits - 1))
        matrix: Tensor = OPS.dequantize_affine(
            self.codes, self.block, self.scales, self.zeros, torch.int8, lowest, -lowest - 1
        )
        return matrix


class AffineLinear(AffineWeight):
    """A frozen linear layer; rounds: whether its input is rounded to int8 per token, as in training."""

    def __init__(self, weight: IntxUnpackedToInt8Tensor, bias: Tensor | None, rounds: bool) -> None:
        super().__init__(weight)
        self.rounds = rounds
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(_rounded(x) if self.rounds else x, self.matrix(), self.bias)


class AffineEmbedding(AffineWeight):
    """A frozen embedding, whole rows of which are looked up."""

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.matrix())


class PlainDecoder(Decoder):
    """What the runner calls, without rewritten idioms."""

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        positions = (input_pos + torch.arange(tokens.shape[1])).unsqueeze(0)
        self.cache.begin(self.start(input_pos, tokens.shape[1]), positions)
        logits: Tensor = self.model(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1).logits
        return logits

    def start(self, input_pos: Tensor, length: Any) -> Any:
        """The first token's position as a number, for a cache that needs one."""
        first: Any = input_pos[0].item()
        torch._check(first >= 0)
        torch._check(first + length <= self.cache.length)
        return first


def untie(model: Any) -> None:
    """Give the embedding a table of its own, so that two names in the graph are two weights."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is head.weight:
        embedding.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)


def _rounded(x: Tensor) -> Tensor:
    """The input as int8 says it, by the operators that the frozen checkpoint itself computes with."""
    block = [1] * (x.dim() - 1) + [x.shape[-1]]
    scale, zero = OPS.choose_qparams_affine(x, "ASYMMETRIC", block, torch.int8, *INT8, None, None, torch.int8)
    codes = OPS.quantize_affine(x, block, scale, zero, torch.int8, *INT8)
    rounded: Tensor = OPS.dequantize_affine(codes, block, scale, zero, torch.int8, *INT8)
    return rounded
