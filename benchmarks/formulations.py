"""Forward passes of other tools' QAT with LoRA, trained by our trainer, to measure what they lose on deployment.

Every tool ships Q(W + s B A): the adapters are merged, then the sum is rounded. With fq(X) for the int8 input, the
forward passes in training are

    merged     fq(X) fq(W + s B A)^T                       ours: the function that is shipped
    split      fq(X) fq(W)^T + s X A^T B^T                 torchtune's QAT-LoRA: adapters are not rounded
    separate   fq(X) fq(W)^T + s fq(X) fq(A)^T fq(B)^T     unsloth's: each adapter matrix is rounded by itself

All of them use the same rounding (quant.numerics), for embedding and head too, and a straight-through estimator. A and
B are rounded to int4 in groups of their layer's size; a width that is no multiple of it has one group per row.
`python -m benchmarks.formulations NAME CONFIG OUT` trains one formulation.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn import functional

from qat_edge import config, progress
from qat_edge.cli.console import ConsoleReporter
from qat_edge.errors import QatEdgeError, UsageError
from qat_edge.logs import quiet_libraries
from qat_edge.models import load, merge
from qat_edge.options import FinetuneOptions
from qat_edge.quant import fake, numerics, scheme
from qat_edge.quant.fake import ADAPTER, LoraFakeQuantLinear
from qat_edge.quant.scheme import WeightScheme
from qat_edge.verbs.finetune import finetune

ADAPTER_BITS = 4


class StraightThrough(torch.autograd.Function):
    """Straight-through estimator: `rounded` in the forward pass, the unchanged gradient for `value` in the backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        """Return `rounded`, which has the shape of `value`."""
        ctx.dtype = value.dtype
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        """Return the gradient unchanged, in the dtype of `value`."""
        return grads[0].to(ctx.dtype), None


class SplitLinear(LoraFakeQuantLinear):
    """Adapted layer with `fq(X) fq(W)^T + s X A^T B^T`: the base is rounded, the adapters are not."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., in) to (..., out); plain LoRA while rounding is off."""
        base = self.get_base_layer()
        if not base.switch.enabled or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        rounded_x = StraightThrough.apply(x, numerics.fake_quantize_activation(x.detach()))
        rounded_weight = numerics.fake_quantize_weight(base.weight.detach(), base.spec.bits, base.spec.group_size)
        output = functional.linear(rounded_x, rounded_weight, base.bias)
        return output + self.scaling[ADAPTER] * self.low_rank(x, rounded_x, base.spec)

    def low_rank(self, x: Tensor, rounded_x: Tensor, spec: WeightScheme) -> Tensor:
        """Return the output of the adapters without its scaling: x and rounded_x (..., in) -> (..., out)."""
        dropped = self.lora_dropout[ADAPTER](x)
        return functional.linear(
            functional.linear(dropped, self.lora_A[ADAPTER].weight.to(dropped.dtype)),
            self.lora_B[ADAPTER].weight.to(dropped.dtype),
        )


class SeparateLinear(SplitLinear):
    """Adapted layer with `fq(X) fq(W)^T + s fq(X) fq(A)^T fq(B)^T`: all three matrices are rounded separately."""

    def low_rank(self, x: Tensor, rounded_x: Tensor, spec: WeightScheme) -> Tensor:
        """Return the output of the adapters without its scaling: x and rounded_x (..., in) -> (..., out)."""
        dropped = self.lora_dropout[ADAPTER](rounded_x)
        lora_a = _rounded(self.lora_A[ADAPTER].weight, spec.group_size)
        lora_b = _rounded(self.lora_B[ADAPTER].weight, spec.group_size)
        return functional.linear(functional.linear(dropped, lora_a), lora_b)


FORMULATIONS: Mapping[str, type[LoraFakeQuantLinear]] = {
    "merged": LoraFakeQuantLinear,
    "split": SplitLinear,
    "separate": SeparateLinear,
}


def convert(model: PeftModel, name: str) -> PeftModel:
    """Give every adapted layer of a model the forward pass of one formulation, in place; parameters are unchanged.

    Raises:
        UsageError: an unknown formulation.
    """
    if name not in FORMULATIONS:
        raise UsageError(f"formulation {name!r}: not known. Known: {', '.join(FORMULATIONS)}.")
    for module in model.modules():
        if isinstance(module, LoraFakeQuantLinear):
            module.__class__ = FORMULATIONS[name]
    return model


def train(
    name: str,
    options: FinetuneOptions,
    out: Path,
    resume: bool = False,
    force: bool = False,
) -> None:
    """Run `finetune` with the forward pass of a formulation; nothing else is changed."""
    with _adapters_of(name):
        finetune(options, out, resume=resume, force=force)


def own_forward(adapter: Path, name: str) -> PeftModel:
    """Return the model of an adapter folder as it was trained: unmerged, with its formulation and rounding on."""
    manifest = merge.adapter_metadata(adapter)
    source = manifest["model"]
    model, _, _ = load.load_model(source["source"], source["trust_remote_code"])
    switch = fake.insert(model, scheme.choose_scheme(model, manifest["group_size"]))
    lora = fake.register(LoraConfig.from_pretrained(str(adapter)))
    adapted = convert(PeftModel.from_pretrained(model, str(adapter), config=lora), name).eval()
    switch.enabled = True
    return adapted


@contextmanager
def _adapters_of(name: str) -> Iterator[None]:
    """Make `fake.add_adapters`, which finetune calls, create layers of one formulation, within a `with` block.

    The product has no such option on purpose: nobody should train a function that cannot be deployed.
    """
    original = fake.add_adapters

    def add_adapters(model: nn.Module, config: LoraConfig) -> PeftModel:
        return convert(original(model, config), name)

    fake.add_adapters = add_adapters
    try:
        yield
    finally:
        fake.add_adapters = original


def _rounded(weight: Tensor, group_size: int) -> Tensor:
    """Return an adapter matrix (out, in) rounded to int4, with a straight-through gradient."""
    group = group_size if weight.shape[1] % group_size == 0 else weight.shape[1]
    return StraightThrough.apply(weight, numerics.fake_quantize_weight(weight.detach(), ADAPTER_BITS, group))


def main() -> None:
    """Train one formulation with the finetune section of a configuration file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.formulations", description=main.__doc__)
    parser.add_argument("name", choices=FORMULATIONS)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--force", action="store_true")
    given = parser.parse_args()
    quiet_libraries(verbose=False)
    try:
        options = config.load(FinetuneOptions, "finetune", given.config, {})
        train(given.name, options, given.out, resume=given.resume, force=given.force)
    except QatEdgeError as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    progress.use(ConsoleReporter())
    main()
