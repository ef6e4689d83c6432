"""Frozen weights as the operators that XNNPACK and ExecuTorch's quantized kernels know.

Replaces the layers of a loaded checkpoint before it is traced. Codes and scales are stored as they are: nothing is
rounded here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import executorch.kernels.quantized  # noqa: F401  registers embedding_byte and embedding_4bit
import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qat_edge.errors import ExportError
from qat_edge.quant.frozen_adapters import Adapter
from qat_edge.quant.packing import pack_int4
from qat_edge_exporters.executorch import compat  # noqa: F401  registers torch.ops.quantized_decomposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPS = torch.ops.quantized_decomposed
INT8 = (-128, 127)
INT4 = (-8, 7)


class InputQuantizer:
    """Rounds a linear layer's input to int8 per token, once for all layers that read the same tensor."""

    def __init__(self) -> None:
        self._input: Tensor | None = None
        self._rounded: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` (..., in) after quantization and dequantization."""
        # By identity: q_proj, k_proj and v_proj are called one after the other with the same tensor.
        if self._input is not x or self._rounded is None:
            scale, zero = OPS.choose_qparams_per_token_asymmetric(x, torch.int8)
            codes = OPS.quantize_per_token(x, scale, zero, *INT8, torch.int8)
            self._rounded = OPS.dequantize_per_token(codes, scale, zero, *INT8, torch.int8, torch.float32)
            self._input = x
        return self._rounded


class QuantizedLinear(nn.Module):
    """Frozen linear layer as quantized_decomposed operators, which unlike torchao's are traced as one node each.

    XNNPACK recognizes the pattern, rounds inputs per token in its own kernel and multiplies integers.
    """

    def __init__(self, weight: IntxUnpackedToInt8Tensor, bias: Tensor | None, quantize_input: InputQuantizer) -> None:
        super().__init__()
        self.quantize_input = quantize_input
        self.bits = bits_of(weight)
        self.group_size = int(weight.block_size[1])
        # XNNPACK has int4 weights by group, and int8 weights per channel.
        scales = weight.scale if self.bits == 4 else weight.scale.flatten()
        self.bias: Tensor | None
        self.register_buffer("codes", weight.qdata)  # (out, in)
        self.register_buffer("scales", scales)  # (out, in // group), or (out,) if per channel
        self.register_buffer("zeros", torch.zeros_like(scales, dtype=torch.int8))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.bits == 4:
            weight = OPS.dequantize_per_channel_group(
                self.codes, self.scales, self.zeros, *INT4, torch.int8, self.group_size, torch.float32
            )
        else:
            weight = OPS.dequantize_per_channel(self.codes, self.scales, self.zeros, 0, *INT8, torch.int8)
        return nn.functional.linear(self.quantize_input(x), weight, self.bias)


def bits_of(weight: IntxUnpackedToInt8Tensor) -> int:
    """Return the bits of a frozen weight's codes, from its type such as torch.int4."""
    return int(str(weight.target_dtype).removeprefix("torch.int"))


class QuantizedEmbedding(nn.Module):
    """Frozen embedding as the one operator that ExecuTorch's quantized kernels have for it.

    int4 codes are stored in pairs, each as code + 8, the first one in the high nibble.
    https://github.com/pytorch/executorch/blob/v1.4.1/kernels/quantized/cpu/embeddingxb.cpp

    Args:
        weight: codes and scales, (tokens, width).
        as_head: store pairs as XNNPACK stores those of a head, the first one in the low nibble, so that a tied table
            is in the file once. The columns that are looked up are then put back in order.
    """

    def __init__(self, weight: IntxUnpackedToInt8Tensor, as_head: bool = False) -> None:
        super().__init__()
        self.bits = bits_of(weight)
        codes, scales = weight.qdata, weight.scale.flatten()
        self.width = codes.shape[1]
        order = None
        # The 4-bit operator takes scales by group, the 8-bit one a scale for each row.
        if self.bits == 4:
            codes = torch.from_numpy(pack_int4(codes.numpy(), high_first=not as_head))
            scales = weight.scale.to(torch.bfloat16)  # exact: frozen scales are bfloat16 numbers
            order = _swapped_pairs(self.width) if as_head else None
        self.order: Tensor | None
        self.register_buffer("order", order)  # (width,)
        self.register_buffer("codes", codes)  # (tokens, width), or (tokens, width // 2) in pairs
        self.register_buffer("scales", scales)  # (tokens,), or (tokens, groups) in bfloat16

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self._rows(tokens)
        return rows if self.order is None else rows.index_select(-1, self.order)

    def _rows(self, tokens: Tensor) -> Tensor:
        codes, scales = self.get_buffer("codes"), self.get_buffer("scales")
        if self.bits == 4:
            return OPS.embedding_4bit.dtype(codes, scales, None, *INT4, tokens, dtype=torch.float32)
        return OPS.embedding_byte(codes, scales, None, *INT8, tokens)


class PlainEmbedding(QuantizedEmbedding):
    """The same rows and numbers without the quantized kernels: codes are looked up, then multiplied by their scale."""

    def __init__(self, weight: IntxUnpackedToInt8Tensor, as_head: bool = False) -> None:
        super().__init__(weight, as_head)
        if self.bits == 8:
            self.register_buffer("scales", weight.scale)  # (tokens, 1)

    def _rows(self, tokens: Tensor) -> Tensor:
        codes, scales = (nn.functional.embedding(tokens, self.get_buffer(part)) for part in ("codes", "scales"))
        codes, scales = codes.to(torch.float32), scales.to(torch.float32)
        if self.bits == 8:
            return codes * scales

        # Each group of columns times its scale, without a dimension for the batch, which is always 1.
        columns = _unpack_pairs(codes)
        groups, width = scales.shape[-1], codes.shape[-1] * 2
        return (columns.view(1, -1, groups, width // groups) * scales.unsqueeze(-1)).view(1, -1, width)


def _unpack_pairs(packed: Tensor) -> Tensor:
    """Unpack pairs, high nibble first, from bytes as float32 (..., columns // 2), to codes (..., columns // 2, 2).

    In float arithmetic, because ATen's portable kernels and XNNPACK have no shifts.
    """
    high = torch.floor(packed / 16)
    return torch.stack((high, packed - high * 16), dim=-1) - 8


def _swapped_pairs(width: int) -> Tensor:
    """Return the column order 1, 0, 3, 2, ..."""
    return torch.arange(width).view(-1, 2).flip(1).flatten()


class LowRankAdapter(nn.Module):
    """Adapter that was not merged: x (..., in) -> s B (A x) (..., out), in float."""

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.register_buffer("down", adapter.down)
        self.register_buffer("up", adapter.up)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up)


def prepare(model: PreTrainedModel, adapters: Mapping[str, Adapter], portable: bool = False) -> dict[str, str]:
    """Make `model` exportable in place, with its adapters next to its weights.

    Args:
        model: a frozen or float decoder.
        adapters: by the name of their module.
        portable: use ATen operators only.

    Returns:
        Names of the frozen weights, in order: the buffer's -> the module's. Empty for a float model.

    Raises:
        ExportError: an adapter fits no layer, or an embedding does more than look up rows.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = _have_equal_codes(embedding.weight, head.weight)
    if embedding.weight is head.weight:
        # A delegate owns the head's table, and the embedding is outside of it.
        embedding.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)

    names = quantize_modules(model, portable, tied)

    # By a hook, so that the adapter reads the layer's input before it is rounded.
    for name, adapter in adapters.items():
        module = _adapted_layer(model, name, adapter)
        module.add_module("adapter", LowRankAdapter(adapter))
        module.register_forward_hook(_add_adapter)
    return names


def _have_equal_codes(embedding: Tensor, head: Tensor) -> bool:
    """Return whether both tables were frozen, and to the same codes."""
    tables = [table for table in (embedding, head) if isinstance(table, IntxUnpackedToInt8Tensor)]
    return len(tables) == 2 and torch.equal(tables[0].qdata, tables[1].qdata)


def _adapted_layer(model: nn.Module, name: str, adapter: Adapter) -> nn.Module:
    """Return the layer that an adapter belongs to."""
    try:
        module: Any = model.get_submodule(name)
    except AttributeError as error:
        raise ExportError(f"An adapter belongs to {name}, a layer that this model does not have.") from error
    if not isinstance(module, nn.Linear | QuantizedLinear):
        raise ExportError(f"An adapter belongs to {name}, which is no linear layer.")

    weight: Tensor = module.get_buffer("codes") if isinstance(module, QuantizedLinear) else module.weight
    adapter_shape = (adapter.up.shape[0], adapter.down.shape[1])
    if tuple(weight.shape) != adapter_shape:
        raise ExportError(f"The adapter of {name} is for a weight of {adapter_shape}, not {tuple(weight.shape)}.")
    return module


def _add_adapter(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    added: Tensor = module.get_submodule("adapter")(args[0])
    return output + added


def quantize_modules(model: nn.Module, portable: bool = False, tied: bool = False) -> dict[str, str]:
    """Replace the frozen layers of `model`, in place, by ones whose operators export.

    Args:
        model: a frozen checkpoint.
        portable: use ATen operators for embeddings.
        tied: the embedding's codes are the head's as well.

    Returns:
        Names of the frozen weights, in order: the buffer's -> the module's.

    Raises:
        ExportError: an embedding does more than look up rows.
    """
    found = {}
    quantize_input = InputQuantizer()  # one for all layers: it keeps the last input only
    for layer in frozen_layers(model):
        if isinstance(layer.module, nn.Embedding):
            # Some architectures scale the rows in the embedding's own class.
            embed = PlainEmbedding if portable else QuantizedEmbedding
            table = embed(layer.weight, tied)
            table.register_forward_hook(scaled_rows(layer.module))
            model.set_submodule(layer.name, table)
        else:
            model.set_submodule(layer.name, QuantizedLinear(layer.weight, layer.module.bias, quantize_input))
        # The traced module holds the model as its attribute `model`.
        found[f"model.{layer.name}.codes"] = layer.name
    return found


class FrozenLayer(NamedTuple):
    """A linear layer or embedding of a frozen checkpoint."""

    name: str
    module: Any  # nn.Linear, or nn.Embedding and subclasses of it
    weight: IntxUnpackedToInt8Tensor


def frozen_layers(model: nn.Module) -> list[FrozenLayer]:
    """Return all layers with a frozen weight, in the model's order."""
    layers = [FrozenLayer(name, module, getattr(module, "weight", None)) for name, module in model.named_modules()]
    return [layer for layer in layers if isinstance(layer.weight, IntxUnpackedToInt8Tensor)]


def scaled_rows(module: nn.Embedding) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Return a forward hook for the replacement of `module` that scales rows as the model's own class does.

    Raises:
        ExportError: the class does something else with the rows.
    """
    scale = getattr(module, "scalar_embed_scale", None)
    if scale is None and type(module).forward is not nn.Embedding.forward:
        raise ExportError(
            f"{type(module).__name__} does more than look up rows, and executorch export does not know what."
        )
    return lambda replaced, args, rows: rows if scale is None else rows * scale
