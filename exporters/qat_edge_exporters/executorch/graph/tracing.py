"""A model as one exported program: frozen weights as XNNPACK's operators, idioms rewritten into ones it takes.

A part of the graph that XNNPACK does not take ends a delegate, and each delegate costs time in lowering and at
every token. Rewritten while tracing, each to the same function but for float rounding (tests hold them equal):

    x.mean(-1, keepdim=True)    x @ (1/D, ..., 1/D)          RMSNorm would end five delegates a layer
    the same, + epsilon         the product's bias           one operator fewer in each norm
    rotate_half(x)              x @ R, of zeros and ±1        slices of a dynamic shape are not taken
    x.view(1, S, heads, -1)     x.view(1, -1, heads, width)   nor is a shape with a symbol in it
    gelu(x, "tanh")             0.5 x (1 + tanh(...))         XNNPACK takes it for the exact one, 5e-4 off
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import pi, prod, sqrt
from typing import Any

import executorch.kernels.quantized  # noqa: F401  registers embedding_byte and embedding_4bit
import torch
import torch.ao.quantization.fx._decomposed
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  the same, for tracing
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode
from torchao.quantization import IntxUnpackedToInt8Tensor

from qat_edge.errors import ExportError
from qat_edge_exporters.checkpoint import Adapter
from qat_edge_exporters.executorch.graph.attention import Int8Cache, KeyValueCache, attention_through
from qat_edge_exporters.executorch.graph.portable_attention import PortableCache

OPS = torch.ops.quantized_decomposed
INT8 = (-128, 127)
INT4 = (-8, 7)


class RoundedInput:
    """The int8 form of a linear layer's input, made once for the neighbours that read the same tensor."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor] | None = None  # what was rounded, and its rounded form

    def __call__(self, x: Tensor) -> Tensor:
        if self.last is None or self.last[0] is not x:
            scale, zero = OPS.choose_qparams_per_token_asymmetric(x, torch.int8)
            codes = OPS.quantize_per_token(x, scale, zero, *INT8, torch.int8)
            rounded = OPS.dequantize_per_token(codes, scale, zero, *INT8, torch.int8, torch.float32)
            self.last = (x, rounded)
        return self.last[1]


class QuantizedLinear(nn.Module):
    """A frozen linear layer as quantized_decomposed operators, which unlike torchao's trace as one node each.

    XNNPACK reads the pattern, rounds inputs per token by its own kernel and multiplies integers.
    """

    def __init__(self, weight: IntxUnpackedToInt8Tensor, bias: Tensor | None, rounded: RoundedInput) -> None:
        super().__init__()
        self.rounded = rounded
        self.bits = _bits(weight)
        self.group_size = int(weight.block_size[1])
        scales = weight.scale if self.bits == 4 else weight.scale.flatten()
        self.bias: Tensor | None
        self.register_buffer("codes", weight.qdata)  # (out, in)
        self.register_buffer("scales", scales)  # (out, in // group), or (out,) where per channel
        self.register_buffer("zeros", torch.zeros_like(scales, dtype=torch.int8))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.bits == 4:
            weight = OPS.dequantize_per_channel_group(
                self.codes, self.scales, self.zeros, *INT4, torch.int8, self.group_size, torch.float32
            )
        else:
            weight = OPS.dequantize_per_channel(self.codes, self.scales, self.zeros, 0, *INT8, torch.int8)
        return nn.functional.linear(self.rounded(x), weight, self.bias)


def _bits(weight: IntxUnpackedToInt8Tensor) -> int:
    return int(str(weight.target_dtype).removeprefix("torch.int"))


class QuantizedEmbedding(nn.Module):
    """A frozen embedding as the one operator that ExecuTorch's quantized kernels have for it.

    int4 codes lie in pairs, the first in the high nibble, each as code + 8.
    https://github.com/pytorch/executorch/blob/v1.4.1/kernels/quantized/cpu/embeddingxb.cpp

    as_head: pairs lie as XNNPACK has those of a head, the first in the low nibble, so that a tied table is stored once;
    what is looked up is put in order again.
    """

    def __init__(self, weight: IntxUnpackedToInt8Tensor, as_head: bool = False) -> None:
        super().__init__()
        self.bits = _bits(weight)
        codes, scales = weight.qdata, weight.scale.flatten()
        self.width = codes.shape[1]
        order = None
        if self.bits == 4:
            high, low = (codes + 8).to(torch.uint8).view(len(codes), -1, 2).unbind(-1)
            if as_head:
                high, low = low, high
                order = torch.arange(self.width).view(-1, 2).flip(1).flatten()
            codes, scales = high << 4 | low, weight.scale.to(torch.bfloat16)
        self.order: Tensor | None
        self.register_buffer("order", order)  # (width,)
        self.register_buffer("codes", codes)  # (tokens, width), or half as wide in pairs
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
    """The same rows and numbers without the quantized kernels: codes looked up, then multiplied by their scale."""

    def __init__(self, weight: IntxUnpackedToInt8Tensor, as_head: bool = False) -> None:
        super().__init__(weight, as_head)
        if self.bits == 8:
            self.register_buffer("scales", weight.scale)  # (tokens, 1)

    def _rows(self, tokens: Tensor) -> Tensor:
        codes, scales = (nn.functional.embedding(tokens, self.get_buffer(part)) for part in ("codes", "scales"))
        codes, scales = codes.to(torch.float32), scales.to(torch.float32)
        if self.bits == 8:
            return codes * scales
        first = torch.floor(codes / 16)
        pairs = torch.stack((first, codes - first * 16), dim=-1) - 8
        groups, width = scales.shape[-1], codes.shape[-1] * 2
        return (pairs.view(1, -1, groups, width // groups) * scales.unsqueeze(-1)).view(1, -1, width)


class LowRank(nn.Module):
    """An adapter that was not merged: x (..., in) -> s B (A x) (..., out), in float."""

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.register_buffer("down", adapter.down)
        self.register_buffer("up", adapter.up)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up)


class Decoder(nn.Module):
    """What the runner calls: tokens (1, S) and the first one's position (1,) -> logits of the last token (1, 1, V)."""

    def __init__(self, model: Any, cache: KeyValueCache) -> None:
        super().__init__()
        self.model = model
        self.cache = cache
        self.constants = nn.ParameterDict()  # of the rewritten idioms, filled by the first run

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        start: Any = input_pos[0].item()
        torch._check(start >= 0)
        torch._check(start + tokens.shape[1] <= self.cache.length)
        positions = (input_pos + torch.arange(tokens.shape[1])).unsqueeze(0)
        self.cache.begin(start, positions)
        with Idioms(self.constants), _rotations(self.model, self.constants):
            return self.model(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1).logits


class Idioms(TorchFunctionMode):
    """Calls rewritten while a model is traced; `constants` holds the matrices that this needs."""

    def __init__(self, constants: nn.ParameterDict) -> None:
        super().__init__()
        self.constants = constants
        self.unsqueezed: dict[tuple[int, Any], tuple[Tensor, Tensor]] = {}
        self.means: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the mean, and of what

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.mean, torch.mean) and _is_row_mean(args, kwargs):
            mean = self.mean(args[0])
            self.means[id(mean)] = mean, args[0]
            return mean
        if func in (torch.Tensor.add, torch.Tensor.__add__) and id(args[0]) in self.means and type(args[1]) is float:
            return self.mean(self.means[id(args[0])][1], args[1])
        if func is nn.functional.gelu and kwargs.get("approximate") == "tanh":
            return _gelu_tanh(args[0])
        if func in (torch.Tensor.view, torch.Tensor.reshape) and not kwargs:
            return func(args[0], _without_symbol(args[0].shape, args[1:]))
        if func is torch.Tensor.unsqueeze and not kwargs:  # the same cosines and sines in every layer
            key = (id(args[0]), args[1])
            if key not in self.unsqueezed:
                self.unsqueezed[key] = (args[0], _unsqueeze(*args))
            return self.unsqueezed[key][1]
        return func(*args, **kwargs)

    def mean(self, x: Tensor, offset: float | None = None) -> Tensor:
        """Of the channels of each token, plus a norm's epsilon, as one product."""
        width = x.shape[-1]
        row = self._constant(f"mean_{width}", lambda: torch.full((1, width), 1 / width))
        bias = None if offset is None else self._constant(f"offset_{offset}", lambda: torch.tensor([offset]))
        return nn.functional.linear(x, row, bias)

    def _constant(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        name = name.replace(".", "_")  # no dot may stand in a parameter's name
        if name not in self.constants:
            self.constants[name] = nn.Parameter(make(), requires_grad=False)
        return self.constants[name]


def prepare(model: Any, adapters: Mapping[str, Adapter], portable: bool = False) -> dict[str, str]:
    """Make `model` exportable in place, its adapters beside its weights.

    Returns names of frozen weights: the buffer's -> the module's, in order; none where the model is float.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = _hold_the_same(embedding.weight, head.weight)
    if embedding.weight is head.weight:  # one delegate owns the head's, and the embedding lies outside of it
        embedding.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    names = quantize_modules(model, portable, tied)
    for name, adapter in adapters.items():
        module = _adapted(model, name, adapter)
        module.add_module("adapter", LowRank(adapter))
        module.register_forward_hook(_plus_adapter)
    return names


def _hold_the_same(*tables: Tensor) -> bool:
    """Whether embedding and head were frozen to the same codes."""
    codes = [table.qdata for table in tables if isinstance(table, IntxUnpackedToInt8Tensor)]
    return len(codes) == len(tables) and torch.equal(*codes)


def _adapted(model: nn.Module, name: str, adapter: Adapter) -> nn.Module:
    """The layer that an adapter belongs to."""
    try:
        module: Any = model.get_submodule(name)
    except AttributeError as error:
        raise ExportError(f"An adapter belongs to {name}, a layer that this model does not have.") from error
    if not isinstance(module, nn.Linear | QuantizedLinear):
        raise ExportError(f"An adapter belongs to {name}, which is no linear layer.")
    weight: Tensor = module.get_buffer("codes") if isinstance(module, QuantizedLinear) else module.weight
    shape = tuple(weight.shape)
    if shape != (adapter.up.shape[0], adapter.down.shape[1]):
        raise ExportError(f"The adapter of {name} is for another shape than its weight's, {shape}.")
    return module


def _plus_adapter(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    added: Tensor = module.get_submodule("adapter")(args[0])
    return output + added


def quantize_modules(model: nn.Module, portable: bool = False, tied: bool = False) -> dict[str, str]:
    """Put the frozen weights of `model` behind operators that export; the buffer's name -> the module's, in order.

    tied: the embedding's table is the head's as well.
    """
    found = {}
    rounded = RoundedInput()
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, IntxUnpackedToInt8Tensor):
            continue
        if isinstance(module, nn.Embedding):
            table = PlainEmbedding(weight, tied) if portable else QuantizedEmbedding(weight, tied)
            table.register_forward_hook(scaled_rows(module))
            model.set_submodule(name, table)
        else:
            model.set_submodule(name, QuantizedLinear(weight, module.bias, rounded))
        found[f"model.{name}.codes"] = name
    return found


def scaled_rows(module: nn.Embedding) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """What a hook has to make of the rows that were looked up, as the model's own class does."""
    scale = getattr(module, "scalar_embed_scale", None)
    if scale is None and type(module).forward is not nn.Embedding.forward:
        raise ExportError(
            f"{type(module).__name__} does more than look up rows, and executorch export cannot tell what."
        )
    return lambda replaced, args, rows: rows if scale is None else rows * scale


def choose_cache(config: Any, context_length: int, portable: bool = False, kind: str = "float32") -> KeyValueCache:
    """The cache for a model of `config`, for as many tokens; portable: of ATen's operators only; kind: float32 or int8.

    Raises:
        ExportError: no operator computes this model's attention over an int8 cache.
    """
    capped = getattr(config, "attn_logit_softcapping", None) is not None  # custom_sdpa cannot cap scores
    if kind == "float32":
        return PortableCache(context_length) if portable or capped else KeyValueCache(context_length)
    if portable or capped:
        why = f"{config.model_type} caps its attention scores" if capped else "ATen has no such operator"
        raise ExportError(
            f"--kv-cache {kind}: {why}, and only ExecuTorch's attention operator, which cannot cap them, reads a cache "
            "in int8. Leave the flag out."
        )
    return Int8Cache(context_length)


def trace(decoder: Decoder) -> ExportedProgram:
    """The exported program of a model that was made exportable, keys and values kept in its cache.

    Raises:
        ExportError: attention that cannot be put through ExecuTorch's, or code that cannot be traced.
    """
    model, cache = decoder.eval().model, decoder.cache
    tokens, start = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with attention_through(cache, model.config), traced(model):
        with _without_tables(model):
            decoder(tokens[:, :1], start)  # makes the cache's buffers and the constants before they are traced
        check_attention(model, len(cache.layers))
        lengths = {1: Dim("length", min=1, max=cache.length)}
        return torch.export.export(decoder, (tokens, start), dynamic_shapes=(lengths, None), strict=False)


def check_attention(model: Any, found: int) -> None:
    """Refuse a model of which only `found` layers attend in the way that can be replaced.

    Raises:
        ExportError: not all do.
    """
    if found != model.config.num_hidden_layers:
        raise ExportError(
            f"{type(model).__name__}: {found} of {model.config.num_hidden_layers} layers attend "
            "through transformers' AttentionInterface; executorch export needs all of them to."
        )


@contextmanager
def traced(model: nn.Module) -> Iterator[None]:
    """Within the block, nothing is warned of, and what fails is that this model cannot be traced.

    Raises:
        ExportError: something failed.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the operators' own use of torch's deprecated calls
        try:
            yield
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ExportError(
                f"{type(model).__name__} cannot be traced for executorch: {str(error).splitlines()[0]}"
            ) from error


@contextmanager
def _without_tables(model: Any) -> Iterator[None]:
    """Within the block, a model knows one token and answers with its last states.

    Computing one token in Python puts the whole table and head in float: that would be an export's peak of memory.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, QuantizedEmbedding):
        model.set_input_embeddings(nn.Embedding(1, embedding.width))
    model.set_output_embeddings(nn.Identity())
    try:
        yield
    finally:
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(head)


@contextmanager
def _rotations(model: nn.Module, constants: nn.ParameterDict) -> Iterator[None]:
    """Within the block, `rotate_half` of the model's own source file is a product with its matrix."""
    file = sys.modules[type(model).__module__]
    original = getattr(file, "rotate_half", None)
    if original is None:
        yield
        return

    def rotate(x: Tensor) -> Tensor:
        name = f"rotate_{x.shape[-1]}"
        if name not in constants:
            rows = original(torch.eye(x.shape[-1]))
            constants[name] = nn.Parameter(rows.T.contiguous(), requires_grad=False)
        if x.dim() == 4 and isinstance(x.stride(1), int) and x.stride(1) != x.shape[-1]:
            # Part of each head: laid out like x, or its product with x asks whether strides with S in them are equal.
            return nn.functional.linear(x.transpose(1, 2), constants[name]).transpose(1, 2)
        return nn.functional.linear(x, constants[name])

    file.rotate_half = rotate  # type: ignore[attr-defined]
    try:
        yield
    finally:
        file.rotate_half = original  # type: ignore[attr-defined]


def _unsqueeze(x: Tensor, dim: int) -> Tensor:
    """As a view, which XNNPACK takes where one length is not known."""
    if dim < 0 or x.dtype != torch.float32 or sum(not isinstance(d, int) for d in x.shape) != 1:
        return x.unsqueeze(dim)
    shape = [d if isinstance(d, int) else -1 for d in x.shape]
    return x.view([*shape[:dim], 1, *shape[dim:]])


def _gelu_tanh(x: Tensor) -> Tensor:
    """https://arxiv.org/abs/1606.08415, its approximation by tanh."""
    inner = x * (x * x * 0.044715 + 1) * sqrt(2 / pi)
    return x * 0.5 * (torch.tanh(inner) + 1)


def _is_row_mean(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if not args:
        return False
    named = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | kwargs
    wanted = named.get("dim") in (-1, [-1], (-1,)) and named.get("keepdim") is True
    return wanted and set(named) == {"input", "dim", "keepdim"} and isinstance(args[0].shape[-1], int)


def _without_symbol(old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """A shape for view or reshape that says -1 where it said a symbol; as it was where more than one is unknown."""
    if len(new) == 1 and isinstance(new[0], tuple | list):
        new = new[0]
    symbols = [d for d in new if not isinstance(d, int)]
    if len(symbols) != 1 or [d for d in old if not isinstance(d, int)] != symbols:
        return list(new)
    known = prod(d for d in old if isinstance(d, int))
    rest = prod(d for d in new if isinstance(d, int) and d != -1)
    return [-1 if not isinstance(d, int) else known // rest if d == -1 else d for d in new]
