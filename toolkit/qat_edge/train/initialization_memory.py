"""Memory of a calibrated PTQ initialization, on fake tensors as in `training_memory`.

Such a method goes through the blocks one by one, and its memory does not grow with their number: one is enough. Its
loops over columns take most of the time and no memory of their own, so they are left out.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat_edge import progress
from qat_edge.data.calibration import BATCH_TOKENS
from qat_edge.lazy import load
from qat_edge.quant.ptq.blockwise import find_blocks, quantize_blocks
from qat_edge.quant.ptq.coordinate_descent import CoordinateDescent, refine
from qat_edge.quant.ptq.gptq import GPTQ, Compensated
from qat_edge.quant.ptq.method_names import METHOD_OF
from qat_edge.quant.ptq.methods import BLOCK_METHODS
from qat_edge.quant.ptq.table_codes import quantize_tables
from qat_edge.quant.scheme import Scheme, WeightScheme
from qat_edge.train.live_bytes import LiveBytes
from qat_edge.train.rotated_outline import RotationOutcome

KEPT_BYTES = 2  # of each weight that a method changed: bfloat16, until it is saved
SCALE_BYTES = 4


def count_initialization(
    model: PreTrainedModel,
    scheme: Scheme,
    method: str,
    tokens: int,
    row_tokens: int,
    rotation: RotationOutcome,
    live: LiveBytes,
) -> int:
    """Return the peak of all tensors above those that exist already, in bytes.

    Args:
        model: The base model, of fake tensors, with or without adapters around its layers.
        scheme: Bits and group size of each weight.
        method: One of the calibrated methods.
        tokens: Of calibration.
        row_tokens: Tokens of each row.
        rotation: Changes of the model before.
        live: Counts the tensors.
    """
    begin = live.live_bytes
    scales = sum(_groups(model, name, spec) for name, spec in scheme.weights.items()) * SCALE_BYTES
    live.restart()
    with progress.report_to(progress.SilentReporter()), torch.no_grad():
        _quantize_one_block(model, scheme, method, _batches(tokens, row_tokens))
    during = live.peak_bytes - begin + scales

    # At the end, the weights that were changed are collected for their file.
    changed = [*scheme.linears, *([scheme.embedding, scheme.head] if rotation.is_on and not scheme.tied else [])]
    changed += [scheme.embedding] if rotation.is_on and scheme.tied else []
    afterwards = sum(_weight(model, name).numel() for name in changed if name) * KEPT_BYTES + scales
    return max(during, afterwards)


def _quantize_one_block(model: PreTrainedModel, scheme: Scheme, method: str, batches: list[dict[str, Tensor]]) -> None:
    """Run a method on the tables and the first block."""
    name = find_blocks(scheme, model)
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    own_name, blocks, count = name.rpartition(".")[2], model.get_submodule(name), model.config.num_hidden_layers
    first = {n: s for n, s in scheme.weights.items() if not n.startswith(f"{name}.") or n.startswith(f"{name}.0.")}
    part = dataclasses.replace(scheme, weights=first)
    setattr(owner, own_name, nn.ModuleList(list(blocks)[:1]))
    model.config.num_hidden_layers = 1
    try:
        block_method = _without_loops(load(BLOCK_METHODS[METHOD_OF.get(method, method)]))
        tables: Any = dict
        if isinstance(block_method, GPTQ):
            tables = partial(quantize_tables, model, part, batches, block_method.choose_codes)
        quantize_blocks(model, part, batches, block_method.quantize_block, "", tables)
    finally:
        setattr(owner, own_name, blocks)
        model.config.num_hidden_layers = count


def _without_loops(method: Any) -> Any:
    """Return a method that allocates what `method` does, and chooses no codes."""
    if not issubclass(method, GPTQ):
        return method()

    class WithoutLoops(method):
        def choose_codes(self, target: Tensor, hessian: Tensor, factor: Tensor, spec: WeightScheme) -> Compensated:
            scales = target.new_ones(target.shape[0], target.shape[1] // spec.group_size)
            if isinstance(self, CoordinateDescent):
                return refine(target, hessian.clone(), target.clone(), scales, spec, sweeps=0)
            return Compensated(target.clone(), scales)

    return WithoutLoops()


def _batches(tokens: int, row_tokens: int) -> list[dict[str, Tensor]]:
    """Return batches of so many tokens, as `data.calibration` makes them of rows of that length."""
    rows = max(1, BATCH_TOKENS // row_tokens)
    shape = (rows, min(row_tokens, tokens))
    count = max(1, round(tokens / (shape[0] * shape[1])))
    return [
        {name: torch.ones(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask")} for _ in range(count)
    ]


def _weight(model: nn.Module, name: str) -> Tensor:
    module: Any = model.get_submodule(name)
    return torch.as_tensor(module.weight)


def _groups(model: nn.Module, name: str, spec: WeightScheme) -> int:
    rows, width = _weight(model, name).shape
    return rows * (width // spec.group_size)
