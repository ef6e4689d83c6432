"""What every layer of the FP32 fine-tune costs at 4 and at 8 bits, and the bits to give it.

Measured once into RUN/sensitivity/; `--max-size-mb` and `--max-kl` pick from what was measured, as often as wanted.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qat_edge import config, progress
from qat_edge.config import FinetuneOptions, SensitivityOptions
from qat_edge.data import tokenization
from qat_edge.data.calibration import by_length, choose_rows
from qat_edge.data.formats import load_rows
from qat_edge.errors import RunError, UsageError
from qat_edge.models import tasks
from qat_edge.models.merge import adapter_facts, merged_model
from qat_edge.quant import layer_sensitivity, scheme
from qat_edge.quant.bit_allocation import (
    MEASURED,
    Choice,
    Cost,
    LayerCost,
    Sensitivity,
    read_measured,
    save_bits,
    weight_bytes,
    within_budget,
    within_kl,
)
from qat_edge.report.figures import megabytes, number
from qat_edge.report.sensitivity_page import raised, render
from qat_edge.run import MANIFEST, Run, read_manifest, replace_folder, sha256, write_manifest, write_text

BITS, PAGE = "bits.yaml", "sensitivity.html"
BATCH_TOKENS = 512  # of one forward pass


@dataclass(frozen=True)
class Result:
    """folder: what was written. choice: None where nothing was to be picked."""

    folder: Path
    measured: Sensitivity
    choice: Choice | None

    def describe(self) -> str:
        """The line that `qat-edge sensitivity` ends with."""
        if self.choice is None:
            return f"Wrote {self.folder / PAGE}. --max-size-mb or --max-kl now picks the bits, without measuring again"
        picked, path = self.choice, self.folder / BITS
        return (
            f"Wrote {path}: {raised(self.measured, picked)}, {megabytes(picked.size_bytes)} MB and KL "
            f"{number(picked.kl_nats)} predicted. Next: qat-edge finetune --bits {path}, or "
            f"qat-edge quantize {self.folder.parent} --method gptq --bits {path}"
        )


def sensitivity(run: Run, options: SensitivityOptions, force: bool = False) -> Result:
    """Measure into RUN/sensitivity, or take what was measured there, and pick bits where `options` asks for it.

    Raises:
        UsageError: both limits, or one that cannot be kept.
        RunError: already measured and nothing to pick (without `force`), or measured on another fine-tune.
        DataError: fewer calibration tokens than asked for.
    """
    if options.max_size_mb is not None and options.max_kl is not None:
        raise UsageError("--max-size-mb and --max-kl: one limit picks the bits. Give one of them.")
    tasks.require_generating(run, "sensitivity")
    folder = run.path / "sensitivity"
    picking = options.max_size_mb is not None or options.max_kl is not None
    if (folder / MANIFEST).is_file() and picking and not force:
        measured = _same_finetune(run, folder, options)
    else:
        if folder.exists() and not force:
            raise RunError(
                f"{folder} exists already. Give --max-size-mb or --max-kl to pick from it, or --force to measure again."
            )
        measured = measure(run, options, force)
        with replace_folder(folder, force=True) as work:
            write_text(work / MEASURED, json.dumps(dataclasses.asdict(measured), indent=1) + "\n")
            _write_page(run, work, measured, None)
    choice = pick(measured, options)
    if choice is not None:
        save_bits(folder / BITS, choice)
        _write_page(run, folder, measured, choice)
    return Result(folder, measured, choice)


def measure(run: Run, options: SensitivityOptions, force: bool = False) -> Sensitivity:
    """Measure the FP32 fine-tune of a run on its own training rows.

    Raises:
        RunError, DataError: see `sensitivity`.
    """
    began = time.monotonic()
    trained = config.load(FinetuneOptions, "finetune", run.config, {})
    merged = merged_model(run.reference, force)
    tokenized = tokenization.tokenize(load_rows(trained.data, "train"), merged.tokenizer, trained.max_length)
    rows = choose_rows(tokenized.rows, options.tokens, options.seed, trained.data, "--tokens")
    found = measure_model(merged.model, merged.tokenizer, trained.group_size, rows, options.seed)
    source = adapter_facts(run.reference)["model"]["identity"]["name"]
    return dataclasses.replace(found, model=source, wall_s=time.monotonic() - began)


def measure_model(
    model: Any,
    tokenizer: Any,
    group_size: int,
    rows: Sequence[dict[str, list[int]]],
    seed: int,
) -> Sensitivity:
    """Cost of every weight of a float model on tokenized rows {"input_ids", "labels"}."""
    began = time.monotonic()
    plan = scheme.choose(model, group_size)
    schemes = layer_sensitivity.candidates(plan)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = list(_batches(rows, tokenizer, device))
    total = len(batches) * sum(map(len, schemes.values()))
    progress.info(
        f"Measuring {len(schemes)} weights on {sum(len(row['input_ids']) for row in rows)} tokens, on {device}"
    )
    with progress.bar("measuring", total) as shown:
        done = iter(range(1, total + 1))
        found = layer_sensitivity.probe(
            model.to(device), schemes, batches, lambda name, bits: shown.update(next(done), f"{name} int{bits}")
        )
    model.to("cpu")
    return Sensitivity(
        model=type(model).__name__,
        tokens=sum(len(row["input_ids"]) for row in rows),
        compared=found.compared,
        rows=len(rows),
        seed=seed,
        group_size=group_size,
        tied=plan.tied,
        float_bytes=_float_bytes(model, plan),
        wall_s=time.monotonic() - began,
        together=found.together,
        weights={name: _layer_cost(model, name, schemes[name], kl) for name, kl in found.alone.items()},
    )


def pick(measured: Sensitivity, options: SensitivityOptions) -> Choice | None:
    """The bits that the one limit of `options` asks for; None where it has none.

    Raises:
        UsageError: the limit cannot be kept.
    """
    if options.max_size_mb is not None:
        return within_budget(measured.costs, measured.float_bytes, options.max_size_mb)
    if options.max_kl is not None:
        return within_kl(measured.costs, measured.float_bytes, options.max_kl)
    return None


def _batches(rows: Sequence[dict[str, list[int]]], tokenizer: Any, device: str) -> Iterator[layer_sensitivity.Batch]:
    for tensors in map(tokenization.Collator(tokenizer), by_length(rows, BATCH_TOKENS)):
        compared = torch.zeros_like(tensors["labels"], dtype=torch.bool)
        compared[:, :-1] = tensors["labels"][:, 1:] != tokenization.IGNORED
        if compared.any():
            yield layer_sensitivity.Batch(
                *(t.to(device) for t in (tensors["input_ids"], tensors["attention_mask"], compared))
            )


def _layer_cost(
    model: Any, name: str, schemes: Mapping[int, scheme.WeightScheme], kl: Mapping[int, float]
) -> LayerCost:
    rows, width = model.get_submodule(name).weight.shape
    return LayerCost(
        layer=layer_sensitivity.layer_index(name),
        kind=name.rpartition(".")[2],
        shape=(rows, width),
        costs={
            bits: Cost(kl[bits], weight_bytes(rows, width, bits, spec.group_size)) for bits, spec in schemes.items()
        },
    )


def _float_bytes(model: Any, plan: scheme.Scheme) -> int:
    quantized = {f"{name}.weight" for name in plan.weights}
    return sum(4 * p.numel() for name, p in model.named_parameters() if name not in quantized)


def _same_finetune(run: Run, folder: Path, options: SensitivityOptions) -> Sensitivity:
    """What was measured before, if it was measured on the fine-tune that the run holds now."""
    if read_manifest(folder)["reference_sha256"] != _reference_sha256(run):
        raise RunError(f"{folder} was measured on another fine-tune. Give --force to measure again.")
    measured = read_measured(folder)
    other = (options.tokens, options.seed) != (measured.tokens, measured.seed)
    again = f"; --force measures again, on {options.tokens} (seed {options.seed})" if other else ""
    progress.info(f"Picking from {folder}, measured on {measured.tokens} tokens (seed {measured.seed}){again}")
    return measured


def _write_page(run: Run, folder: Path, measured: Sensitivity, choice: Choice | None) -> None:
    write_text(folder / PAGE, render(measured, choice))
    write_manifest(folder, "sensitivity", reference_sha256=_reference_sha256(run))


def _reference_sha256(run: Run) -> str:
    return sha256(run.reference / MANIFEST)
