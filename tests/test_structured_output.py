"""A schema of the answers goes the whole line: exported, verified, doctored, validated, reported, generated with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import qat_edge
from conftest import relist, train_run
from data.chat_templates import THINKING
from qat_edge.cli import commands
from qat_edge.data.answer_schema import AnswerSchema, read_schema
from qat_edge.errors import ArtifactError, DataError, ExportError, RunError, UsageError
from qat_edge.manifest import MANIFEST
from qat_edge.options import QuantizeOptions
from qat_edge.report.collect import _verified
from qat_edge.run import Run
from qat_edge.verbs.exported_schema import try_schema, wanted_schema
from qat_edge.verbs.quantize_model import quantize_model
from qat_edge.verbs.verify import verify
from qat_edge_exporters.targets import target_named

# Answers are short, so that a random model ends them.
SCHEMA: dict[str, Any] = {"anyOf": [{"enum": ["dog", "cat"]}, {"type": "integer", "minimum": 0, "maximum": 99}]}
CONTEXT = 128


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(commands.main, [str(argument) for argument in arguments])


def chats(*answers: str) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": answer}]}
        for i, answer in enumerate(answers)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_schema(path: Path, schema: Any) -> Path:
    path.write_text(json.dumps(schema))
    return path


def quantized(model: Path, folder: Path, rows: list[dict[str, Any]]) -> Run:
    data = write_rows(folder / "rows.jsonl", rows)
    quantize_model(str(model), folder / "run", QuantizeOptions(method="rtn", calibration_data=str(data)))
    return Run.open(folder / "run")


@pytest.fixture(scope="module")
def plain(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing was exported from."""
    return quantized(tiny_model_folder, tmp_path_factory.mktemp("plain"), chats('"dog"', "7", '"cat"', "12"))


@pytest.fixture(scope="module")
def exported(plain: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("exported")
    run = Run(Path(shutil.copytree(plain.path, folder / "run")))
    schema = write_schema(folder / "answer.json", SCHEMA)
    targets = ("executorch", "onnx", "gguf")
    qat_edge.export(run, target=targets, schema=schema, ptq=("none",), context_length=CONTEXT)
    return run


@pytest.fixture
def copy(exported: Run, tmp_path: Path) -> Run:
    """A copy of the exported run that a test may change."""
    return Run(Path(shutil.copytree(exported.path, tmp_path / "run")))


# --- export, verify, doctor --------------------------------------------------------------------------------


def test_schema_and_grammar_are_part_of_the_artifacts(exported: Run) -> None:
    expected = {"executorch": set(), "onnx": {"grammar.lark"}, "gguf": {"grammar.gbnf"}}
    for target, grammars in expected.items():
        folder = exported.exports / target
        assert {path.name for path in folder.glob("grammar.*")} == grammars
        assert (folder / "schema.json").read_text() == exported.schema.read_text()
        assert {"schema.json", *grammars} <= set(json.loads((folder / MANIFEST).read_text())["files"])
    assert read_schema(exported.schema, UsageError) == AnswerSchema(SCHEMA)


def test_the_same_export_is_kept_and_another_schema_refused(exported: Run, copy: Run, tmp_path: Path) -> None:
    again = write_schema(tmp_path / "answer.json", SCHEMA)
    options: dict[str, Any] = {"target": ("onnx",), "ptq": ("none",), "context_length": CONTEXT}
    assert qat_edge.export(copy, schema=again, **options) == []
    before = {path: path.read_bytes() for path in copy.path.rglob("*") if path.is_file()}
    other = write_schema(tmp_path / "other.json", {"type": "integer"})
    with pytest.raises(RunError, match=r"--schema .*other\.json: .* was exported with another schema.*--force"):
        qat_edge.export(copy, schema=other, **options)
    with pytest.raises(RunError, match=r"exists already, .* would write: it was exported with --schema"):
        qat_edge.export(copy, **options)
    assert {path: path.read_bytes() for path in copy.path.rglob("*") if path.is_file()} == before


def test_verify_compares_schema_and_grammar_with_the_run(copy: Run) -> None:
    (result,) = verify(copy, ["gguf"])
    assert result.faults == []
    folder = copy.exports / "gguf"
    # Somebody changes the file and the manifest.
    (folder / "grammar.gbnf").write_text("root ::= [0-9]\n")
    relist(folder)
    (result,) = verify(copy, ["gguf"])
    assert [fault for fault in result.faults if "grammar.gbnf: not the grammar of schema.json" in fault]
    write_schema(folder / "schema.json", {"type": "integer"})
    relist(folder)
    (result,) = verify(copy, ["gguf"])
    assert [fault for fault in result.faults if fault.startswith("schema.json: not the schema of the run")]


def test_verify_compares_the_others_where_one_cannot_be_read(copy: Run) -> None:
    (copy.exports / "executorch" / MANIFEST).unlink()
    (copy.exports / "onnx" / MANIFEST).write_text("{")
    found = {result.target: result for result in verify(copy, [])}
    assert list(found) == ["executorch", "gguf", "onnx"]
    assert found["gguf"].is_readable and found["gguf"].faults == []
    for target, reason in {"executorch": f"no {MANIFEST} here", "onnx": f"{MANIFEST}: damaged (not JSON"}.items():
        assert not found[target].is_readable and reason in found[target].faults[0]
    done = cli("verify", copy.path)
    assert done.exit_code == 1
    assert "exports/executorch: cannot be read, so that nothing was compared" in done.stdout
    assert "exports/gguf: 14 of 14 linear layers equal" in done.stdout
    # The record of a folder without a manifest stands until the folder changes.
    rows = {row["target"]: row["manifest_sha256"] for row in json.loads(copy.verified.read_text())}
    assert rows["executorch"] == "" and all(rows[target] for target in ("gguf", "onnx"))
    missing: dict[str, str] = {}
    assert len(_verified(copy, missing)) == 3 and not missing


def test_a_damaged_schema_of_the_run_is_a_fault_of_the_artifacts_with_one(copy: Run, tmp_path: Path) -> None:
    copy.schema.write_bytes(b"\xff")
    (result,) = verify(copy, ["gguf"])
    assert result.is_readable and result.linears_equal == result.linears == 14
    (fault,) = result.faults
    assert fault.startswith("schema.json: it cannot be compared with the schema of the run.") and "UTF-8" in fault
    assert cli("verify", copy.path, "--target", "gguf").exit_code == 1

    # One next to an artifact is another schema, which --force replaces.
    (copy.exports / "onnx" / "schema.json").write_bytes(b"\xff")
    schema = str(write_schema(tmp_path / "s.json", SCHEMA))
    with pytest.raises(RunError, match="exports/onnx was exported with another schema"):
        wanted_schema(copy, schema, [target_named("onnx")], force=False)
    assert wanted_schema(copy, schema, [target_named("onnx")], force=True) == AnswerSchema(SCHEMA)


def test_doctor_says_which_runtime_constrains(copy: Run) -> None:
    for target, expected in {
        "onnx": "onnxruntime-genai constrains answers by it (took the grammar here). Give it grammar.lark: ",
        "gguf": "llama.cpp constrains answers by it (took the grammar here). Give it grammar.gbnf: --grammar-file",
    }.items():
        done = cli("doctor", copy.exports / target)
        assert done.exit_code == 0 and expected in done.output, done.output
    # The .pte itself is examined elsewhere; its line names the reason.
    done = cli("doctor", copy.exports / "executorch", "--json")
    schema = json.loads(done.stdout)["schema"]
    assert schema["runtime"] == "" and schema["faults"] == []
    assert schema["note"].startswith("ExecuTorch's LLM runner takes no grammar")

    write_schema(copy.exports / "gguf" / "schema.json", {"type": "strnig"})
    done = cli("doctor", copy.exports / "gguf")
    assert done.exit_code == 1 and "schema.json: no valid JSON schema: $.type: 'strnig'" in done.output
    (copy.exports / "onnx" / "grammar.lark").unlink()
    done = cli("doctor", copy.exports / "onnx")
    assert done.exit_code == 1 and "grammar.lark: missing next to schema.json" in done.output


# --- validate, report, generate ----------------------------------------------------------------------------


def test_validate_reports_valid_answers_with_and_without_the_grammar(copy: Run, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "eval.jsonl", chats('"dog"', "7", "no JSON", '"cat"'))
    flags = ["--eval-data", rows, "--tokens", 64, "--window", 32, "--prefill", 8, "--decode", 4, "--repeats", 1]
    done = cli("validate", copy.path, *flags, "--max-new-tokens", 12)
    assert done.exit_code == 0, done.output
    assert "1 of 4 expected answers are not valid by it" in done.output
    rows_of = {row["target"]: row for row in json.loads((copy.reports / "local.json").read_text())["measured"]}
    assert rows_of["torch"]["schema"] is None
    for target in ("onnx", "gguf"):
        found = rows_of[target]["schema"]
        assert (found["answers"], found["left_out"], found["valid"]) == (3, 1, 0), found
        assert (found["constrained"], found["cut"], found["not_measured"]) == (3, 0, "")
        assert found["first_fault"]
    found = rows_of["executorch"]["schema"]
    assert (found["answers"], found["constrained"]) == (3, None)
    assert found["not_measured"].startswith("ExecuTorch's LLM runner takes no grammar")

    lines = [line.split() for line in done.output.splitlines()]
    assert any(line[-6:] == ["3", "of", "4", "0", "(0.0%)", "3"] or "(100.0%)" in line for line in lines)
    assert "constrained answers not measured: ExecuTorch" in " ".join(done.output.split())

    assert cli("report", copy.path).exit_code == 0
    page = (copy.path / "report.html").read_text()
    section = page.split("<h2>Structured output</h2>")[1].split("<h2>")[0]
    assert "Valid, constrained" in section and ">100" in section and "takes no grammar" in section
    assert "left out: 1 prompt whose expected answer is not valid" in section


def test_constrained_text(exported: Run) -> None:
    for target in ("onnx", "gguf"):
        text = qat_edge.generate(exported, "say 3", source=target, max_new_tokens=12, constrained=True)
        assert AnswerSchema(SCHEMA).fault(text) == "", text
    with qat_edge.chat(exported, source="onnx", max_new_tokens=12, constrained=True) as conversation:
        assert [AnswerSchema(SCHEMA).fault(conversation.send("say 3")) for _ in range(2)] == ["", ""]
    for source, reason in {
        "torch": "the frozen checkpoint in torch has no grammar",
        "executorch": "LLM runner",
    }.items():
        with pytest.raises(UsageError, match=f"--constrained and --from {source}: .*{reason}.*--from onnx or --from"):
            qat_edge.generate(exported, "say 3", source=source, constrained=True)


def test_a_constrained_text_that_is_cut_says_so(exported: Run) -> None:
    done = cli("generate", exported.path, "say 3", "--from", "onnx", "--constrained", "--max-new-tokens", 1)
    assert done.exit_code == 0 and "The answer was cut after 1 token, so that it may not be valid" in done.output


def test_an_artifact_without_a_schema_constrains_nothing(copy: Run) -> None:
    folder = copy.exports / "onnx"
    for name in ("schema.json", "grammar.lark"):
        (folder / name).unlink()
    relist(folder)
    with pytest.raises(UsageError, match=r"has no schema\.json.*--target onnx .*--schema FILE --force"):
        qat_edge.generate(copy, "say 3", source="onnx", constrained=True)


# --- tools -------------------------------------------------------------------------------------------------


def test_calls_of_the_tools_in_the_training_rows(model_copy: Path, tmp_path: Path) -> None:
    (model_copy / "chat_template.jinja").write_text(THINKING)
    tool = {"name": "go", "parameters": {"properties": {"to": {"enum": ["home", "work"]}}, "required": ["to"]}}
    call = {"type": "function", "function": {"name": "go", "arguments": {"to": "home"}}}
    rows = [
        {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "tool_calls": [call]}],
            "tools": [{"type": "function", "function": tool}],
        }
        for text in ("Home.", "To my place.")
    ]
    run = quantized(model_copy, tmp_path, rows)
    qat_edge.export(run, target="gguf", schema="tools", ptq=("none",), context_length=512)
    answer = read_schema(run.exports / "gguf" / "schema.json", UsageError)
    assert (answer.before, answer.after) == ("<tool_call>\n", "\n</tool_call>")
    assert answer.fault('<tool_call>\n{"name": "go", "arguments": {"to": "work"}}\n</tool_call>') == ""
    text = qat_edge.generate(run, "Home.", source="gguf", max_new_tokens=300, constrained=True)
    assert answer.fault(text) == "", text


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "error", "message"),
    [
        ({"type": "strnig"}, DataError, r"--schema .*s\.json: no valid JSON schema: \$\.type"),
        (["a"], DataError, r"--schema .*s\.json: expected a JSON object, found list"),
        (
            {"properties": {"a": {"type": "string", "pattern": "a"}}},
            ExportError,
            r"--schema .*s\.json: the schema cannot become a grammar: \$\.properties\.a\.pattern is a keyword, which "
            r"llama\.cpp's grammar does not express.*or leave out --target gguf\.",
        ),
        (
            {"not": {"type": "string"}},
            ExportError,
            r"\$\.not is a keyword, which onnxruntime-genai's guidance does not express.*or leave out --target onnx\.",
        ),
    ],
)
def test_what_cannot_constrain_is_refused_before_any_work(
    schema: Any, error: type[Exception], message: str, plain: Run, tmp_path: Path
) -> None:
    path = write_schema(tmp_path / "s.json", schema)
    with pytest.raises(error, match=message):
        qat_edge.export(plain, target=("onnx", "gguf"), schema=path, ptq=("none",))
    assert not plain.exports.exists() and not plain.schema.exists()


def test_a_missing_file_and_rows_without_tools_are_named(plain: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--schema .*none\.json: no such file"):
        qat_edge.export(plain, schema=tmp_path / "none.json")
    with pytest.raises(DataError, match=r"--schema tools: .*rows\.jsonl has no rows with 'tools'"):
        qat_edge.export(plain, schema="tools")
    assert not plain.exports.exists() and not plain.schema.exists()


def test_a_grammar_that_the_runtime_refuses_leaves_nothing(plain: Run, tmp_path: Path) -> None:
    """A regular expression that Python reads and llguidance does not."""
    run = Run(Path(shutil.copytree(plain.path, tmp_path / "run")))
    path = write_schema(tmp_path / "s.json", {"type": "string", "pattern": "a(?=b)"})
    with pytest.raises(ExportError, match=r"the ONNX artifact was not written, .*look-around"):
        qat_edge.export(run, target="onnx", schema=path, ptq=("none",), context_length=CONTEXT)
    assert not (run.exports / "onnx").exists() and not run.schema.exists()
    # The corrected schema needs no --force.
    corrected = write_schema(tmp_path / "s.json", SCHEMA)
    assert wanted_schema(run, str(corrected), [target_named("onnx")], force=False) == AnswerSchema(SCHEMA)


def test_a_run_that_was_never_exported_gets_a_schema(
    tiny_model_folder: Path, tmp_path: Path, messages: list[str]
) -> None:
    run = train_run(tiny_model_folder, tmp_path)
    assert not run.quantized.exists()
    options: dict[str, Any] = {"ptq": ("none",), "context_length": CONTEXT}
    with pytest.raises(DataError, match="no valid JSON schema"):
        qat_edge.export(run, target="onnx", schema=write_schema(tmp_path / "a.json", {"type": "strnig"}), **options)
    assert not run.quantized.exists()
    qat_edge.export(run, target="onnx", schema=write_schema(tmp_path / "b.json", SCHEMA), **options)
    assert (run.exports / "onnx" / "grammar.lark").is_file()

    # An artifact that keeps the earlier schema is named.
    other = write_schema(tmp_path / "c.json", {"enum": ["dog"]})
    qat_edge.export(run, target="executorch", schema=other, force=True, **options)
    assert any("exports/onnx has another schema than" in line for line in messages)


def test_a_target_without_a_grammar_is_named_and_not_its_folder(messages: list[str]) -> None:
    try_schema(Path(".executorch.host-1.2-abc"), target_named("executorch"))
    assert messages[0].startswith("executorch: ExecuTorch's LLM runner takes no grammar")


def test_tools_is_no_path_even_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qat_edge.option_paths import absolute
    from qat_edge.options import ExportOptions

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools").write_text("{}")
    assert absolute(ExportOptions(schema="tools")).schema == "tools"
    assert absolute(ExportOptions(schema="./tools")).schema == str(tmp_path / "tools")


def test_a_damaged_schema_next_to_an_artifact_is_named(copy: Run) -> None:
    folder = copy.exports / "onnx"
    (folder / "schema.json").write_text("{")
    relist(folder)
    with pytest.raises(ArtifactError, match=r"schema\.json: not JSON"):
        qat_edge.generate(copy, "say 3", source="onnx", constrained=True)
