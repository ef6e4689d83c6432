"""What surrounds the figures: options, machine, versions, identities, and the words explained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qat_edge.evaluate.encoder_results import MEASURES, Comparison
from qat_edge.evaluate.results import Measured, Report
from qat_edge.report.collect import Story
from qat_edge.report.figures import label, megabytes, number
from qat_edge.report.tables import Cell, Row, Table

UNITS = {
    "_bytes": (1e6, "MB"),
    "_ms": (1, "ms"),
    "_s": (1, "s"),
    "_mb": (1, "MB"),
    "_ghz": (1, "GHz"),
    "_mhz": (1, "MHz"),
}
WORDS = (
    ("FP32 base", "The model as it was before fine-tuning, in 32-bit floats."),
    ("FP32 fine-tuned", "Phase 1's LoRA adapters, merged in 32-bit floats. The reference of everything here."),
    (
        "QAT",
        "Quantization-aware training: phase 2 trains on with the deployed rounding in the forward pass. "
        "The codes and scales it ends with are the ones that ship.",
    ),
    (
        "PTQ: RTN, HQQ, GPTQ, AWQ",
        "Post-training quantization: the FP32 fine-tune quantized without further training. RTN (round-to-nearest) "
        "and HQQ look at the weights alone, GPTQ and AWQ also at some training rows.",
    ),
    ("Exact match", "Share of evaluation prompts whose generated answer equals the expected one."),
    (
        "Perplexity",
        "How many next tokens the model hesitates between on the evaluation text: "
        "exp of the mean loss in nats. Less is better.",
    ),
    (
        "KL",
        "Kullback–Leibler divergence of the model's next-token probabilities from the FP32 fine-tune's, "
        "mean over tokens, in nats. 0 is the same distribution.",
    ),
    ("Top-1", "Share of tokens for which both models' first choice is the same."),
    (
        "Same answers, first difference",
        "Share of evaluation prompts answered token for token as the FP32 fine-tune does, and in the other answers the "
        "median place, counted from 0, of the first divergent token.",
    ),
    ("SQNR", "Signal to quantization noise of the logits: 20 dB is an error of a tenth, 40 dB of a hundredth."),
    ("Parity", "An artifact against its own frozen checkpoint in torch: is it the function that was frozen?"),
    (
        "Noise floor",
        "The frozen checkpoint against itself with its embeddings disturbed by one part in 10 million. "
        "A last-bit difference flips rounded activations, and those flip more in deeper layers, so no two runtimes "
        "agree better than about this.",
    ),
    ("Prefill, decode", "Speed of reading the prompt, and of writing the answer token by token."),
    ("First token", "Time from handing over the whole prompt to the first token of the answer."),
    ("Memory", "Peak resident memory above what the runtime took before it loaded the artifact."),
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """A titled list of names and values."""

    title: str
    rows: list[tuple[str, str]]


def about_report(report: Report) -> list[Facts]:
    """Machine and options of one report."""
    lists = [
        Facts("Machine", [("device", report.device), ("measured", report.created), *flatten(report.machine)]),
        Facts("Runtimes", [(label(row), _runtime(row)) for row in report.measured]),
        Facts("Options of validate", flatten(report.options)),
    ]
    return [item for item in lists if item.rows]


def about_answers(comparison: Comparison) -> list[Facts]:
    """The same of an encoder."""
    machine = [("device", comparison.device), ("measured", comparison.created), *flatten(comparison.machine)]
    return [Facts("Machine", machine), Facts("Options of validate", flatten(comparison.options))]


def encoder_words(comparison: Comparison) -> list[tuple[str, str]]:
    """The words of an encoder's page, explained."""
    known = [(word, meaning) for word, meaning in WORDS if word.startswith(("FP32 fine-tuned", "QAT", "PTQ"))]
    alike = [("Same label", "Share of texts that get the label which the FP32 fine-tune gives them.")]
    return [
        *known,
        (comparison.measure.capitalize(), f"The {MEASURES[comparison.measure]}, on the evaluation rows."),
        (
            "Cosine",
            "Of an artifact's answer to a text (logits or embedding) and the FP32 fine-tune's: the mean over the "
            "texts, and the least. 1 is the same direction.",
        ),
        *(alike if any(row.agreement is not None for row in comparison.answered) else []),
        ("Parity", "An artifact against its own frozen checkpoint in torch: is it the function that was frozen?"),
    ]


def about_run(story: Story) -> list[Facts]:
    """Identities, options and versions of everything before the measurement."""
    frozen = story.quantized
    scheme = frozen.get("scheme") or {}
    lists = [
        Facts("Model", flatten(frozen.get("model") or {})),
        Facts("Data", flatten({"training": frozen.get("data"), "seed": frozen.get("seed")} if frozen else {})),
        Facts("Quantization", flatten(scheme if isinstance(scheme, dict) else {})),
        Facts("Options of finetune", flatten(story.options("finetune"))),
        Facts("Options of export", flatten(story.options("export"))),
        Facts("Versions when the weights were frozen", flatten(versions(frozen))),
    ]
    return [item for item in lists if item.rows]


def versions(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What made a part of a run, by name; empty where its manifest is missing."""
    if not manifest:
        return {}
    names = {"qat-edge": "qat_edge", "git revision": "git_revision", "python": "python", "platform": "platform"}
    libraries = manifest.get("libraries") or {}
    return {
        **{name: manifest.get(key) for name, key in names.items()},
        **{name: version for name, version in libraries.items() if version is not None},
    }


def artifacts(story: Story) -> Table | None:
    """What was exported, how long it took, and which file it is."""
    rows = []
    for name, manifest in story.exports.items():
        options, files = manifest.get("options") or {}, manifest.get("files") or {}
        context = [] if story.answers else [_number_cell(options.get("context_length"))]
        largest = max(files, key=lambda file: files[file]["bytes"], default="")
        rows.append(
            Row(
                name,
                "ptq" if name.startswith("ptq/") else "qat",
                [
                    *context,
                    _number_cell(manifest.get("wall_s")),
                    Cell(str(len(files)), len(files)),
                    Cell(largest or "–"),
                    Cell(str(files[largest].get("sha256", "–"))[:16] if largest else "–"),
                ],
            )
        )
    heads = [] if story.answers else [("Context", "tokens")]
    heads += [("Export took", "s"), ("Files", ""), ("Largest file", ""), ("Its sha256", "start")]
    return Table("Exported artifacts", heads, rows, first="Folder") if rows else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as lines, `data · sha256`, with units where the name carries one."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += flatten(value, f"{prefix}{key} · ")
            continue
        name, words = _worded(str(key), value)
        lines.append((f"{prefix}{name}", words))
    return lines


def _runtime(row: Measured) -> str:
    words = [row.runtime]
    if row.memory_bytes is not None:
        words.append(f"peak memory {megabytes(row.memory_bytes)} MB")
    if row.runtime_bytes is not None:
        words.append(f"of which {megabytes(row.runtime_bytes)} MB before the artifact was loaded")
    return ", ".join(words)


def _worded(key: str, value: Any) -> tuple[str, str]:
    if isinstance(value, bool):
        return key, "yes" if value else "no"
    if value is None:
        return key, "not set"
    if isinstance(value, int | float):
        for suffix, (divisor, unit) in UNITS.items():
            if key.endswith(suffix):
                return key.removesuffix(suffix), f"{number(value / divisor)} {unit}"
        return key, f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, list | tuple):
        return key, ", ".join(map(str, value)) or "none"
    return key, str(value)


def _number_cell(value: Any) -> Cell:
    return Cell(number(value), value) if isinstance(value, int | float) else Cell("–")
