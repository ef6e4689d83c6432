"""Measure the loss of every layer of the FP32 fine-tune at 4 and 8 bits (or 2 as well), and choose the bits of each.

Load the fine-tune, measure it once into RUN/sensitivity/, then choose from the measurement as often as wanted:
`--max-size-mb` minimizes the loss for a size, `--max-kl` the size for a loss.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qat_edge import config, option_paths, progress
from qat_edge.data import tokenization
from qat_edge.data.calibration import choose_rows, group_by_length
from qat_edge.data.changed_rows import DATA, warn_of_change
from qat_edge.data.formats import RowStream
from qat_edge.data.streamed_rows import sample_of
from qat_edge.data.token_table import IGNORED
from qat_edge.errors import RunError, UsageError
from qat_edge.manifest import MANIFEST, read_manifest, sha256, write_manifest
from qat_edge.models import decoder, tasks
from qat_edge.models.merge import adapter_metadata, merged_model
from qat_edge.options import SensitivityOptions
from qat_edge.quant import layer_sensitivity
from qat_edge.quant.bit_allocation import (
    MEASURED,
    Choice,
    Cost,
    LayerCost,
    Sensitivity,
    weight_bytes,
    within_budget,
    within_kl,
)
from qat_edge.quant.bits_file import MeasuredModel, save_bits
from qat_edge.quant.scheme import INT4, LinearCodes, Scheme, WeightScheme, choose_scheme
from qat_edge.quant.sensitivity_file import read_sensitivity
from qat_edge.readers import counted
from qat_edge.report.formatting import megabytes, number
from qat_edge.report.sensitivity_page import raised, render
from qat_edge.run import Run
from qat_edge.run_lock import writes_run
from qat_edge.storage import replace_folder, write_text
from qat_edge.train.option_checks import row_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BITS, PAGE = "bits.yaml", "sensitivity.html"
BATCH_TOKENS = 512  # of one forward pass


@dataclass(frozen=True)
class SensitivityResult:
    """Result of the verb.

    Attributes:
        folder: RUN/sensitivity.
        measured: loss by layer and bits.
        choice: bits of every weight; None where neither --max-size-mb nor --max-kl was given.
    """

    folder: Path
    measured: Sensitivity
    choice: Choice | None

    def describe(self) -> str:
        """Return the line that `qat-edge sensitivity` ends with."""
        if self.choice is None:
            return f"Wrote {self.folder / PAGE}. --max-size-mb or --max-kl now chooses the bits without measuring again"
        choice, path = self.choice, self.folder / BITS
        return (
            f"Wrote {path}: {raised(self.measured, choice)}, {megabytes(choice.size_bytes)} MB and KL "
            f"{number(choice.kl_nats)} predicted. Next: qat-edge finetune --bits {path}, or "
            f"qat-edge quantize {self.folder.parent} --method gptq --bits {path}"
        )


@writes_run("sensitivity")
def sensitivity(run: Run, options: SensitivityOptions, force: bool = False) -> SensitivityResult:
    """Measure into RUN/sensitivity, or read the measurement there, and choose bits if `options` has a limit.

    Raises:
        UsageError: both limits are given, or one that cannot be met.
        RunError: already measured and no limit given (without `force`), or measured on another fine-tune.
        DataError: fewer calibration tokens than requested.
    """
    if options.max_size_mb is not None and options.max_kl is not None:
        raise UsageError("--max-size-mb and --max-kl: one limit chooses the bits. Give one of them.")
    tasks.require_causal_lm(run, "sensitivity")
    if run.frozen_base is not None:
        raise RunError(
            f"{run.path}: its adapters belong to the frozen weights of {run.frozen_base}, whose bits stay as they are. "
            f"Choose bits for another base: `qat-edge sensitivity {run.frozen_base}`."
        )

    # A limit chooses from the measurement that is there; without one, or with --force, measure.
    folder = run.path / "sensitivity"
    has_limit = options.max_size_mb is not None or options.max_kl is not None
    if (folder / MANIFEST).is_file() and has_limit and not force:
        measured = _read_same_finetune(run, folder, options)
    else:
        if folder.exists() and not force:
            raise RunError(
                f"{folder} exists already. Give --max-size-mb or --max-kl to choose bits from it, or --force to "
                "measure again."
            )
        # Written before bits are chosen: a limit that cannot be met does not throw away minutes of measuring.
        measured = measure(run, options, force)
        _write(run, folder, measured, None)

    # The whole folder is written again, with the choice marked in the page.
    choice = choose_bits(measured, options)
    if choice is not None:
        _write(run, folder, measured, choice)
    return SensitivityResult(folder, measured, choice)


def measure(run: Run, options: SensitivityOptions, force: bool = False) -> Sensitivity:
    """Measure the FP32 fine-tune of a run on its own training rows.

    Raises:
        RunError, DataError: see `sensitivity`.
    """
    began = time.monotonic()
    trained = config.load_trained(run.config)
    source = options.data or trained.data
    option_paths.require_data(source, "--data")
    merged = merged_model(run.reference, force)

    # Training rows, as for calibration: evaluation rows must not influence the choice of bits.
    stream = RowStream(source, "train", streamed=trained.streaming and options.data is None)
    tokenized = tokenization.tokenize(sample_of(stream), merged.tokenizer, row_length(trained, merged.model.config))
    warn_of_change(run, DATA, stream, "--data", options.data)
    rows = choose_rows(tokenized.rows, options.tokens, options.seed, source, "--tokens")
    metadata = adapter_metadata(run.reference)
    codes = LinearCodes.of_training(metadata)
    narrow = codes if options.width is None else dataclasses.replace(codes, bits=options.width)
    measured = measure_model(merged.model, merged.tokenizer, trained.group_size, rows, options.seed, narrow)

    name = metadata["model"]["identity"]["name"]
    return dataclasses.replace(measured, model=name, wall_s=time.monotonic() - began)


def measure_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group_size: int,
    rows: Sequence[dict[str, list[int]]],
    seed: int,
    narrow: LinearCodes = INT4,
) -> Sensitivity:
    """Measure the loss of every weight of a float model.

    Args:
        model: in float32, on the CPU; it is moved to the GPU, if there is one, and back.
        tokenizer: pads batches.
        group_size: of int4 and int2 weights.
        rows: tokenized, {"input_ids", "labels"}.
        seed: that the rows were chosen with, for the record.
        narrow: fewest bits to measure; with 2, layers are measured at 4 as well.
    """
    began = time.monotonic()
    scheme = choose_scheme(model, group_size)
    candidates = layer_sensitivity.candidate_schemes(scheme, narrow)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = sum(len(row["input_ids"]) for row in rows)
    progress.info(f"Measuring the sensitivity of {counted(len(candidates), 'weight')} on {tokens} tokens, on {device}")

    losses = _probe(model, candidates, list(_batches(rows, tokenizer, device)), device)
    # Only ONNX folders hold 2-bit weights, and their scales are float32; those of a .pte are bfloat16.
    scale_bytes = 2 if narrow.bits >= 4 else 4
    return Sensitivity(
        model=type(model).__name__,
        tokens=tokens,
        compared=losses.compared,
        rows=len(rows),
        seed=seed,
        group_size=group_size,
        tied=scheme.tied,
        float_bytes=_float_bytes(model, scheme),
        wall_s=time.monotonic() - began,
        together=losses.together,
        weights={
            name: _layer_cost(model, name, candidates[name], kl, scale_bytes) for name, kl in losses.alone.items()
        },
        levels=narrow.levels if narrow.bits < 4 else None,
    )


def _probe(
    model: PreTrainedModel,
    candidates: layer_sensitivity.Candidates,
    batches: Sequence[layer_sensitivity.ProbeBatch],
    device: str,
) -> layer_sensitivity.LayerDivergences:
    """Measure the loss of every weight at every width, showing progress."""
    # One step a batch, weight and width.
    total = len(batches) * sum(map(len, candidates.values()))
    with progress.bar("quantizing one weight at a time", total) as bar:
        steps = iter(range(1, total + 1))

        def advance(name: str, bits: int) -> None:
            bar.update(next(steps), f"{name} int{bits}")

        losses = layer_sensitivity.measure_layers(model.to(device), candidates, batches, advance)
    model.to("cpu")  # the GPU's memory is for whatever comes next
    return losses


def choose_bits(measured: Sensitivity, options: SensitivityOptions) -> Choice | None:
    """Choose bits under the limit in `options`; None where it has none.

    Raises:
        UsageError: the limit cannot be met.
    """
    if options.max_size_mb is not None:
        return within_budget(measured.costs, measured.float_bytes, options.max_size_mb)
    if options.max_kl is not None:
        return within_kl(measured.costs, measured.float_bytes, options.max_kl)
    return None


def _batches(
    rows: Sequence[dict[str, list[int]]], tokenizer: PreTrainedTokenizerBase, device: str
) -> Iterator[layer_sensitivity.ProbeBatch]:
    """Yield padded batches on a device, with a mask of the tokens that training puts loss on."""
    collate = tokenization.Collator(tokenizer)
    for batch in group_by_length(rows, BATCH_TOKENS):
        tensors = collate(batch)
        # The logits at position t predict the label at t + 1.
        compared = torch.zeros_like(tensors["labels"], dtype=torch.bool)
        compared[:, :-1] = tensors["labels"][:, 1:] != IGNORED
        if compared.any():
            ids, mask = tensors["input_ids"], tensors["attention_mask"]
            yield layer_sensitivity.ProbeBatch(ids.to(device), mask.to(device), compared.to(device))


def _layer_cost(
    model: PreTrainedModel,
    name: str,
    schemes: Mapping[int, WeightScheme],
    kl: Mapping[int, float],
    scale_bytes: int,
) -> LayerCost:
    rows, width = model.get_submodule(name).weight.shape
    costs = {
        bits: Cost(kl[bits], weight_bytes(rows, width, bits, spec.group_size, scale_bytes))
        for bits, spec in schemes.items()
    }
    return LayerCost(decoder.layer_index(name), name.rpartition(".")[2], (rows, width), costs)


def _float_bytes(model: PreTrainedModel, scheme: Scheme) -> int:
    """Return the bytes of all parameters that the scheme does not quantize, in float32."""
    quantized = {f"{name}.weight" for name in scheme.weights}
    return sum(4 * p.numel() for name, p in model.named_parameters() if name not in quantized)


def _read_same_finetune(run: Run, folder: Path, options: SensitivityOptions) -> Sensitivity:
    """Read an earlier measurement.

    Raises:
        RunError: it was made on another fine-tune than the run now has, or with other widths or levels.
    """
    if read_manifest(folder)["reference_sha256"] != _reference_sha256(run):
        raise RunError(f"{folder} was measured on another fine-tune. Give --force to measure again.")
    measured = read_sensitivity(folder)
    if options.width is not None and options.width != min(measured.widths):
        raise RunError(
            f"--width {options.width}: {folder} was measured at {' and '.join(map(str, measured.widths))} bits. Give "
            "--force to measure again, or leave --width out."
        )
    levels = LinearCodes.of_training(adapter_metadata(run.reference)).levels
    if measured.levels not in (None, levels):
        raise RunError(
            f"{folder} was measured with --weight-levels {measured.levels}, and {run.path} was trained with {levels}. "
            "Give --force to measure again."
        )
    # --data and other --tokens or --seed have no effect without measuring again, so that is mentioned. Which rows the
    # measurement was made on is not recorded.
    differs = options.data is not None or (options.tokens, options.seed) != (measured.tokens, measured.seed)
    source = "" if options.data is None else f" of --data {options.data}"
    hint = f"; --force measures again, on {options.tokens}{source} (seed {options.seed})" if differs else ""
    progress.info(f"Choosing bits from {folder}, measured on {measured.tokens} tokens (seed {measured.seed}){hint}")
    return measured


def _write(run: Run, folder: Path, measured: Sensitivity, choice: Choice | None) -> None:
    """Write the measurement, the page and the bits that were chosen, replacing what is there."""
    model = MeasuredModel.of_training(adapter_metadata(run.reference))
    with replace_folder(folder, force=True) as work:
        write_text(work / MEASURED, json.dumps(dataclasses.asdict(measured), indent=1) + "\n")
        if choice is not None:
            save_bits(work / BITS, choice, model, measured.levels)
        write_text(work / PAGE, render(measured, choice))
        write_manifest(work, "sensitivity", reference_sha256=_reference_sha256(run))


def _reference_sha256(run: Run) -> str:
    return sha256(run.reference / MANIFEST)
