"""Write toolkit/qat_edge/api.py: the verbs as functions, with the fields of the option dataclasses as keywords.

Generated, so that a default still has one home (`qat_edge.options`) while editors, mypy and the documentation see real
signatures. `python tools/write_api.py` writes the file; a test fails when it is not current.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
import typing
from dataclasses import dataclass
from pathlib import Path

from qat_edge.options import ExportOptions, FinetuneOptions, QuantizeOptions, ValidateOptions

API = Path(__file__).parents[1] / "toolkit" / "qat_edge" / "api.py"

HEADER = '''"""The public Python API: the main commands as functions, with their flags as keyword arguments.

    from qat_edge import export, finetune, validate, verify

    run = finetune("HuggingFaceTB/SmolLM2-135M-Instruct", "train.jsonl", "runs/mine", eval_data="eval.jsonl").run
    export(run, target=["executorch"])
    verify(run)
    report, = validate(run, max_kl=0.1)

Every function raises the errors of `qat_edge.errors`, with the same messages as the command line. Messages and progress
go to the `qat_edge` logger; `qat_edge.progress.report_to` sends them elsewhere. Nothing heavy is imported before a
function is called. An argument equal to its default counts as not given: a device profile may set it.

This file is generated from `qat_edge.options` by tools/write_api.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat_edge import config
from qat_edge.options import ExportOptions, FinetuneOptions, QuantizeOptions, ValidateOptions
from qat_edge.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat_edge.evaluate.encoder_results import EncoderReport
    from qat_edge.evaluate.results import Report
    from qat_edge.verbs.export import Exported
    from qat_edge.verbs.finetune import Finetuned
    from qat_edge.verbs.quantize import Quantized
    from qat_edge.verbs.verify import Verified

__all__ = ["export", "finetune", "generate", "load_frozen", "quantize", "validate", "verify"]
'''

# The functions without an options dataclass, as they are.
FOOTER = '''
def verify(run: Run | str | Path, *, target: Sequence[str] = ()) -> list[Verified]:
    """Read every artifact back, run it on a few prompts, and compare both with the frozen checkpoint.

    Args:
        run: a run with exports, or its folder.
        target: artifacts to verify; all by default.

    Returns:
        One result per artifact.

    Raises:
        RunError: nothing was exported.
        ArtifactError: an artifact is damaged or differs from the checkpoint.
    """
    from qat_edge.verbs.verify import require_equal
    from qat_edge.verbs.verify import verify as verb

    results = verb(_opened(run), [target] if isinstance(target, str) else list(target))
    require_equal(results)
    return results


def generate(
    run: Run | str | Path,
    prompt: str,
    *,
    source: str = "torch",
    raw: bool = False,
    system: str | None = None,
    max_new_tokens: int = 128,
    emit: Callable[[str], None] | None = None,
) -> str:
    """Generate an answer to `prompt` greedily.

    Args:
        run: a finished run, or its folder.
        prompt: the user's message; with `raw`, the text to continue.
        source: "torch" for the frozen checkpoint, or an exported target such as "executorch" or "onnx".
        raw: continue the text as it is, without the chat template.
        system: system message before the prompt.
        max_new_tokens: longest answer, in tokens.
        emit: called with each piece of text as it comes.

    Returns:
        The whole answer.

    Raises:
        RunError: there is nothing to generate with.
        UsageError: the tokenizer has no chat template, or the prompt fills the artifact's context.
    """
    from qat_edge.verbs.generate import generate as verb

    pieces: list[str] = []

    def collect(piece: str) -> None:
        pieces.append(piece)
        if emit is not None:
            emit(piece)

    verb(_opened(run), prompt, source, collect, raw=raw, system=system, max_new_tokens=max_new_tokens)
    return "".join(pieces)


def load_frozen(run: Run | str | Path) -> PreTrainedModel:
    """Load a frozen checkpoint: the model whose logits every artifact reproduces.

    Args:
        run: a run, its folder, or the folder of a frozen checkpoint, such as RUN/ptq/gptq/quantized.

    Raises:
        RunError: there is no frozen checkpoint, or its files are not those that were written.
    """
    from qat_edge.errors import RunError
    from qat_edge.manifest import check_files
    from qat_edge.quant import frozen

    folder = run.quantized if isinstance(run, Run) else Path(run)
    folder = folder / "quantized" if (folder / "quantized").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder}: no frozen checkpoint here. `qat-edge quantize` or `qat-edge export` makes one.")
    check_files(folder)
    model: PreTrainedModel = frozen.load(folder)
    return model


def _opened(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else Run.open(Path(run))


def _changed(options: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that differ from their defaults, as a configuration file has them.

    Arguments left at their defaults do not count as given, so that a device profile can set them.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
    plain = {
        name: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in plain.items()
    }
    return {name: value for name, value in plain.items() if value != defaults[name]}
'''


@dataclass(frozen=True)
class Verb:
    """One generated function.

    Attributes:
        name: of the function and of its section of options.
        options: its dataclass.
        first: positional parameters that are no options, with their descriptions.
        summary: first line of the docstring.
        returns: type and description of the result.
        raises: lines of the docstring.
        body: what follows after `options` was resolved; `options` and the parameters of `first` are in scope.
        resumes: whether it has a parameter `resume`.
    """

    name: str
    options: type
    first: dict[str, str]
    summary: str
    returns: tuple[str, str]
    raises: tuple[str, ...]
    body: str
    resumes: bool = False


RUN = {"run": "a finished run, or its folder."}
VERBS = (
    Verb(
        name="finetune",
        options=FinetuneOptions,
        first={"out": "run folder to write."},
        summary="Train LoRA adapters, then continue with fake quantization in the forward pass (QAT).",
        returns=("Finetuned", "The run folder, steps, last loss, time and memory."),
        raises=(
            "UsageError: an impossible value or combination of options.",
            "ModelError: the model cannot be loaded or trained.",
            "DataError: the rows cannot be used.",
            "RunError: `out` exists (without `force` or `resume`), or cannot be resumed.",
        ),
        body="""
            from qat_edge.verbs.finetune import finetune as verb

            return verb(options, Path(out), resume=resume, force=force)
        """,
        resumes=True,
    ),
    Verb(
        name="quantize",
        options=QuantizeOptions,
        first=RUN,
        summary="Freeze the trained weights, or quantize the FP32 fine-tune without training (PTQ).",
        returns=("Quantized", "The frozen checkpoint and how it was made."),
        raises=(
            "UsageError: an impossible value or combination of options.",
            "RunError: another checkpoint exists (without `force`), or training is not finished.",
            "DataError: too little calibration data.",
            "ModelError: a model that the method cannot process.",
        ),
        body="""
            from qat_edge.verbs.quantize import quantize as verb

            return verb(_opened(run), options, force=force)
        """,
    ),
    Verb(
        name="export",
        options=ExportOptions,
        first=RUN,
        summary="Merge the adapters and freeze the codes once, then write .pte and ONNX artifacts from them.",
        returns=("list[Exported]", "One entry per artifact that was written."),
        raises=(
            "UsageError: an impossible value or combination of options.",
            "RunError: the artifacts exist and `force` is not set, or training is not finished.",
            "ExportError: a target cannot express the model, or a compiler failed.",
        ),
        body="""
            from qat_edge.verbs.export import export as verb

            return verb(_opened(run), options, force=force)
        """,
    ),
    Verb(
        name="validate",
        options=ValidateOptions,
        first={"run": "a run with exports, or its folder."},
        summary="Run every artifact in its own runtime and compare it with the FP32 fine-tune.",
        returns=("list[Report | EncoderReport]", "One report per device; for an encoder, one `EncoderReport`."),
        raises=(
            "UsageError: an impossible value or combination of options.",
            "RunError: nothing was exported, or a report exists and `force` is not set.",
            "DataError: there are no evaluation rows.",
            "DeviceError: a device cannot be reached, or a runtime failed there.",
            "GateError: a gate was missed; the reports are in RUN/reports.",
        ),
        body="""
            from qat_edge.verbs.validate import require_success, validate_run

            opened = _opened(run)
            by_device = config.for_devices(options, None, given)
            result = validate_run(opened, options, force=force, by_device=by_device)
            require_success(result)
            return list(result.reports)
        """,
    ),
)


def source() -> str:
    """Return the text of api.py, formatted."""
    text = HEADER + "\n\n" + "\n\n".join(_function(verb) for verb in VERBS) + "\n" + FOOTER
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(API), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def _function(verb: Verb) -> str:
    """Return the source of one function."""
    fields = dataclasses.fields(verb.options)
    hints = typing.get_type_hints(verb.options)
    required = [f for f in fields if f.default is dataclasses.MISSING]
    optional = [f for f in fields if f.default is not dataclasses.MISSING]

    # Parameters: required options, the other positional ones, then everything else by keyword.
    parameters = [f"{f.name}: str | Path" for f in required]
    parameters += [f"{name}: {'Run | str | Path' if name == 'run' else 'str | Path'}" for name in verb.first]
    parameters += ["*", *(f"{f.name}: {_annotation(f, hints[f.name])} = {f.default!r}" for f in optional)]
    parameters += ["resume: bool = False"] * verb.resumes + ["force: bool = False"]

    lines = [f"{f.name}: {f.metadata['help']}" for f in required]
    lines += [f"{name}: {text}" for name, text in verb.first.items()]
    lines += [f"{f.name}: {f.metadata['help']}{_choices(f)}" for f in optional]
    lines += ["resume: continue from the run folder's last checkpoint, bit for bit."] * verb.resumes
    lines += ["force: replace what exists already."]

    given = ", ".join(f"{f.name!r}: {f.name}" for f in fields)
    # A resumed run has its own options; arguments may repeat them.
    recorded = "Run.open(Path(out)).config if resume else None" if verb.resumes else "None"
    body = textwrap.indent(textwrap.dedent(verb.body).strip(), "    ")
    return (
        f"def {verb.name}({', '.join(parameters)}) -> {verb.returns[0]}:\n"
        + textwrap.indent(_docstring(verb, lines), "    ")
        + f"\n    given = _changed({verb.options.__name__}, {{{given}}})\n"
        + f"    options = config.load({verb.options.__name__}, {verb.name!r}, {recorded}, given)\n"
        + body
        + "\n"
    )


def _annotation(field: dataclasses.Field[typing.Any], hint: object) -> str:
    """Return the parameter's type: a sequence for a repeatable flag, a path where text names a file."""
    if typing.get_origin(hint) is tuple:
        return "Sequence[str]"
    named = field.name in ("eval_data", "calibration_data", "bits", "text", "ssh_config", "runner_binary", "profile")
    text = str(field.type)
    return text.replace("str", "str | Path", 1) if named else text


def _choices(field: dataclasses.Field[typing.Any]) -> str:
    """Return the permitted values as a sentence."""
    choices = field.metadata["choices"]
    return f" One of {', '.join(map(str, choices))}." if choices else ""


def _docstring(verb: Verb, arguments: list[str]) -> str:
    """Return the docstring in Google style, wrapped."""

    def wrapped(line: str) -> str:
        return textwrap.fill(line, 112, initial_indent=" " * 4, subsequent_indent=" " * 8)

    parts = [f'"""{verb.summary}\n', "Args:", *map(wrapped, arguments), "\nReturns:", wrapped(verb.returns[1])]
    parts += ["\nRaises:", *map(wrapped, verb.raises), '"""']
    return "\n".join(parts)


if __name__ == "__main__":
    API.write_text(source(), encoding="utf-8")
