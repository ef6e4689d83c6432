"""Step time and peak memory of QAT-LoRA next to peft's LoRA: `python -m benchmarks.train_cuda`, on one NVIDIA GPU.

It needs no network and no files: models have random weights, in the sizes of published ones, and batches random tokens.
Each variant is built anew on the same bfloat16 base, and trained for a few steps on the same batches. A step of plain
LoRA is timed before and after each variant, so that a ratio compares neighbors in time.

    lora     peft's LoRA on a bfloat16 base, AdamW, bfloat16 autocast, the model's own loss
    qat      QAT with int4 weights in groups of 32 whose scales follow the largest weight, `next_token_loss`
    learned  the same with learned scales, the default of `finetune`
    distill  the same with a live teacher besides
    torch    learned, rounded by torch's own operations instead of the Triton kernels

The kernels are compared with the CPU bit for bit first. If they differ, a warning says so, and torch computes all
variants.

The floor of a QAT step is what any merged forward adds to LoRA: each weight is read once and its rounded form written
once and read once, in the forward pass and again in the backward pass, and B A is computed in both.

`--device cpu --models tiny` runs all of it anywhere, to test the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks import page
from qat_edge.manifest import LIBRARIES, library_version
from qat_edge.quant import base_storage, fake, fused, numerics
from qat_edge.quant.scheme import Scheme, choose_scheme
from qat_edge.storage import write_text
from qat_edge.train import next_token_loss
from qat_edge.train.distill import LiveTeacher

GROUP, RANK, ALPHA = 32, 16, 32
WARM_UP = 3  # steps before the timed ones
LORA, TORCH, VARIANTS = "lora", "torch", ("qat", "learned", "distill", "torch")
STEP_GOAL, MEMORY_GOAL = 1.15, 1.10  # times plain LoRA
_LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN_06B: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
_TINY: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
# Configurations of published models: https://huggingface.co/meta-llama/Llama-3.2-1B, Qwen/Qwen3-0.6B, Meta-Llama-3-8B.
MODELS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "Llama-3.2-1B": (LlamaForCausalLM, LlamaConfig, _LLAMA_1B),
    "Qwen3-0.6B": (Qwen3ForCausalLM, Qwen3Config, _QWEN_06B),
    "Llama-3-8B": (LlamaForCausalLM, LlamaConfig, _LLAMA_8B),
    "tiny": (LlamaForCausalLM, LlamaConfig, _TINY),
}


@dataclass(frozen=True)
class Setting:
    """What all variants of one comparison share.

    Attributes:
        model: Key of `MODELS`.
        device: "cuda" or "cpu".
        rows: Of a batch.
        length: Tokens of a row, all with loss.
        steps: Timed steps of each variant.
        gradient_checkpointing: Decoder layers are computed again in the backward pass.
    """

    model: str
    device: str
    rows: int
    length: int
    steps: int
    gradient_checkpointing: bool


@dataclass(frozen=True)
class VariantCost:
    """Cost of one variant.

    Attributes:
        setting: What it was measured with.
        variant: Key of the table in the module's docstring.
        step_s: Median seconds of a step, of the optimizer's as well.
        lora_s: The same of plain LoRA, the mean of before and after.
        peak_bytes: Most memory that torch had allocated on the GPU; None on a CPU.
        lora_peak_bytes: The same of plain LoRA.
    """

    setting: Setting
    variant: str
    step_s: float
    lora_s: float
    peak_bytes: int | None
    lora_peak_bytes: int | None

    @property
    def step_ratio(self) -> float:
        """Time of a step over that of plain LoRA."""
        return self.step_s / self.lora_s

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory over that of plain LoRA; None on a CPU."""
        if self.peak_bytes is None or self.lora_peak_bytes is None:
            return None
        return self.peak_bytes / self.lora_peak_bytes


def main() -> None:
    """Measure all variants, print a table, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_cuda", description=main.__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[name for name in MODELS if name != "tiny"])
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch, 4 by default")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, 512 by default")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each variant, 8 by default")
    parser.add_argument("--out", type=Path, default=Path("train_cuda.json"), help="JSON file to write")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here. Give --device cpu --models tiny to try the script.")

    found: list[VariantCost] = []
    for name in given.models:
        for checkpointing in (False, True):
            setting = Setting(name, given.device, given.rows, given.length, given.steps, checkpointing)
            for cost in compare(setting):
                print(describe(cost), flush=True)
                found.append(cost)
            # After each setting, so that what was measured is kept if a larger model does not fit.
            write_text(given.out, json.dumps(record(found, given.device), indent=1))
    print(table_of(found))


def compare(setting: Setting) -> Iterator[VariantCost]:
    """Measure every variant between two runs of plain LoRA."""
    before, lora_peak = measure(setting, LORA)
    for variant in VARIANTS:
        step_s, peak = measure(setting, variant)
        after, _ = measure(setting, LORA)
        yield VariantCost(setting, variant, step_s, (before + after) / 2, peak, lora_peak)
        before = after


def measure(setting: Setting, variant: str) -> tuple[float, int | None]:
    """Return the median seconds of a step and the peak memory on the GPU, None on a CPU."""
    on_gpu = setting.device == "cuda"
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainee = Trainee.lora(setting) if variant == LORA else Trainee.qat(setting, variant)
    times = []
    with fused.without_kernels() if variant == TORCH else nullcontext():
        for index in range(WARM_UP + setting.steps):
            batch = make_batch(setting, index)
            began = _now(on_gpu)
            trainee.step(batch)
            times.append(_now(on_gpu) - began)
    return median(times[WARM_UP:]), torch.cuda.max_memory_allocated() if on_gpu else None


class Trainee:
    """A model in training.

    Attributes:
        model: With adapters.
        optimizer: AdamW over what is trained.
        device: "cuda" or "cpu".
        teacher: Of self-distillation; None without.
        is_ours: The loss is `next_token_loss`, not the model's own.
    """

    def __init__(self, setting: Setting, model: Any, is_ours: bool, teacher: LiveTeacher | None = None) -> None:
        self.model, self.device, self.teacher, self.is_ours = model, setting.device, teacher, is_ours
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=setting.device == "cuda")
        model.train()
        if setting.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()

    @classmethod
    def lora(cls, setting: Setting) -> Trainee:
        """Plain LoRA as peft has it, on a bfloat16 base."""
        model = make_base(setting)
        return cls(setting, get_peft_model(model, _adapters()), is_ours=False)

    @classmethod
    def qat(cls, setting: Setting, variant: str) -> Trainee:
        """QAT of this package, in phase 2."""
        model = make_base(setting).float()  # as `finetune` loads it
        scheme = choose_scheme(model, GROUP)
        switch = fake.insert(model, scheme, learned_scales=variant != "qat")
        adapted = fake.add_adapters(model, _adapters())
        base_storage.narrow(adapted, scheme)
        gc.collect()
        if setting.device == "cuda":
            # The peak is that of training: loading in float32 is over.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

        if variant != "qat":
            fake.set_scales(model, _scales(adapted, scheme))
        teacher = LiveTeacher(adapted, switch, 1.0) if variant == "distill" else None
        switch.enabled = True
        return cls(setting, adapted, True, teacher)

    def step(self, batch: dict[str, Tensor]) -> None:
        """Make one step of the optimizer."""
        with torch.autocast(self.device, torch.bfloat16):
            loss = self._loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        if not self.is_ours:
            own: Tensor = self.model(**batch).loss
            return own
        predictions = next_token_loss.predict_targets(self.model, batch)
        loss = next_token_loss.next_token_loss(predictions)
        if self.teacher is not None:
            loss = (loss + self.teacher.divergence(batch, predictions.logits)) / 2
        return loss / len(predictions.targets)


def make_base(setting: Setting) -> Any:
    """Return a model of random weights in bfloat16, on the device."""
    model_class, config_class, sizes = MODELS[setting.model]
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = model_class(config_class(**sizes, max_position_embeddings=setting.length)).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def make_batch(setting: Setting, index: int) -> dict[str, Tensor]:
    """Return a batch of random tokens, all of which are targets."""
    vocabulary = MODELS[setting.model][2]["vocab_size"]
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, vocabulary, (setting.rows, setting.length), generator=generator).to(setting.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def floor(setting: Setting) -> dict[str, float]:
    """Return what a merged, rounded forward has to add to a step of LoRA.

    Returns:
        bytes: Read and written in device memory: 2 for a weight's read, write and read, in both passes.
        operations: Multiplications and additions of B A, in both passes.
    """
    _, config_class, sizes = MODELS[setting.model]
    with torch.device("meta"):
        model: Any = MODELS[setting.model][0](config_class(**sizes))
    scheme = choose_scheme(model, GROUP)
    weights = sum(model.get_submodule(name).weight.numel() for name in scheme.linears)
    return {"bytes": 2.0 * 3 * 2 * weights, "operations": 2.0 * 2 * RANK * weights}


def describe(cost: VariantCost) -> str:
    """Return one line for people."""
    memory = page.MISSING if cost.memory_ratio is None else f"{cost.memory_ratio:.2f} times the memory"
    checkpointing = ", gradient checkpointing" if cost.setting.gradient_checkpointing else ""
    return (
        f"{cost.setting.model}{checkpointing}, {cost.variant}: {1000 * cost.step_s:.1f} ms a step, "
        f"{cost.step_ratio:.2f} times LoRA's, {memory}"
    )


def table_of(costs: Sequence[VariantCost]) -> str:
    """Return a Markdown table of all measurements."""
    head = ("model", "gradient checkpointing", "variant", "step, ms", "LoRA, ms", "ratio", "memory, GB", "ratio")
    rows = [
        (
            cost.setting.model,
            "on" if cost.setting.gradient_checkpointing else "off",
            cost.variant,
            f"{1000 * cost.step_s:.1f}",
            f"{1000 * cost.lora_s:.1f}",
            f"{cost.step_ratio:.2f}",
            page.MISSING if cost.peak_bytes is None else f"{cost.peak_bytes / 1e9:.2f}",
            page.MISSING if cost.memory_ratio is None else f"{cost.memory_ratio:.2f}",
        )
        for cost in costs
    ]
    return page.table(head, rows)


def record(costs: Sequence[VariantCost], device: str) -> dict[str, Any]:
    """Return the measurements as JSON holds them, with machine, versions and floors."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "libraries": {name: library_version(name) for name in (*LIBRARIES, "triton")},
        "kernels": fused.kernels_on(torch.device(device)) is not None,
        "goals": {"step": STEP_GOAL, "memory": MEMORY_GOAL},
        "floors": {cost.setting.model: floor(cost.setting) for cost in costs},
        "costs": [{**asdict(cost), "step_ratio": cost.step_ratio, "memory_ratio": cost.memory_ratio} for cost in costs],
    }


def _adapters() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def _scales(adapted: Any, scheme: Scheme) -> dict[str, Tensor]:
    """Return the scales of the largest weights, which learned scales begin with here."""
    view = fake.MergedWeights(adapted)
    return {
        name: numerics.choose_scales(torch.as_tensor(view.get_submodule(name).weight), spec.codebook, spec.group_size)
        for name, spec in scheme.linears.items()
    }


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
