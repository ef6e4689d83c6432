"""Model card of a repository on the Hugging Face Hub: what `verify` found and `validate` measured, and how to run it.

The metadata at its top are those of the Hub: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from qat_edge.evaluate.results import Report
from qat_edge.report import encoder_page, tables
from qat_edge.report.collect import RunResults
from qat_edge.report.formatting import TARGET_TITLES, ReportedModel, markdown_table, megabytes, plain, role
from qat_edge.report.tables import Table, TableCell, TableRow
from qat_edge_exporters.targets import EXECUTORCH, GGUF, HF, ONNX, target_named

TEXT_GENERATION = "text-generation"  # the Hub's name of the task of all models but encoders
COLUMNS = ("Size", "Perplexity", "Exact match", "KL", "Top-1", "Decode", "Prefill", "Memory")
FORMAT_TAGS = {EXECUTORCH: "executorch", ONNX: "onnx", GGUF: "gguf", HF: "compressed-tensors"}
# Format -> packages to install, and a program, the same as in the guides. FOLDER is the artifact.
PROGRAMS = {
    EXECUTORCH: (
        "executorch",
        """\
import executorch.kernels.quantized  # registers the operators of embeddings
from executorch.extension.llm.custom_ops import custom_ops  # registers the operators of attention
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

folder = "FOLDER"
runner = TextLLMRunner(f"{folder}/model.pte", f"{folder}/tokenizer.json")
settings = GenerationConfig(echo=False, max_new_tokens=8, temperature=0)
runner.generate("Hello", settings)  # prints the text as it comes
""",
    ),
    ONNX: (
        "onnxruntime-genai",
        """\
import onnxruntime_genai as og

model = og.Model("FOLDER")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=32, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Hello"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
""",
    ),
    GGUF: (
        "xllamacpp",
        """\
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = "FOLDER/model.gguf"
server = xllamacpp.Server(params)
done = server.handle_completions({"prompt": "Hello", "max_tokens": 8, "temperature": 0})
print(done["choices"][0]["text"])
""",
    ),
    HF: (
        "transformers compressed-tensors",
        """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "FOLDER"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("Hello", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0]))
""",
    ),
}


@dataclass(frozen=True)
class CardArtifact:
    """One artifact of the repository.

    Attributes:
        target: Its kind, which is also its folder in the repository.
        manifest: Its manifest.
        verified: Its entry in verified.json, without faults.
    """

    target: str
    manifest: Mapping[str, Any]
    verified: Mapping[str, Any]


def render_card(results: RunResults, artifacts: Sequence[CardArtifact], repo_id: str) -> str:
    """Return the card as Markdown, with the Hub's metadata at its top."""
    title = repo_id.partition("/")[2]
    quantized = results.quantized
    parts = [
        f"---\n{_metadata(results, artifacts).to_yaml().strip()}\n---",
        f"# {title}",
        f"{_text(results.model)}, {_made_by(results)} with qat-edge {quantized.get('qat_edge', '')}. All files hold "
        "the same codes and scales.",
        "## Files",
        _files(artifacts),
        "Each folder has a `manifest.json` with the sha256 of every file, and the versions that wrote it. `qat-edge "
        "verify` read every weight back out of the files, compared it with the frozen checkpoint, and ran them next to "
        "it:",
        "\n".join(f"- `{artifact.target}/`: {_verified(artifact.verified)}" for artifact in artifacts),
        "## Measured",
        *_measured(results, artifacts),
        "## Run",
        *_programs(results, artifacts, repo_id),
        "## Made with",
        markdown_table(("package", "version"), sorted(_versions(quantized).items())),
        "License: that of the base model and of the data applies.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(results: RunResults, artifacts: Sequence[CardArtifact]) -> ModelCardData:
    """Return what the Hub reads: the base model where it is one of the Hub, the task, and tags for its search."""
    formats = [FORMAT_TAGS[target_named(artifact.target).format] for artifact in artifacts]
    task = results.encoder.task if results.encoder else TEXT_GENERATION
    identity = (results.quantized.get("model") or {}).get("identity") or {}
    is_public = identity.get("kind") == "hub"
    base = {"base_model": identity["name"], "base_model_relation": "quantized"} if is_public else {}
    tags = ["qat-edge", "quantized", *dict.fromkeys(formats)]
    return ModelCardData(pipeline_tag=task, tags=tags, **base)


def _made_by(results: RunResults) -> str:
    scheme = results.quantized.get("scheme") or {}
    counts = (scheme.get("weights") or {}).get("counts", {})
    weights = f" ({', '.join(f'{count} {width}' for width, count in counts.items())})" if counts else ""
    trained = (results.options("finetune").get("steps") or 0) > 0
    return f"{'fine-tuned and ' if trained else ''}quantized{weights}"


def _files(artifacts: Sequence[CardArtifact]) -> str:
    rows = []
    for artifact in artifacts:
        files, target = artifact.manifest["files"], target_named(artifact.target)
        largest = max(files, key=lambda name: files[name]["bytes"])
        rows.append((
            f"`{artifact.target}/`", _text(TARGET_TITLES[target.name]),
            megabytes(sum(entry["bytes"] for entry in files.values())),
            f"`{largest}`", f"`{files[largest]['sha256']}`",
        ))  # fmt: skip
    return markdown_table(("folder", "format", "MB", "largest file", "its sha256"), rows)


def _verified(row: Mapping[str, Any]) -> str:
    parts = [f"{row['linears_equal']} of {row['linears']} linear layers"]
    if row.get("floats") is not None:
        parts.append(f"{row['floats_equal']} of {row['floats']} norms and biases")
    if row.get("adapter"):
        parts.append(f"{row['adapter_equal']} of {row['adapter']} matrices of the adapter")
    return f"{', '.join(parts)} equal; {_text(row.get('parity_line', 'parity not recorded'))}"


def _measured(results: RunResults, artifacts: Sequence[CardArtifact]) -> list[str]:
    """Return a table for each device: the float models and the artifacts of the repository."""
    targets = {artifact.target for artifact in artifacts}
    found: list[str] = []
    left = [artifact.target for artifact in artifacts]
    for measured, verdict in zip(results.measurements, results.verdicts, strict=True):
        rows: Sequence[ReportedModel] = measured.measured if isinstance(measured, Report) else measured.results
        table = tables.summary(measured) if isinstance(measured, Report) else encoder_page.summary(measured)
        kept = [
            line
            for line, row in zip(table.rows, rows, strict=True)
            if role(row) in ("base", "tuned") or (role(row) == "qat" and row.target in targets)
        ]
        own = {row.target for row in rows if role(row) == "qat"}
        left = [target for target in left if target not in own]
        device = f"{measured.machine.get('cpu_model', 'unknown processor')}, {measured.machine.get('os', '')}"
        columns = [i for i, (name, _) in enumerate(table.heads) if name in COLUMNS or results.encoder]
        found += [_text(f"On {device.strip(', ')}: {table.caption}"), _of_table(table, kept, columns)]
        # The conclusion is about all artifacts that were measured.
        found += map(_text, [verdict.headline, *verdict.notes] if own - {"torch"} <= targets else [])
    return [*found, f"Not measured: {', '.join(left)}."] if left else found


def _of_table(table: Table, rows: Sequence[TableRow], columns: Sequence[int]) -> str:
    heads = [f"{name}, {unit}" if unit else name for name, unit in table.heads]
    lines = [[_text(row.head), *(_cell(row.cells[i]) for i in columns)] for row in rows]
    return markdown_table((table.first.lower(), *(heads[i] for i in columns)), lines)


def _cell(cell: TableCell) -> str:
    below = f" ({'; '.join(_text(part.text) for part in cell.below)})" if cell.below else ""
    return ("not measured" if cell is tables.MISSING else _text(cell.text)) + below


def _programs(results: RunResults, artifacts: Sequence[CardArtifact], repo_id: str) -> list[str]:
    found = [f"```\nhf download {repo_id} --local-dir model\n```"]
    if results.encoder:
        return [*found, "Programs for classifiers and sentence encoders are in qat-edge's guide to apps."]
    found.append("These programs add no chat template: write prompts as the template in the folder does.")
    for artifact in artifacts:
        target = target_named(artifact.target)
        # Programs of a backend such as Vulkan need a build of ExecuTorch that has it.
        if target.backend is None:
            packages, program = PROGRAMS[target.format]
            versions = results.quantized.get("libraries") or {}
            packages = " ".join(
                f"{name}=={versions[name]}" if versions.get(name) else name for name in packages.split()
            )
            text = program.replace("FOLDER", f"model/{artifact.target}")
            found.append(f"{TARGET_TITLES[target.name]}, after `pip install {packages}`:\n\n```python\n{text}```")
    return found


def _versions(manifest: Mapping[str, Any]) -> dict[str, str]:
    named = {name: str(version) for name, version in (manifest.get("libraries") or {}).items() if version}
    return {**named, "python": str(manifest.get("python", ""))}


def _text(text: str) -> str:
    """Return text that Markdown shows as it is, on one line: names come from files."""
    escaped = " ".join(plain(text).split())
    for character in "\\`*_<>|[]#":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped
