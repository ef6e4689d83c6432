"""The command line: instant help, one home per default, one paragraph per error."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qat_edge import config
from qat_edge.cli import commands, flags
from qat_edge.errors import RunError, UsageError
from qat_edge.options import (
    CompareOptions,
    DoctorOptions,
    EvalOptions,
    ExportOptions,
    FinetuneOptions,
    PlanOptions,
    QuantizeOptions,
    SensitivityOptions,
    SweepOptions,
    ValidateOptions,
)
from qat_edge.run import Run

VERBS: dict[str, Any] = {
    "plan": PlanOptions,
    "finetune": FinetuneOptions,
    "sweep": SweepOptions,
    "sensitivity": SensitivityOptions,
    "quantize": QuantizeOptions,
    "export": ExportOptions,
    "doctor": DoctorOptions,
    "validate": ValidateOptions,
    "eval": EvalOptions,
    "compare": CompareOptions,
}
COMMANDS = [
    "plan",
    "finetune",
    "sweep",
    "sensitivity",
    "quantize",
    "export",
    "verify",
    "doctor",
    "validate",
    "eval",
    "task-rows",
    "compare",
    "report",
    "push",
    "generate",
    "chat",
    "demo",
]
HEAVY = ("torch", "transformers", "torchao", "executorch", "onnx", "onnxruntime", "peft", "datasets", "numpy", "rich")
REQUIRED = {"finetune": {"model": "m", "data": "d"}, "eval": {"task": "gsm8k"}}
FIELDS = [(section, field) for section, cls in VERBS.items() for field in dataclasses.fields(cls)]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys; from qat_edge.cli.commands import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit: pass\n"
        f"loaded = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("Usage:")


def test_commands_are_listed_in_the_order_of_the_work() -> None:
    assert list(commands.main.commands) == COMMANDS


def other(field: dataclasses.Field[Any], hint: Any) -> tuple[list[str], Any]:
    """Arguments and value that differ from the default of `field`."""
    name, choices = config.flag_name(field.name), field.metadata["choices"]
    if hint is bool:
        return ([f"--no-{name[2:]}"], False) if field.default else ([name], True)
    if choices:
        value = next(c for c in reversed(choices) if c != field.default and (c,) != field.default)
        return [name, str(value)], (value,) if isinstance(field.default, tuple) else value
    if isinstance(field.default, tuple):
        return [name, "a", name, "b"], ("a", "b")
    if "int" in str(hint):
        return [name, "97"], 97
    if "float" in str(hint):
        return [name, "0.875"], 0.875
    value = "pi5" if field.name == "profile" else "other"  # a profile is read at once
    return [name, value], value


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_every_flag_changes_its_field(
    section: str, field: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import typing

    # The options of a base are read at once, too.
    config.save(tmp_path / "other" / "config.yaml", "finetune", FinetuneOptions(model="m", data="d", steps=0))
    monkeypatch.chdir(tmp_path)

    cls = VERBS[section]
    arguments, expected = other(field, typing.get_type_hints(cls)[field.name])
    seen: list[Any] = []

    class Stop(UsageError):
        pass

    def capture(*given: Any) -> Any:
        seen.append(config.load(given[0], given[1], given[2], {k: None if v == () else v for k, v in given[3].items()}))
        raise Stop("seen")

    monkeypatch.setattr(commands, "load_options", capture)
    required = [a for k, v in REQUIRED.get(section, {}).items() if k != field.name for a in (f"--{k}", v)]
    position = ["--out", "x"] if section in ("finetune", "sweep") else ["run"]
    CliRunner().invoke(commands.main, [section, *position, *required, *arguments])
    assert getattr(seen[0], field.name) == expected
    assert getattr(seen[0], field.name) != field.default


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("finetune: {model: m, data: d, steps: 7, learning_rate: 1e-3, target_modules: q_proj}\n")
    options = config.load(FinetuneOptions, "finetune", path, {"steps": 9, "seed": 0, "model": None})
    assert (options.model, options.steps, options.seed) == ("m", 9, 0)
    assert options.learning_rate == 1e-3 and options.target_modules == ("q_proj",)
    config.save(tmp_path / "saved.yaml", "finetune", options)
    config.save(tmp_path / "saved.yaml", "export", ExportOptions())
    assert config.load(FinetuneOptions, "finetune", tmp_path / "saved.yaml", {}) == options
    assert config.load(ExportOptions, "export", tmp_path / "saved.yaml", {}) == ExportOptions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("finetune: {lora_rnk: 4}", r"unknown key 'finetune.lora_rnk'. Did you mean 'lora_rank'\?"),
        ("finetun: {}", r"unknown section 'finetun'. Did you mean 'finetune'\?"),
        ("model: m\ndata: d", r"'model' is outside of every section\. .* of 'finetune'.*: write the line 'finetune:'"),
        (
            "target: [onnx]\ndeployment: [qat]",
            r"'target' is outside .* of 'compare', or of another .*\(export, validate\)",
        ),
        ("finetune: {steps: many}", r"finetune.steps: expected int, found 'many'"),
        ("finetune: {steps: -1}", r"finetune.steps: -1 is below the least permitted value, 0"),
        ("finetune: {group_size: 48}", r"finetune.group_size: 48 is not one of 32, 64, 128"),
        ("finetune: {gradient_checkpointing: 1}", r"expected bool, found 1"),
        ("finetune: 3", r"section 'finetune' must hold"),
        ("- a", r"expected sections such as 'finetune:'"),
        ("a: [", r"cannot be read as YAML"),
        ("export: {}", r"--model is missing"),
    ],
)
def test_bad_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        config.load(FinetuneOptions, "finetune", path, {})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["finetune", "--out", "x"], 2, "--model is missing"),
        (["finetune", "--out", "x", "--config", "nowhere.yaml"], 2, "nowhere.yaml: no such file"),
        (["finetune", "--out", "nowhere", "--resume"], 1, "nowhere: no such run folder"),
        (["export", "nowhere"], 1, "nowhere: no such run folder"),
        (["export", "nowhere", "--target", "tflite"], 2, "'tflite' is not one of"),
        (["sweep", "--out", "x"], 2, "--model is missing"),
        (["sweep", "--out", "nowhere", "--resume"], 1, "nowhere has no sweep.yaml"),
        (["sensitivity", "nowhere"], 1, "nowhere: no such run folder"),
        (["verify", "nowhere"], 1, "no such run folder"),
        (["validate", "nowhere"], 1, "no such run folder"),
        (["report", "nowhere"], 1, "no such run folder"),
        (["generate", "nowhere", "hello"], 1, "no such run folder"),
    ],
)
def test_errors_are_one_paragraph(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(commands.main, arguments)
    assert result.exit_code == code
    assert message in result.output and "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_run_is_named_with_its_run(tmp_path: Path) -> None:
    (tmp_path / "run/reports").mkdir(parents=True)
    for name in ("run/config.yaml", "run/reports/local.json", "text.txt"):
        (tmp_path / name).touch()
    for arguments, message in [
        (["report", "run/reports/local.json"], f"Name its run folder, {tmp_path / 'run'}."),
        (["export", "text.txt"], "Name the folder given to --out."),
    ]:
        result = CliRunner().invoke(commands.main, [arguments[0], str(tmp_path / arguments[1])])
        assert result.exit_code == 1 and f"{arguments[1]}: a file, not a run folder. {message}" in result.output
    with pytest.raises(RunError, match="a file, not a run folder"):
        Run.to_resume(tmp_path / "text.txt")


# --- names of 0.1.0 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "old", "field", "value", "now"),
    [
        ("finetune", ["--ptq-start", "hqq"], "ptq_init", "hqq", "--ptq-start is now --ptq-init"),
        ("finetune", ["--ptq-init", "cd"], "ptq_init", "coordinate-descent", "--ptq-init cd is now coordinate-descent"),
        ("quantize", ["--method", "cd"], "method", "coordinate-descent", "--method cd is now coordinate-descent"),
        ("export", ["--ptq", "cd"], "ptq", ("coordinate-descent",), "--ptq cd is now coordinate-descent"),
        ("validate", ["--budget"], "error_budget", True, "--budget is now --error-budget"),
        ("sensitivity", ["--budget-mb", "90"], "max_size_mb", 90.0, "--budget-mb is now --max-size-mb"),
    ],
)
def test_old_names_work_with_a_warning(
    verb: str, old: list[str], field: str, value: Any, now: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Stop(UsageError):
        pass

    def capture(cls: type, *given: Any) -> Any:
        seen.append(flags.load_options(cls, *given))
        raise Stop("seen")

    monkeypatch.setattr(commands, "load_options", capture)
    required = ["--model", "m", "--data", "d", "--out", "x"] if verb == "finetune" else ["run"]
    result = CliRunner().invoke(commands.main, [verb, *required, *old])
    assert getattr(seen[0], field) == value
    assert now in " ".join(result.stderr.split())


@pytest.mark.parametrize("verb", ["finetune", "validate", "sensitivity"])
def test_old_names_are_not_in_the_help(verb: str) -> None:
    shown = CliRunner().invoke(commands.main, [verb, "--help"]).output
    assert not [old for old in ("--ptq-start", "--budget ", "--budget-mb") if old in shown]


def test_old_names_in_files_are_read_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("finetune: {model: m, data: d, ptq_start: cd}\nvalidate: {budget: true}\n")
    assert config.load(FinetuneOptions, "finetune", path, {}).ptq_init == "coordinate-descent"
    assert config.load(ValidateOptions, "validate", path, {}).error_budget is True
    assert config.renamed_in_use(FinetuneOptions, "finetune", path, {}) == [
        f"{path}: 'finetune.ptq_start' is now 'finetune.ptq_init'; the old name still works.",
        f"{path}: 'finetune.ptq_init' cd is now coordinate-descent; the old name still works.",
    ]
    assert config.renamed_in_use(FinetuneOptions, "finetune", None, {"model": "m"}) == []


def test_help_has_an_example_and_groups() -> None:
    shown = CliRunner().invoke(commands.main, ["finetune", "--help"]).output
    order = ["Example:", "Model and data:", "Training:", "Quantization:", "Hardware:", "Output:"]
    assert sorted(order, key=shown.index) == order
    assert shown.index("--ptq-init") > shown.index("Quantization:")


def test_an_option_under_both_names_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("finetune: {model: m, data: d, ptq_start: hqq, ptq_init: awq}\n")
    with pytest.raises(UsageError, match="--ptq-start and --ptq-init are one option"):
        config.load(FinetuneOptions, "finetune", path, {})


def test_on_and_off_in_yaml_are_the_choices_of_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for written, value in (("on", "on"), ("off", "off"), ("auto", "auto")):
        path.write_text(f"finetune: {{model: m, data: d, rotate: {written}}}\n")
        assert config.load(FinetuneOptions, "finetune", path, {}).rotate == value


def test_every_command_has_a_short_help_that_fits_a_line() -> None:
    shown = CliRunner().invoke(commands.main, ["--help"]).output
    assert "..." not in shown.partition("Commands:")[2]


@pytest.mark.parametrize(("section", "near"), [("export", "context_length"), ("validate", "min_top1")])
def test_keys_of_all_sections_are_checked_whichever_verb_reads_the_file(
    tmp_path: Path, section: str, near: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"finetune:\n  steps: 2\n{section}:\n  {near}x: 1\n")
    done = CliRunner().invoke(commands.main, ["finetune", "--config", str(path), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert f"unknown key '{section}.{near}x'. Did you mean '{near}'?" in " ".join(done.output.split())


def test_a_context_of_the_export_beyond_the_model_is_refused_before_training(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say 1", "completion": "1!"}\n' * 4)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"finetune:\n  model: {tiny_model_folder}\n  data: {tmp_path}/rows.jsonl\n  steps: 2\n  track: none\n"
        "export:\n  context_length: 513\n"
    )
    done = CliRunner().invoke(commands.main, ["finetune", "--config", str(path), "--out", str(tmp_path / "run")])
    assert done.exit_code == 1
    assert "--context-length 513: the model has positions for 512 tokens" in " ".join(done.output.split())
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_characters_that_the_encoding_of_stdout_does_not_have_are_escaped(encoding: str) -> None:
    code = (
        "from qat_edge.cli import commands, console\n"
        "commands.main.callback = lambda verbose: None\n"
        "commands.main.command('say')(lambda: (console.echo('\\xe9 \\u4f60'), console.echo_generated('\\U0001f600')))\n"
        "commands.main(['say'])"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.decode(encoding).splitlines() == ["\xe9 \\u4f60", "\\U0001f600"]


@pytest.mark.parametrize(
    ("words", "index", "expected"),
    [("qat-edge ex", 1, "plain,export"), ("qat-edge export run --target on", 4, "plain,onnx")],
)
def test_the_shell_completes_commands_and_values(words: str, index: int, expected: str) -> None:
    """The variable is click's: https://click.palletsprojects.com/en/stable/shell-completion/"""
    given = {"COMP_WORDS": words, "COMP_CWORD": str(index), "_QAT_EDGE_COMPLETE": "bash_complete"}
    command = [
        sys.executable,
        "-c",
        "import sys; sys.argv[0] = 'qat-edge'; from qat_edge.cli.commands import main; main()",
    ]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [expected]
