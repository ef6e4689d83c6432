"""What a runtime rounds otherwise than the frozen checkpoint in torch, done in torch: no difference of it is a fault.

ONNX Runtime on x86 rounds the input of a layer symmetrically per token and block of MatMulNBits, elsewhere per token as
training does. A .pte exported with --kv-cache int8 rounds queries, keys and values per token and head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers what rounds keys and values
from torch import Tensor, nn
from transformers import AttentionInterface

from qat_edge.lazy import resolve
from qat_edge.quant import numerics
from qat_edge.run import read_manifest
from qat_edge_exporters import READERS

X86 = ("x86_64", "amd64")
BLOCKS = "inputs rounded per block, as ONNX Runtime does on x86"
CACHE = "keys and values in int8"
SDPA = "sdpa"  # the attention that transformers takes where nothing else is asked for


@dataclass(frozen=True)
class Rounding:
    """name: of the step. blocks: features that share a scale in the input of a module; none: per token, as trained.

    int8_cache: queries, keys and values are rounded. machines: those on which it is so; empty for all.
    """

    name: str = "as trained"
    blocks: Mapping[str, int] = field(default_factory=dict)
    int8_cache: bool = False
    machines: tuple[str, ...] = ()

    def applies(self, machine: str) -> bool:
        """Whether it is so on a machine of that architecture."""
        return not self.machines or machine.lower() in self.machines


def of_artifact(folder: Path, target: str) -> Rounding | None:
    """What the runtime of an artifact rounds otherwise; None where it computes what was frozen."""
    if target == "onnx":
        weights = resolve(READERS, target, "--target")(folder).weights
        return Rounding(BLOCKS, {name: w.block for name, w in weights.items() if w.block}, machines=X86)
    if read_manifest(folder)["options"].get("kv_cache") == "int8":
        return Rounding(CACHE, int8_cache=True)
    return None


@contextmanager
def rounding_as(model: Any, names: Iterable[str], rounding: Rounding) -> Iterator[Any]:
    """Let the inputs of the named modules, and what attention reads, be rounded until the block ends."""
    with ExitStack() as stack:
        for name in names:
            block = rounding.blocks.get(name)
            hook = numerics.round_input if block is None else _block_rounder(block)
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        if rounding.int8_cache:
            stack.enter_context(_rounding_attention())
        yield model


def _block_rounder(block: int) -> Any:
    """A forward pre-hook: int8, symmetric, s = max|x| / 127 per token and block (MLAS, SQNBitGemm CompInt8)."""

    def round_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].float()
        blocks = nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
        largest = blocks.abs().amax(dim=-1, keepdim=True)
        codes = (blocks * (127 / largest).nan_to_num(posinf=0.0)).round()
        return ((codes * (largest / 127)).flatten(-2)[..., : x.shape[-1]], *args[1:])

    return round_input


@contextmanager
def _rounding_attention() -> Iterator[None]:
    attend = AttentionInterface()[SDPA]

    def rounded(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **extras: Any) -> Any:
        return attend(module, _per_head(query), _per_head(key), _per_head(value), *args, **extras)

    AttentionInterface.register(SDPA, rounded)
    try:
        yield
    finally:
        AttentionInterface.register(SDPA, attend)


def _per_head(x: Tensor) -> Tensor:
    """(batch, heads, tokens, D) as int8 holds it, one asymmetric scale and zero point per token and head."""
    operators, low, high = torch.ops.quantized_decomposed, *numerics.code_range(8)
    scales, zeros = operators.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = operators.quantize_per_token(x, scales, zeros, low, high, torch.int8)
    found: Tensor = operators.dequantize_per_token(codes, scales, zeros, low, high, torch.int8, x.dtype)
    return found
