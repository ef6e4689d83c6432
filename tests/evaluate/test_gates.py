"""Gates: profiles that set them, figures they are checked against, and their JUnit XML for CI."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import click
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from qat_edge import config, profiles
from qat_edge.cli import commands
from qat_edge.data.tokenization import ScoredIds
from qat_edge.errors import ArtifactError, GateError, UsageError
from qat_edge.evaluate import gates, metrics
from qat_edge.evaluate.encoder_results import EncoderReport, EncoderResult
from qat_edge.evaluate.evaluator import EvalSet, as_agreement
from qat_edge.evaluate.junit import junit_xml
from qat_edge.evaluate.results import Agreement, Budget, FaultTest, Gate, Measurement, Report, Speed, Spread
from qat_edge.options import PROFILES, ValidateOptions
from qat_edge.run import Run
from qat_edge.run_lock import LOCK
from qat_edge.verbs import validate
from qat_edge.verbs.validate import (
    Validated,
    _require_sequences_fit,
    _require_timing_fits,
    _set_by_profiles,
    require_success,
)

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / "examples" / "github-actions.yml"
ALL_GATES = [name for name in vars(ValidateOptions()) if profiles.is_gate(name)]
GATES = [name for name in ALL_GATES if name not in gates.ENCODER_ONLY_GATES]  # of models that generate text


def spread(value: float) -> Spread:
    return Spread(value, value, value)


TUNED = Measurement("fp32 fine-tuned", "torch", "torch", {"float": 1}, 10.0)
QAT = Measurement(
    "qat", "onnx", "onnxruntime", {"linears": 50_000_000}, 11.0, Agreement(64, 0.05, 0.9, 20.0), exact_match=0.8,
    speed=Speed(2, 8, 4, 2, spread(100), spread(10), spread(80)), memory_bytes=300_000_000, runtime_bytes=100_000_000,
)  # fmt: skip
BARE = Measurement("qat", "executorch", "executorch", {"linears": 50_000_000}, math.nan)
LIMITS_MET = {  # exactly the figures of TUNED and QAT
    "max_kl": 0.05, "min_top1": 0.9, "max_perplexity_ratio": 1.1, "min_exact_match": 0.8, "max_size_mb": 50.0,
    "max_memory_mb": 200.0, "min_prefill": 100.0, "min_decode": 10.0, "max_fault_chance": 0.75,
}  # fmt: skip


def options(path: Path | None = None, **flags: Any) -> ValidateOptions:
    return config.load(ValidateOptions, "validate", path, flags)


def budget(chance: float, location: str = "") -> Budget:
    result = FaultTest(bool(location), chance, 1 if location else None, location)
    return Budget("onnx", result, "", [], [], [], [])


def report(*checked: Gate, device: str = "local") -> Report:
    return Report("2026-01-02T03:04:05+00:00", device, {}, {}, 64, Agreement(64, 0.0, 1.0, None), [], list(checked))


# --- gates -------------------------------------------------------------------------------------------------


def test_every_gate_passes_at_its_limit_and_is_missed_just_past_it() -> None:
    assert sorted(LIMITS_MET) == sorted(GATES)
    budgets = [budget(0.75)]
    met = gates.check_gates(options(**LIMITS_MET), [TUNED, QAT], budgets)
    assert [gate.passed for gate in met] == [True] * len(GATES)
    stricter = {name: value * (0.99 if name.startswith("max") else 1.01) for name, value in LIMITS_MET.items()}
    missed = gates.check_gates(options(**stricter), [TUNED, QAT], budgets)
    assert [gate.passed for gate in missed] == [False] * len(GATES)
    assert {gate.flag: pytest.approx(gate.found) for gate in missed} == {
        config.flag_name(name): value for name, value in LIMITS_MET.items()
    }


def test_a_missed_exact_match_names_answers_that_are_too_long() -> None:
    note = "3 of 4 expected answers are longer than --max-new-tokens 3"
    checked = gates.check_gates(options(min_exact_match=1.0, max_kl=100.0), [TUNED, QAT], (), [note])
    assert {gate.flag: gate.why for gate in checked} == {"--min-exact-match": note, "--max-kl": ""}


def test_a_figure_that_was_not_measured_misses_its_gate() -> None:
    bounds = {field.name: field.metadata["bounds"] for field in fields(ValidateOptions)}
    loosest = {name: bounds[name][1] if name.startswith("max") else 0.0 for name in GATES}
    missed = [gate.flag for gate in gates.check_gates(options(**loosest), [TUNED, BARE]) if not gate.passed]
    assert sorted(missed) == sorted(config.flag_name(name) for name in GATES if name != "max_size_mb")


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_misses_its_gate(figure: float) -> None:
    broken = replace(QAT, agreement=Agreement(64, figure, figure, figure), perplexity=figure, exact_match=figure)
    names = ("max_kl", "min_top1", "max_perplexity_ratio", "min_exact_match")
    loosest = {name: 1e9 if name.startswith("max") else 0.0 for name in names}
    missed = gates.check_gates(options(**loosest), [TUNED, broken])
    assert [gate.passed for gate in missed] == [False] * len(names)
    with pytest.raises(GateError, match=r"--max-kl 1e\+09, measured -?(nan|inf)\. The figure is not a finite number"):
        gates.require_gates(report(*missed))
    encoder = EncoderResult("qat", "executorch", {"linears": 5}, figure, figure, figure, figure, figure)
    missed = gates.check_encoder_gates(options(min_quality=0.0, min_cosine=0.0, min_top1=0.0), [encoder])
    assert [gate.passed for gate in missed] == [False] * 3


def test_a_reference_that_overflows_lets_no_perplexity_pass() -> None:
    gate, *_ = gates.check_gates(options(max_perplexity_ratio=2.0), [replace(TUNED, perplexity=math.inf), QAT])
    assert not gate.passed


def test_a_gate_on_outputs_that_are_not_generated_is_refused() -> None:
    with pytest.raises(UsageError, match="--min-exact-match and --prompts 0"):
        gates.require_measurable(options(min_exact_match=0.5, prompts=0))
    with pytest.raises(UsageError, match="no evaluation row has an expected output"):
        gates.require_prompts(options(min_exact_match=0.5), 0)
    gates.require_prompts(options(min_exact_match=0.5), 1)
    gates.require_prompts(options(), 0)


def test_timing_and_sequences_beyond_the_context_are_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    monkeypatch.setattr(validate, "context_of_artifact", lambda folder: 64)
    _require_timing_fits([(run, "onnx")], options(prefill=32, decode=31))
    with pytest.raises(UsageError, match=r"--prefill 32 and --decode 32: timing takes 65 tokens, and .*onnx holds 64"):
        _require_timing_fits([(run, "onnx")], options(prefill=32, decode=32))

    def data(length: int) -> EvalSet:
        return EvalSet([ScoredIds([1] * length, [0])], [], [0], 0, None)

    _require_sequences_fit([(run, "onnx")], data(64))
    with pytest.raises(UsageError, match=r"--window: the longest evaluation sequence has 65 tokens, and .* holds 64"):
        _require_sequences_fit([(run, "onnx")], data(65))


def test_numbers_that_are_not_finite_fail_without_any_gate() -> None:
    broken = replace(QAT, not_finite="its logits are not finite, first at token 3 of evaluation sequence 0")
    require_success(Validated([replace(report(), measured=[TUNED, QAT])], {}))
    with pytest.raises(ArtifactError, match="local: qat, onnx: its logits are not finite, first at token 3"):
        require_success(Validated([replace(report(), measured=[TUNED, broken])], {}))
    encoder = EncoderResult(
        "qat", "executorch", {}, math.nan, not_finite="its outputs are not finite, first for text 2"
    )
    made = EncoderReport("now", "local", {}, {}, "text-classification", "accuracy", 1, 1, [encoder], [])
    with pytest.raises(ArtifactError, match="qat, executorch: its outputs are not finite, first for text 2"):
        require_success(Validated([made], {}))


def test_the_sqnr_of_equal_logits_is_none_and_that_of_no_numbers_stays_nan() -> None:
    rows, targets = np.ones((2, 3)), np.zeros(2, int)
    assert as_agreement(metrics.compare(rows, rows, targets)).sqnr_db is None
    sqnr_db = as_agreement(metrics.compare(rows, rows * np.nan, targets)).sqnr_db
    assert sqnr_db is not None and math.isnan(sqnr_db)


def test_an_encoders_gates_pass_at_their_limits_and_are_missed_just_past_them() -> None:
    limits_met = {"min_quality": 0.8, "min_cosine": 0.99, "min_top1": 0.95, "max_size_mb": 50.0}
    assert list(limits_met) == list(gates.ENCODER_GATES) and set(limits_met) <= set(ALL_GATES)
    qat = EncoderResult("qat", "executorch", {"linears": 50_000_000}, 0.8, 0.99, 0.5, 0.95, 1.0)
    rows = [EncoderResult("fp32 fine-tuned", "torch", {}, 0.0), qat, replace(qat, name="ptq (GPTQ)", quality=0.1)]
    assert [gate.passed for gate in gates.check_encoder_gates(options(**limits_met), rows)] == [True] * 4
    stricter = {name: value * (0.99 if name.startswith("max") else 1.01) for name, value in limits_met.items()}
    missed = gates.check_encoder_gates(options(**stricter), rows)
    assert [gate.passed for gate in missed] == [False] * 4
    assert {gate.flag: gate.found for gate in missed} == {
        config.flag_name(name): value for name, value in limits_met.items()
    }
    (unmeasured,) = gates.check_encoder_gates(options(min_top1=0.0), [replace(qat, agreement=None)])
    assert not unmeasured.passed and math.isnan(unmeasured.found)


@pytest.mark.parametrize("name", gates.ENCODER_ONLY_GATES)
def test_a_gate_for_encoders_is_refused_for_a_model_that_generates_text(run_folder: Path, name: str) -> None:
    flag = config.flag_name(name)
    answer = CliRunner().invoke(commands.main, ["validate", str(run_folder), flag, "0.9"])
    assert answer.exit_code == 2 and f"{flag} is for classifiers and sentence encoders" in answer.output
    assert [p.name for p in run_folder.iterdir() if p.name != LOCK] == ["config.yaml"]


def test_a_fault_misses_its_gate_and_names_its_location(tmp_path: Path) -> None:
    requested = options(max_fault_chance=0.75, error_budget=True)
    (missed,) = gates.check_gates(requested, [TUNED, QAT], [budget(0.98, "The first layer is lm_head")])
    assert (missed.passed, missed.found) == (False, 0.98)
    with pytest.raises(GateError, match=r"--max-fault-chance 0\.75, measured 0\.98\. The first layer is lm_head"):
        gates.require_gates(report(missed))
    (failure,) = ET.fromstring(junit_xml([report(missed)], {})).iter("failure")
    assert "The first layer is lm_head" in str(failure.get("message"))
    (tmp_path / "board.toml").write_text("max_fault_chance = 0.75\nerror_budget = true\n")
    assert options(profile=str(tmp_path / "board.toml")) == replace(requested, profile=str(tmp_path / "board.toml"))
    assert gates.check_gates(requested, [TUNED, QAT], [budget(0.52)])[0].passed


def test_a_gate_on_faults_is_refused_without_the_error_budget(run_folder: Path) -> None:
    answer = CliRunner().invoke(commands.main, ["validate", str(run_folder), "--max-fault-chance", "0.75"])
    assert answer.exit_code == 2 and "Give --error-budget, too" in " ".join(answer.output.split())
    assert [p.name for p in run_folder.iterdir() if p.name != LOCK] == ["config.yaml"]


# --- profiles ----------------------------------------------------------------------------------------------


def test_help_lists_every_profile() -> None:
    folder = ROOT / "devices" / "qat_edge_devices" / "profiles"
    assert sorted(p.stem for p in folder.glob("*.toml")) == sorted(PROFILES)
    for path in folder.iterdir():
        assert "not measurements" in path.read_text()


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_sets_gates_threads_and_repeats(name: str) -> None:
    loaded, (_, keys) = options(profile=name), profiles.read(name)
    assert {"threads", "repeats", "max_size_mb", "max_memory_mb", "min_decode", "max_kl"} <= set(keys)
    assert {key: config.plain(loaded)[key] for key in keys} == keys


def test_flags_win_over_the_file_and_the_file_over_the_profile(tmp_path: Path) -> None:
    profile, file = tmp_path / "board.toml", tmp_path / "c.yaml"
    profile.write_text("threads = 3\nmax_kl = 0.3\nmin_decode = 3\nmin_top1 = 0.3\n")
    file.write_text(f"validate: {{profile: {profile}, max_kl: 0.2, min_top1: null}}\n")
    loaded = options(file, max_kl=0.1)
    assert (loaded.max_kl, loaded.min_top1, loaded.min_decode, loaded.threads) == (0.1, None, 3.0, 3)
    config.save(tmp_path / "saved.yaml", "validate", loaded)
    profile.unlink()
    assert options(tmp_path / "saved.yaml") == loaded, "the options of an earlier run do not change with the profile"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_kll = 1", r"board\.toml: unknown key 'max_kll'\. Did you mean 'max_kl'\?"),
        ("device = 'local'", r"board\.toml: unknown key 'device'"),
        ("max_new_tokens = 5", r"board\.toml: unknown key 'max_new_tokens'"),
        ("max_kl = 'low'", r"board\.toml: max_kl: expected float, found 'low'"),
        ("threads = 2.5", r"board\.toml: threads: expected int, found 2\.5"),
        ("threads = 0", r"board\.toml: threads: 0 is below the least permitted value, 1"),
        ("target = ['tflite']", r"board\.toml: target: 'tflite' is not one of executorch, onnx"),
        ("target = 3", r"board\.toml: target: expected a list, found 3"),
        ("[limits]\nmax_kl = 1", r"board\.toml: unknown key 'limits'"),
        ("max_kl = ", r"board\.toml: cannot be read as TOML"),
    ],
)
def test_a_bad_profile_is_named_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "board.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        options(profile=str(tmp_path / "board.toml"))


def test_a_missing_profile_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"--profile pi4: no such profile\. Known: laptop, minimal, .*, pi5; or give"):
        options(profile="pi4")


def test_a_profile_that_is_no_toml_file_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "board.yaml").write_text("max_kl: 1")
    with pytest.raises(UsageError, match=r"board\.yaml: a profile is a TOML file whose name ends in \.toml"):
        options(profile=str(tmp_path / "board.yaml"))


def own_options(path: Path | None = None, **flags: Any) -> dict[str, ValidateOptions]:
    return config.for_devices(options(path, **flags), path, flags)


def test_a_devices_own_profile_replaces_the_shared_one(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("validate: {min_top1: 0.3}\n")
    (tmp_path / "a=b.toml").write_text("threads = 3\nmax_kl = 0.3\nmin_top1 = 0.9\ntarget = ['onnx']\n")
    pairs = (f"ssh:a={tmp_path / 'a=b.toml'}", "adb=minimal")
    given = {"device": ("local", "ssh:a", "adb"), "profile": "pi5", "device_profile": pairs, "max_kl": 0.2}
    shared, own = options(file, **given), own_options(file, **given)
    assert list(own) == ["ssh:a", "adb"] and (shared.threads, shared.max_size_mb) == (4, 1000.0)
    expected = {"threads": 3, "min_top1": 0.3, "target": ("onnx",), "profile": str(tmp_path / "a=b.toml")}
    assert own["ssh:a"] == replace(options(), **given | expected)
    assert own["adb"] == options(file, **given | {"profile": "minimal"})
    assert not own_options(file, device=("local",), profile="pi5")


def test_profiles_of_devices_are_restored_from_a_runs_saved_options(tmp_path: Path) -> None:
    given = {"device": ("local", "ssh:a"), "device_profile": ("local=laptop", "ssh:a=pi5"), "threads": 3}
    shared, own = options(**given), own_options(**given)
    left_out = _set_by_profiles(shared, [*own.values(), shared])
    assert {"max_size_mb", "min_prefill", "min_decode"} <= left_out and not {"threads", "profile"} & left_out
    config.save(tmp_path / "saved.yaml", "validate", shared, left_out=left_out)
    assert (options(tmp_path / "saved.yaml"), own_options(tmp_path / "saved.yaml")) == (shared, own)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            ("pi5",),
            r"--device-profile pi5: does not begin with one of the devices, local, ssh:a\. Write DEVICE=PROFILE .*=pi5",
        ),
        (("ssh:b=pi5",), r"--device-profile ssh:b=pi5: does not begin with one of the devices, local, ssh:a\."),
        (("ssh:a=",), r"--device-profile ssh:a=: no profile follows\. Write ssh:a=PROFILE, such as ssh:a=pi5"),
        (("ssh:a=pi5", "ssh:a=laptop"), r"--device-profile ssh:a=laptop: ssh:a also has the profile pi5"),
        (("ssh:a=pi4",), r"--device-profile ssh:a=pi4: --profile pi4: no such profile"),
        (("ssh:a=board.toml",), r"--device-profile ssh:a=board.toml: board\.toml: unknown key 'max_kll'"),
    ],
)
def test_a_bad_profile_of_a_device_is_named_with_the_device(
    tmp_path: Path, pairs: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("board.toml").write_text("max_kll = 1")
    with pytest.raises(UsageError, match=message):
        own_options(device=("local", "ssh:a"), device_profile=pairs)


def test_gates_of_one_device_are_enough_for_junit() -> None:
    given = {"device": ("local", "ssh:a"), "device_profile": ("ssh:a=pi5",)}
    gates.require_any_gate(options(**given), *own_options(**given).values())
    with pytest.raises(UsageError, match="no gate was set"):
        gates.require_any_gate(options(), options())


# --- JUnit -------------------------------------------------------------------------------------------------


def test_junit_has_a_case_for_each_gate_and_artifact() -> None:
    checked = gates.check_gates(options(max_kl=0.1, min_decode=20.0), [TUNED, QAT, BARE])
    reports = [report(*checked), report(checked[0], device="ssh:a")]
    root = ET.fromstring(junit_xml(reports, {"adb:x": "gone \x1b[1m"}))
    assert root.attrib | {"name": ""} == {"name": "", "tests": "6", "failures": "1", "errors": "3"}
    local, other, failed = root
    assert [suite.get("name") for suite in root] == ["local", "ssh:a", "adb:x"]
    cases = [(c.get("classname"), c.get("name"), [(f.tag, f.get("message")) for f in c]) for c in local]
    assert cases == [
        ("qat, onnx", "--max-kl", []),
        ("qat, onnx", "--min-decode", [("failure", "--min-decode 20, measured 10")]),
        ("qat, executorch", "--max-kl", [("error", "--max-kl 0.1, not measured")]),
        ("qat, executorch", "--min-decode", [("error", "--min-decode 20, not measured")]),
    ]
    assert (other.get("tests"), other.get("failures"), other.get("errors")) == ("1", "0", "0")
    assert (failed.get("tests"), failed.get("errors")) == ("1", "1") and "gone" in str(failed[0][0].get("message"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    Run(tmp_path / "run").config.write_text("{}")
    return tmp_path / "run"


def test_the_junit_file_is_written_even_if_gates_are_missed(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = gates.check_gates(options(max_kl=0.01), [TUNED, QAT])
    whole = replace(report(*missed), measured=[TUNED, QAT])
    monkeypatch.setattr(
        "qat_edge.verbs.validate.validate_devices", lambda *_, **__: Validated([whole], {"adb": "gone"})
    )
    answer = CliRunner().invoke(
        commands.main, ["validate", str(run_folder), "--max-kl", "0.01", "--junit", str(tmp_path / "out" / "j.xml")]
    )
    assert answer.exit_code == 1 and "adb: gone" in answer.output
    root = ET.parse(tmp_path / "out" / "j.xml").getroot()
    assert (root.get("failures"), root.get("errors")) == ("1", "1")


def test_an_earlier_junit_file_is_removed_before_a_run_that_fails(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "j.xml"
    path.write_text("<testsuites/>")
    answer = CliRunner().invoke(commands.main, ["validate", str(run_folder), "--profile", "pi5", "--junit", str(path)])
    assert answer.exit_code == 1 and not path.exists(), answer.output
    path.write_text("<testsuites/>")
    answer = CliRunner().invoke(commands.main, ["validate", str(run_folder), "--junit", str(path)])
    assert answer.exit_code == 2 and "no gate was set" in answer.output


# --- the workflow in examples/ -----------------------------------------------------------------------------


def test_the_workflows_commands_parse() -> None:
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["validate"]["steps"]
    lines = [line for step in steps for line in re.findall(r"^qat-edge (.+)$", step.get("run", ""), flags=re.M)]
    assert [line.split()[0] for line in lines] == ["verify", "validate", "report"]
    for name, *arguments in map(shlex.split, lines):
        command = commands.main.commands[name]
        # click keeps the first help option that it makes of a command, so the group's settings must be there.
        parent = click.Context(commands.main, info_name="qat-edge", **commands.main.context_settings)
        with click.Context(command, parent, info_name=name) as context:
            assert command.parse_args(context, list(arguments)) == []
            if name == "validate":
                flags = {f: context.params[f] for f in vars(ValidateOptions())}
                loaded = commands.load_options(ValidateOptions, "validate", None, flags)
                gates.require_any_gate(loaded)
                assert str(context.params["junit"]) in WORKFLOW.read_text().split("path: |")[1]
