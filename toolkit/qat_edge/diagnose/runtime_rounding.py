"""Emulate in torch what a runtime rounds differently from the frozen checkpoint, so that it does not count as a fault.

ONNX Runtime on x86 rounds the input of a layer symmetrically per token and block of MatMulNBits. On ARM it does so for
8-bit weights; for 4-bit weights KleidiAI's kernel rounds asymmetrically per token, as training does. Of 2-bit weights
with `seq` levels it multiplies the integer part by the rounded input and the half step that is left by the input in
float (`qat_edge_exporters.onnx.half_steps`). In WebAssembly, and on ARM without instructions for products of int8
vectors, it has no such kernel: it multiplies the dequantized weights by the input as it is.
https://github.com/microsoft/onnxruntime/blob/033e3279b4db/onnxruntime/core/mlas/lib/qnbitgemm_kernel_neon.cpp
A .pte exported with --kv-cache int8 rounds queries, keys and values per token and head.

llama.cpp rounds the input of a layer symmetrically per token and block of 32, and its scale to float16 afterwards, on
all processors. GELU is a table of float16 numbers there.

A Hugging Face folder holds a head that shares a rotated table in float, and does not round its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators that round keys and values
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import GELUTanh

from qat_edge.models.artifact_options import options_of_artifact
from qat_edge.quant import numerics
from qat_edge.quant.codebook import SEQ
from qat_edge_devices.processor import Processor
from qat_edge_exporters.artifact import Artifact
from qat_edge_exporters.targets import target_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCKS = "inputs rounded per block, as ONNX Runtime does on x86"
ARM_BLOCKS = "inputs of all but 4-bit layers rounded per block, as ONNX Runtime does on ARM"
FLOAT = "inputs not rounded, as ONNX Runtime does in WebAssembly and on older ARM"
HALF_STEPS = "half steps of 2-bit weights in float"
Q8_0 = "inputs rounded per block with float16 scales, as llama.cpp does"
CACHE = "keys and values in int8"
HEAD = "the head's input not rounded"
SDPA = "sdpa"  # transformers' default attention

Hook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]


@dataclass(frozen=True)
class Rounding:
    """Rounding that a runtime does at inference.

    Attributes:
        name: of the step in the error budget.
        blocks: by module, the number of input features that share a scale; a module that is missing here is rounded
            per token, as in training.
        int8_cache: True if queries, keys and values are rounded to int8.
        half_steps: by module, half the distance between its levels, float32 (out, blocks), which multiplies sums of the
            input in float.
        float16_scales: True if the scales of blocks are rounded to float16, and GELU is computed in float16.
        unrounded: modules whose input stays as it is.
        others: by kind of processor, the rounding there if it is another one.
    """

    name: str = "as trained"
    blocks: Mapping[str, int] = field(default_factory=dict)
    int8_cache: bool = False
    half_steps: Mapping[str, Tensor] = field(default_factory=dict)
    float16_scales: bool = False
    unrounded: tuple[str, ...] = ()
    others: Mapping[Processor, Rounding] = field(default_factory=dict)

    @property
    def is_as_trained(self) -> bool:
        """True if there is nothing to emulate."""
        return not (self.blocks or self.int8_cache or self.half_steps or self.float16_scales or self.unrounded)

    def on(self, processor: Processor) -> Rounding:
        """Return how the runtime rounds on a processor of that kind."""
        return self.others.get(processor, self)


def artifact_rounding(folder: Path, target: str) -> Rounding | None:
    """Return how the runtime of an artifact rounds differently; None if it computes the frozen checkpoint."""
    return rounding_of(folder, target, options_of_artifact(folder).int8_cache)


def rounding_of(folder: Path, target: str, int8_cache: bool) -> Rounding | None:
    """Return the same for a folder that has no manifest yet.

    Args:
        folder: of the artifact.
        target: of the artifact.
        int8_cache: the artifact keeps keys and values in int8.
    """
    # MatMulNBits has a block size of its own, whatever groups the weights were trained with.
    if target in ("onnx", "gguf"):
        artifact = target_named(target).read(folder)
        blocks = {name: weight.block for name, weight in artifact.weights.items() if weight.block}
        if target == "gguf":
            return Rounding(Q8_0, blocks, float16_scales=True)
        return _onnx_rounding(artifact, blocks)
    if target == "hf":
        # The embedding is the first; a head follows where it shares a rotated table.
        _, *in_float = target_named(target).read(folder).metadata["in_float"]
        return Rounding(HEAD, unrounded=tuple(in_float)) if in_float else None
    return Rounding(CACHE, int8_cache=True) if int8_cache else None


def _onnx_rounding(artifact: Artifact, blocks: Mapping[str, int]) -> Rounding:
    """Return how ONNX Runtime rounds on x86, and on other processors."""
    seq = {name: weight.scales for name, weight in artifact.weights.items() if weight.levels == SEQ}
    half_steps = {name: torch.from_numpy(scales) for name, scales in seq.items()}
    in_float = Rounding(FLOAT, unrounded=tuple(blocks))

    # KleidiAI has kernels for 4 bits, and for whole blocks of a multiple of 32 inputs.
    def has_kleidiai(name: str) -> bool:
        weight, block = artifact.weights[name], blocks[name]
        return weight.bits == 4 and block % 32 == 0 and weight.codes.shape[1] % block == 0

    on_arm = {name: block for name, block in blocks.items() if not has_kleidiai(name)}
    others = {
        Processor.ARM: Rounding(ARM_BLOCKS, on_arm, half_steps=half_steps),
        Processor.ARM_WITHOUT_DOT_PRODUCT: in_float,
        Processor.WASM: in_float,
        Processor.OTHER: Rounding(HALF_STEPS, half_steps=half_steps),
    }
    return Rounding(BLOCKS, blocks, half_steps=half_steps, others=others)


@contextmanager
def emulate_rounding(
    model: PreTrainedModel | nn.Module, names: Iterable[str], rounding: Rounding
) -> Iterator[PreTrainedModel | nn.Module]:
    """Round the inputs of the named modules, and what attention reads, inside the block.

    Args:
        model: with dequantized weights, from `reference.load_dequantized`.
        names: modules whose inputs are rounded.
        rounding: of the runtime to emulate; `Rounding()` for the frozen checkpoint.
    """
    with ExitStack() as stack:
        for name in names:
            if name in rounding.unrounded:
                continue
            block, module = rounding.blocks.get(name), model.get_submodule(name)
            if name in rounding.half_steps:
                stack.enter_context(_half_steps_in_float(module, rounding.half_steps[name]))
            hook = numerics.round_input if block is None else _block_rounder(block, rounding.float16_scales)
            stack.callback(module.register_forward_pre_hook(hook).remove)
        if rounding.float16_scales:
            stack.enter_context(_gelu_in_float16(model))
        if rounding.int8_cache:
            stack.enter_context(_round_attention_inputs())
        yield model


@contextmanager
def _half_steps_in_float(module: nn.Module, half_steps: Tensor) -> Iterator[None]:
    """Multiply half steps (out, blocks) by sums of the module's input as it is before it gets rounded."""
    unrounded: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        unrounded[:] = [args[0]]

    def correct(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # The output has the half steps of the rounded input: what rounding took from the sums is added.
        missing = (unrounded.pop() - args[0]).unflatten(-1, (half_steps.shape[1], -1)).sum(-1)
        return output + missing @ half_steps.T.to(missing)

    handles = module.register_forward_pre_hook(keep), module.register_forward_hook(correct)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _gelu_in_float16(model: nn.Module) -> Iterator[None]:
    """Round input and output of GELU to float16, as ggml's table of its values does.

    https://github.com/ggml-org/llama.cpp/blob/b4882/ggml/src/ggml-cpu/ggml-cpu.c (GGML_GELU_FP16)
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, GELUTanh):
                before = module.register_forward_pre_hook(lambda _, args: (args[0].half().float(), *args[1:]))
                after = module.register_forward_hook(lambda _, args, output: output.half().float())
                stack.callback(before.remove)
                stack.callback(after.remove)
        yield


def _block_rounder(block: int, float16_scales: bool) -> Hook:
    """Return a forward pre-hook that rounds a module's input to int8, s = max|x| / 127 per token and block.

    ONNX Runtime's MLAS does this in SQNBitGemm with CompInt8, and ggml in quantize_row_q8_0, where the codes are
    chosen before their scale is rounded to float16.
    """

    def round_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # The last block is padded with zeros, which change neither its maximum nor its codes.
        x = args[0].float()
        blocks = nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
        largest = blocks.abs().amax(dim=-1, keepdim=True)
        # A block of zeros has no scale: 127 / 0 is infinite, and its codes must be 0.
        codes = (blocks * (127 / largest).nan_to_num(posinf=0.0)).round()
        scales = largest / 127
        scales = scales.half().float() if float16_scales else scales
        return ((codes * scales).flatten(-2)[..., : x.shape[-1]], *args[1:])

    return round_input


@contextmanager
def _round_attention_inputs() -> Iterator[None]:
    """Round queries, keys and values of every model in this process inside the block."""
    # The registry of transformers is global: whatever is registered under SDPA serves every model.
    attend = AttentionInterface()[SDPA]

    def rounded(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **extras: Any) -> Any:
        return attend(module, _round_per_head(query), _round_per_head(key), _round_per_head(value), *args, **extras)

    AttentionInterface.register(SDPA, rounded)
    try:
        yield
    finally:
        AttentionInterface.register(SDPA, attend)


def _round_per_head(x: Tensor) -> Tensor:
    """Round to int8 and back, with an asymmetric scale and zero point per token and head.

    x: (batch, heads, tokens, head size).
    """
    operators, low, high = torch.ops.quantized_decomposed, *numerics.code_range(8)
    scales, zeros = operators.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = operators.quantize_per_token(x, scales, zeros, low, high, torch.int8)
    values: Tensor = operators.dequantize_per_token(codes, scales, zeros, low, high, torch.int8, x.dtype)
    return values
