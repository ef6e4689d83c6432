"""Write one part of toolkit/qat_edge/api.py: the verbs with an options dataclass as functions, its fields as keywords.

Generated, so that a default still has one home (`qat_edge.options`) while editors, mypy and the documentation see real
signatures. The rest of api.py is ordinary code. `python tools/write_api.py` writes the part; a test fails when it is
not current.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
import typing
from dataclasses import dataclass, field
from pathlib import Path

from qat_edge import remote_code
from qat_edge.options import (
    TRAINER_OPTIONS,
    ExportOptions,
    FinetuneOptions,
    PlanOptions,
    QuantizeOptions,
    ValidateOptions,
)

API = Path(__file__).parents[1] / "toolkit" / "qat_edge" / "api.py"

BEGIN = "# --- written by tools/write_api.py: do not edit up to the end of this part ---------------------------------"
END = "# --- end of the written part --------------------------------------------------------------------------------"


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
        resume: description of its parameter `resume`; empty for none.
        reads_run: whether a resumed run's options are read from it.
        left_out: options that are no parameters.
        absent: required options that may be left out.
        texts: descriptions of options, where those of the dataclass do not fit.
        writes: whether it has a parameter `force`.
    """

    name: str
    options: type
    first: dict[str, str]
    summary: str
    returns: tuple[str, str]
    raises: tuple[str, ...]
    body: str
    resume: str = ""
    reads_run: bool = False
    left_out: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    writes: bool = True


RUN = {"run": "a finished run, or its folder."}
VERBS = (
    Verb(
        name="plan",
        options=PlanOptions,
        first={"model": "Hub id, local folder or .gguf file of a causal language model, or the folder of a run."},
        summary="Predict parameters, bits, training memory, file sizes and device fit, without loading weights.",
        returns=("Plan", "Every prediction, with its unit in the documentation of its class."),
        raises=(
            "UsageError: an impossible value or combination of options, or one that a plan cannot be made for.",
            "ModelError: the model cannot be read, trained or exported.",
            "ExportError: the model has fewer positions than `context_length`.",
        ),
        body="""
            from qat_edge.verbs.plan import plan as verb
            from qat_edge.verbs.plan import resolve

            with remote_code.permit({permission}):
                return verb(resolve(str(model), options, given))
        """,
        writes=False,
    ),
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

            config.require_output(Path(out), "out")
            with remote_code.permit({permission}):
                return verb(options, Path(out), resume=resume, force=force)
        """,
        resume="continue from the run folder's last checkpoint, bit for bit.",
        reads_run=True,
    ),
    Verb(
        name="prepare",
        options=FinetuneOptions,
        first={"out": "run folder that the training writes."},
        summary="Prepare a model for a trainer of transformers or TRL, which then trains LoRA adapters and QAT.",
        returns=("PreparedTraining", "The model, its tokenizer, and the callback for the trainer."),
        raises=(
            "UsageError: an impossible value or combination of options.",
            "ModelError: the model cannot be loaded or trained.",
            "RunError: `out` exists (without `force` or `resume`), or cannot be resumed.",
        ),
        body="""
            from qat_edge.verbs.prepare import prepare as verb

            config.require_output(Path(out), "out")
            with remote_code.permit({permission}):
                return verb(options, Path(out), resume=resume, force=force)
        """,
        resume="the trainer continues from a checkpoint: train(resume_from_checkpoint=True).",
        left_out=TRAINER_OPTIONS,
        absent=("data",),
        texts={
            "model": "Hub id, local folder or .gguf file of a causal language model.",
            "data": "Rows for calibration, as for finetune; by default those that the trainer has tokenized.",
            "eval_data": "Held-out rows for validate; NAME:PART picks a split.",
            "seed": "Seed of adapters, rotation and the choice of rows for calibration.",
            "qat_start": "Start of QAT (phase 2): a fraction of the trainer's steps (< 1), or a step; 0.9 by default, "
            "0.5 with weight_bits=2.",
        },
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

            with remote_code.permit({permission}):
                return verb(_opened(run), options, force=force)
        """,
    ),
    Verb(
        name="quantize_model",
        options=QuantizeOptions,
        first={"model": "Hub id, local folder or .gguf file of a model.", "out": "run folder to write."},
        summary="Quantize a model that was not trained here by a PTQ method; the result is a run like any other.",
        returns=("Quantized", "The frozen checkpoint and how it was made."),
        raises=(
            "UsageError: no method or rows; an impossible value or combination of options.",
            "RunError: `out` exists, and `force` is not set.",
            "ModelError: the model cannot be loaded, or the method cannot process it.",
            "DataError: the rows cannot be used, or are too few.",
        ),
        body="""
            from qat_edge.verbs.quantize_model import quantize_model as verb

            config.require_output(Path(out), "out")
            with remote_code.permit({permission}):
                return verb(str(model), Path(out), options, force=force)
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

            with remote_code.permit({permission}):
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
            with remote_code.permit({permission}):
                result = validate_run(opened, options, force=force, by_device=by_device)
            require_success(result)
            return list(result.reports)
        """,
    ),
)


def source() -> str:
    """Return the text of api.py with its generated part written anew, formatted."""
    written = API.read_text(encoding="utf-8")
    head, tail = written[: written.index(BEGIN)], written[written.index(END) :]
    text = f"{head}{BEGIN}\n\n\n" + "\n\n".join(map(_function, VERBS)) + f"\n\n{tail}"
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(API), "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return done.stdout


def _function(verb: Verb) -> str:
    """Return the source of one function."""
    fields = [f for f in dataclasses.fields(verb.options) if f.name not in verb.left_out]
    hints = typing.get_type_hints(verb.options)
    required = [f for f in fields if f.default is dataclasses.MISSING and f.name not in verb.absent]
    optional = [f for f in fields if f.default is not dataclasses.MISSING]

    # Parameters: required options, the other positional ones, then everything else by keyword.
    parameters = [f"{f.name}: str | Path" for f in required]
    parameters += [f"{name}: {'Run | str | Path' if name == 'run' else 'str | Path'}" for name in verb.first]
    parameters += ["*", *(f"{name}: str | Path | None = None" for name in verb.absent)]
    parameters += [f"{f.name}: {_annotation(f, hints[f.name])} = {f.default!r}" for f in optional]
    parameters += ["resume: bool = False"] * bool(verb.resume)
    parameters += ["force: bool = False"] * verb.writes
    parameters += [f"{name}: bool = False" for name in _permission(verb)]

    texts = {f.name: f.metadata["help"] for f in fields} | verb.texts
    lines = [f"{f.name}: {texts[f.name]}" for f in required]
    lines += [f"{name}: {text}" for name, text in verb.first.items()]
    lines += [f"{name}: {texts[name]}" for name in verb.absent]
    lines += [f"{f.name}: {texts[f.name]}{_choices(f)}" for f in optional]
    lines += [f"resume: {verb.resume}"] * bool(verb.resume)
    lines += ["force: replace what exists already."] * verb.writes
    lines += [f"{name}: {remote_code.HELP}" for name in _permission(verb)]

    given = ", ".join(f"{f.name!r}: {f.name}" for f in fields if f.name not in verb.absent)
    absent = "".join(f" | {{{name!r}: TRAINER_ROWS if {name} is None else str({name})}}" for name in verb.absent)
    # A resumed run has its own options; arguments may repeat them.
    recorded = "Run.open(Path(out)).config if resume else None" if verb.reads_run else "None"
    permission = remote_code.OPTION if _permission(verb) else f"options.{remote_code.OPTION}"
    body = textwrap.indent(textwrap.dedent(verb.body).strip().format(permission=permission), "    ")
    return (
        f"@_notes_arguments\ndef {verb.name}({', '.join(parameters)}) -> {verb.returns[0]}:\n"
        + textwrap.indent(_docstring(verb, lines), "    ")
        + f"\n    given = _named({{{given}}}){absent}\n"
        + f"    options = config.load({verb.options.__name__}, {verb.name!r}, {recorded}, given)\n"
        + body
        + "\n"
    )


def _permission(verb: Verb) -> list[str]:
    """Return the parameter that permits a model's code, for verbs that do not have it among their options."""
    return [] if remote_code.OPTION in {f.name for f in dataclasses.fields(verb.options)} else [remote_code.OPTION]


def _annotation(field: dataclasses.Field[typing.Any], hint: object) -> str:
    """Return the parameter's type: a sequence for a repeatable flag, a path where text names a file."""
    if typing.get_origin(hint) is tuple:
        return "Sequence[str]"
    named = field.name in (
        "eval_data",
        "calibration_data",
        "bits",
        "text",
        "ssh_config",
        "runner_binary",
        "profile",
        "schema",
    )
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
    API.write_text(source(), encoding="utf-8", newline="\n")
