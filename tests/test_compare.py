"""The table of deployments of a tiny run: every row is exported, run and measured, or has the reason why not."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from rich.console import Console

from pages import svgs
from qat_edge import config
from qat_edge.cli import commands
from qat_edge.cli.terminal_tables import deployment_table
from qat_edge.errors import ArtifactError, DataError, ExportError, QatEdgeError, RunError
from qat_edge.evaluate import deployments
from qat_edge.evaluate.deployments import Deployment, DeploymentTable
from qat_edge.evaluate.results import Agreement, Measurement, Speed, Spread
from qat_edge.manifest import MANIFEST, read_manifest
from qat_edge.models import merge
from qat_edge.options import CompareOptions, ExportOptions, FinetuneOptions, ValidateOptions
from qat_edge.quant import frozen
from qat_edge.report.comparison_page import render, verdict
from qat_edge.run import Run
from qat_edge.verbs import compare
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize_if_missing

ROWS = ["base", "lora", "naive", "merged", "ptq-rtn", "ptq-hqq", "qat"]
OPTIONS = CompareOptions(target=("executorch",), method=("rtn", "hqq"))
MEASURING = ValidateOptions(
    tokens=64, window=64, prompts=2, max_new_tokens=4, threads=1, prefill=4, decode=3, repeats=1
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f'{{"n":{i}}}'}]}
        for i in range(40)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run trained for a few steps, with nothing exported yet; its configuration has the options to measure with."""
    made = Run(tmp_path_factory.mktemp("compare") / "run")
    options = FinetuneOptions(
        model=str(tiny_model_folder), data=str(data), eval_data=str(data), steps=8, qat_start=0.5, batch_size=4,
        lora_rank=4, learning_rate=2e-2, track=(),
    )  # fmt: skip
    finetune(options, made.path)
    config.save(made.config, "validate", MEASURING)
    config.save(made.config, "export", ExportOptions(context_length=128))
    return made


@pytest.fixture(scope="module")
def table(run: Run) -> DeploymentTable:
    return compare.compare(run, OPTIONS, None)


def test_every_row_is_measured(table: DeploymentTable) -> None:
    assert table.steps == {"reference": 4, "qat": 8}
    assert [(row.name, row.target) for row in table.deployments] == [(name, "executorch") for name in ROWS]
    for row in table.deployments:
        m = row.measured
        assert m is not None and row.reason == ""
        assert row.name[:3] in ("ptq", "qat") or m.name == row.title
        assert m.agreement is not None and m.agreement.tokens == table.tokens == MEASURING.tokens
        assert m.prompts == 2 and m.exact_match is not None and m.load_ms is not None
        assert m.speed is not None and row.ms_per_token == pytest.approx(1e3 / m.speed.decode.median)
        assert row.memory_bytes is not None and row.memory_bytes > 0


def test_float_rows_equal_the_fine_tune_and_the_base(table: DeploymentTable) -> None:
    by_name = {row.name: row.measured for row in table.deployments}
    merged, lora, base = (by_name[name] for name in ("merged", "lora", "base"))
    assert merged and lora and base and merged.agreement and lora.agreement and base.agreement
    # Float rounding: sums in another order, and adapters applied without merging.
    assert merged.agreement.kl_nats < 1e-8 and lora.agreement.kl_nats < 1e-8
    assert base.agreement.kl_nats > 1e-3
    assert merged.perplexity == pytest.approx(table.reference.perplexity, rel=1e-5)
    assert lora.size_bytes["adapter"] > 0 and "adapter" not in merged.size_bytes


def test_quantized_rows_are_smaller_and_differ(table: DeploymentTable) -> None:
    by_name = {row.name: row.measured for row in table.deployments if row.measured}
    for name in ("naive", "ptq-rtn", "ptq-hqq", "qat"):
        assert by_name[name].size_bytes["linears"] * 8 == by_name["merged"].size_bytes["linears"]
        agreement = by_name[name].agreement
        assert agreement is not None and agreement.kl_nats > 1e-6
    assert by_name["naive"].size_bytes["adapter"] == by_name["lora"].size_bytes["adapter"]


def test_each_rows_checkpoint_has_the_right_weights(run: Run, table: DeploymentTable) -> None:
    base, merged = (frozen.load(run.path / "compare" / n / "checkpoint").state_dict() for n in ("base", "merged"))
    trained = merge.base_model(run.reference).state_dict()
    assert base.keys() == merged.keys() == trained.keys()
    assert all(torch.equal(base[name], trained[name]) for name in trained)
    naive = run.path / "compare" / "naive" / "checkpoint"
    assert read_manifest(naive)["scheme"] == read_manifest(run.quantized)["scheme"]
    name = "model.layers.0.mlp.up_proj"
    weight = frozen.read_weights(naive)[name]
    error = weight.codes * weight.scales.repeat_interleave(32, 1) - trained[f"{name}.weight"]
    assert (error.abs() <= 0.51 * weight.scales.repeat_interleave(32, 1)).float().mean() > 0.98
    shared = [run.path / "compare" / n / "checkpoint" / "model.safetensors" for n in ("base", "lora")]
    assert shared[0].samefile(shared[1])


def test_nothing_is_measured_twice(run: Run, table: DeploymentTable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("was made or measured before")

    for name in ("_measure_row", "export_one", "_write_checkpoint"):
        monkeypatch.setattr(compare, name, refuse)
    again = compare.compare(run, OPTIONS, None)
    assert again.deployments == table.deployments and again.reference == table.reference


def test_rows_are_measured_again_on_other_tokens(run: Run, table: DeploymentTable, tmp_path: Path) -> None:
    path = tmp_path / "measure.yaml"
    sections = {"validate": {**config.plain(MEASURING), "tokens": 80}, "export": {"context_length": 128}}
    path.write_text(yaml.safe_dump(sections))
    options = dataclasses.replace(OPTIONS, deployment=("qat",))
    again = compare.compare(run, options, path)
    (row,) = again.deployments
    assert row.measured and row.measured.agreement and row.measured.agreement.tokens == 80


def test_a_deployment_that_cannot_be_exported_is_a_row_with_the_reason(
    run: Run, table: DeploymentTable, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    def refuse(variant: Any, target: str, *_: Any) -> None:
        raise ExportError("no place for adapters")

    shutil.rmtree(run.path / "compare" / "lora" / "exports")
    monkeypatch.setattr(compare, "export_one", refuse)
    again = compare.compare(run, OPTIONS, None)
    assert [row.name for row in again.deployments] == ROWS
    (row,) = [row for row in again.deployments if row.measured is None]
    assert (row.name, row.reason) == ("lora", "not expressible: no place for adapters")
    assert any("LoRA unmerged" in line for line in messages)
    assert "no place for adapters" in (run.path / "compare" / "compare.html").read_text()
    assert deployments.load(run.path / "compare" / "compare.json") == again


def test_a_method_that_cannot_run_is_a_row_with_the_reason(
    run: Run, table: DeploymentTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = compare.quantize_if_missing

    def refuse(of: Run, method: str) -> Any:
        if method == "qat":
            return quantize(of, method)
        raise DataError("rows.jsonl: 12 tokens are missing. Give --calibration-tokens 5.")

    monkeypatch.setattr(compare, "quantize_if_missing", refuse)
    again = compare.compare(run, dataclasses.replace(OPTIONS, deployment=("ptq",), method=("gptq",)), None)
    (row,) = again.deployments
    assert row.measured is None and "are missing" in row.reason and "--calibration-tokens" in row.reason


def test_an_artifact_of_another_context_length_needs_force(run: Run, table: DeploymentTable, tmp_path: Path) -> None:
    path = tmp_path / "longer.yaml"
    path.write_text(yaml.safe_dump({"export": {"context_length": 256}, "validate": config.plain(MEASURING)}))
    with pytest.raises(RunError, match="--force"):
        compare.compare(run, dataclasses.replace(OPTIONS, deployment=("qat",)), path)


@pytest.mark.parametrize(
    ("length", "error", "words"),
    [(256, ArtifactError, "'options.context_length' is 256, but get_max_"), (10**9, RunError, "damaged, its options")],
)
def test_a_context_that_only_the_manifest_has_is_refused(
    run: Run, table: DeploymentTable, tmp_path: Path, length: int, error: type[QatEdgeError], words: str
) -> None:
    folder = Path(shutil.copytree(run.exports / "executorch", tmp_path / "executorch"))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["options"]["context_length"] = length
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(error, match=words):
        compare._is_current(run, folder, length)


def test_the_command_trains_first(tiny_model_folder: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    sections = {
        "finetune": {"steps": 2, "batch_size": 2, "eval_rows": 2, "track": ["none"]},
        "validate": config.plain(MEASURING),
        "export": {"context_length": 128},
        "compare": {"target": "executorch", "deployment": ["base"], "method": ["rtn"]},
    }
    path.write_text(yaml.safe_dump(sections))
    arguments = ["compare", "--model", str(tiny_model_folder), "--data", str(data), "--eval-data", str(data)]
    arguments += ["--config", str(path), "--out", str(tmp_path / "run")]
    answer = CliRunner().invoke(commands.main, [*arguments, "--json"])
    assert answer.exit_code == 0, answer.output
    document = json.loads(answer.stdout)
    assert [row["title"] for row in document["deployments"]] == ["Base, FP32"]
    again = CliRunner().invoke(commands.main, arguments)
    assert again.exit_code == 1 and "exists already" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a finished RUN"),
        (["run", "--out", "x"], "RUN and --out"),
        (["run", "--model", "m"], "RUN and --model"),
        (["--out", "x"], "--model is missing"),
        (["run", "--deployment", "best"], "'best' is not one of"),
        (["run", "--method", "nf4"], "'nf4' is not one of"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    answer = CliRunner().invoke(commands.main, ["compare", *arguments])
    assert answer.exit_code == 2 and message in answer.output, answer.output


# --- the table as values -----------------------------------------------------------------------------------


def measurement(perplexity: float, exact: float | None = None, decode: float = 50.0) -> Measurement:
    speed = Speed(1, 8, 4, 1, *(Spread(decode, decode, decode) for _ in range(3)))
    return Measurement(
        name="x", target="onnx", runtime="r", size_bytes={"linears": 7_000_000, "graph": 1}, perplexity=perplexity,
        agreement=Agreement(8, 0.1, 0.9, None), exact_match=exact, prompts=4, speed=speed, memory_bytes=30_000_000,
        runtime_bytes=10_000_000,
    )  # fmt: skip


def made_table(*rows: Deployment) -> DeploymentTable:
    steps = {"reference": 50, "qat": 120}
    return DeploymentTable("now", "tiny", "local", {"cores": 2}, {}, 8, steps, measurement(4.0, 0.8), list(rows))


def test_gain_kept_is_a_share_of_the_fine_tunes_gain() -> None:
    rows = [Deployment("base", "onnx", measurement(16.0, 0.2)), Deployment("qat", "onnx", measurement(8.0, 0.65))]
    rows += [
        Deployment("naive", "onnx", measurement(32.0, 0.2)),
        Deployment("lora", "onnx", reason="not expressible: x"),
    ]
    table = made_table(*rows)
    # log 16 - log 8 is one of the two doublings between 16 and 4
    assert [table.kept_perplexity(row) for row in rows] == [0.0, pytest.approx(0.5), pytest.approx(-0.5), None]
    assert [table.kept_exact_match(row) for row in rows] == [0.0, pytest.approx(0.75), 0.0, None]


def test_without_a_gain_there_is_no_share_of_it() -> None:
    worse = made_table(
        Deployment("base", "onnx", measurement(3.0, 0.9)), row := Deployment("qat", "onnx", measurement(4.0))
    )
    assert worse.kept_perplexity(row) is None and worse.kept_exact_match(row) is None
    alone = made_table(row)
    assert alone.kept_perplexity(row) is None


def test_further_training_is_mentioned() -> None:
    qat, base = Deployment("qat", "onnx", measurement(3.0)), Deployment("base", "onnx", measurement(8.0))
    assert "the 70 further steps" in made_table(qat).further_training
    assert "the 70 further steps" in render(made_table(qat))
    assert made_table(base).further_training == ""
    assert dataclasses.replace(made_table(qat), steps={"reference": 120, "qat": 120}).further_training == ""


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = made_table(Deployment("qat", "onnx", measurement(5.0, 0.5)), Deployment("lora", "onnx", reason="why"))
    deployments.save(table, tmp_path / "compare.json")
    assert deployments.load(tmp_path / "compare.json") == table
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(RunError, match="damaged"):
        deployments.load(tmp_path / "compare.json")


def test_the_page_shows_figures_and_reasons_escaped() -> None:
    rows = [Deployment("base", "onnx", measurement(16.0, 0.2)), Deployment("qat", "onnx", measurement(8.0, 0.6, 80.0))]
    rows += [
        Deployment("merged", "onnx", measurement(4.0, 0.8, 40.0)),
        Deployment("lora", "onnx", reason="no <b>place</b>"),
    ]
    page = render(made_table(*rows))
    assert "no &lt;b&gt;place&lt;/b&gt;" in page and "<b>place" not in page
    assert 'value="12.5"' in page  # ms per token of 80 tokens per second
    assert "http://" not in page and "https://" not in page
    text = verdict(made_table(*rows), "onnx")
    assert "25.0 to 12.5 ms per token" in text and "50% of the gain in log perplexity" in text
    assert "67% of what fine-tuning gained" in text


def test_a_base_with_a_far_higher_perplexity_is_named_but_not_drawn() -> None:
    rows = [Deployment(name, "onnx", measurement(p)) for name, p in (("base", 31.0), ("naive", 10.0), ("qat", 5.0))]
    drawn = {svg[0].text: [str(bar[0].text) for bar in svg.iter("rect")] for svg in svgs(render(made_table(*rows)))}
    assert drawn["Perplexity"] == ["Naive PTQ base + adapters: 10.0", "Fused QAT-LoRA: 5.00"]
    assert len(drawn["Size"]) == 3
    assert "The base&#39;s, 31.0, is left out." in render(made_table(*rows))
    near = render(made_table(Deployment("base", "onnx", measurement(29.0)), *rows[1:]))
    assert "is left out" not in near


def test_the_terminals_table_fits_80_columns() -> None:
    rows = [Deployment(name, "onnx", measurement(1053.0, 1.0, 225.0)) for name in deployments.TITLES]
    console = Console(width=80, file=io.StringIO())
    with console.capture() as shown:
        console.print(deployment_table(made_table(*rows), "onnx"))
    assert "…" not in shown.get() and all(title in shown.get() for title in deployments.TITLES.values())


def test_the_verdict_names_every_method_once() -> None:
    rows = [Deployment(n, "onnx", measurement(p)) for n, p in (("base", 16.0), ("naive", 32.0), ("qat", 4.001))]
    rows += [Deployment(f"ptq-{method}", "onnx", measurement(8.0)) for method in ("rtn", "coordinate-descent")]
    text = verdict(made_table(*rows), "onnx")
    assert "99% of the gain in log perplexity" in text  # 99.98%: not all of it
    assert text.endswith(
        "the others keep: Naive PTQ base + adapters −50% (worse than the base); merged PTQ by round-to-nearest 50%, by "
        "coordinate descent 50%."
    )


def test_rows_keep_the_order_of_the_table() -> None:
    assert deployments.row_names(("qat", "ptq", "base"), ("awq", "rtn")) == ["base", "ptq-awq", "ptq-rtn", "qat"]


def test_every_row_has_a_title_by_default_too() -> None:
    assert deployments.row_names(CompareOptions().deployment, CompareOptions().method) == list(deployments.TITLES)


def test_a_missing_reference_is_named(run: Run, tmp_path: Path) -> None:
    copy = Run(tmp_path / "run")
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("checkpoints", "compare", "reference", "ptq"))
    with pytest.raises(RunError, match="reference is missing, although the training is finished"):
        compare.compare(copy, OPTIONS, None)
    copy.ptq("rtn").quantized.mkdir(parents=True)
    with pytest.raises(RunError, match="reference is missing, although the training is finished"):
        quantize_if_missing(copy, "rtn")

    # A checkpoint has the adapter, and not the reference.
    shutil.rmtree(copy.adapter)
    with pytest.raises(RunError, match=r"adapter is missing, .* train again with `qat-edge finetune --force`"):
        merge.adapter_metadata(copy.adapter)
    (copy.checkpoints / "checkpoint-8").mkdir(parents=True)
    with pytest.raises(RunError, match=r"adapter is missing, .* from the last checkpoint with .* --resume"):
        merge.adapter_metadata(copy.adapter)
