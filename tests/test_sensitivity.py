"""Loss of each layer at 4 and 8 bits, the choice of bits from it, and the file with the choice."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

from conftest import make_model, make_tokenizer, plain_rows, relist
from qat_edge import config
from qat_edge.cli import commands
from qat_edge.errors import DataError, ModelError, RunError, UsageError
from qat_edge.manifest import write_manifest
from qat_edge.models import decoder, merge
from qat_edge.models.merge import MergedModel
from qat_edge.options import FinetuneOptions, SensitivityOptions
from qat_edge.quant import bit_allocation, bits_file, frozen, layer_sensitivity, scheme
from qat_edge.quant.bit_allocation import (
    Choice,
    Cost,
    LayerCost,
    Sensitivity,
    frontier,
    weight_bytes,
)
from qat_edge.quant.bits_file import load_bits, requested_levels
from qat_edge.quant.sensitivity_file import read_sensitivity
from qat_edge.report.sensitivity_page import DECADES, SHADES, heat_map, render, shade, trade_off
from qat_edge.run import Run
from qat_edge.verbs import sensitivity

GROUP = 32
UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
IDENTITY = {"name": "tiny", "revision": None, "files": {"model.safetensors": "ab"}}


def ignore(name: str, width: int) -> None:
    pass


def tied_model() -> Any:
    """Two layers whose weights are large enough for rounding to show."""
    model = make_model(make_tokenizer())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.1)
    return model


def batch() -> layer_sensitivity.ProbeBatch:
    """Two rows, the second padded, compared at some of their tokens."""
    torch.manual_seed(2)
    ids = torch.randint(3, 256, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    compared = torch.zeros_like(ids, dtype=torch.bool)
    compared[0, 4:11], compared[1, 2:8] = True, True
    return layer_sensitivity.ProbeBatch(ids, mask, compared)


def frozen_logits(build: Callable[[], Any], chosen: scheme.Scheme, given: layer_sensitivity.ProbeBatch) -> torch.Tensor:
    """Logits of the compared tokens, of a model frozen under a scheme."""
    model = build()
    frozen.freeze(model, chosen)
    with torch.no_grad():
        out = model(input_ids=given.input_ids, attention_mask=given.attention_mask, use_cache=False)
    logits: torch.Tensor = out.logits[given.compared]
    return logits


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL(p || q) of logits (tokens, vocabulary), by its definition in float64."""
    log_p, log_q = (functional.log_softmax(x.double(), dim=-1) for x in (p, q))
    return float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())


def qwen() -> Any:
    """Untied, with norms on queries and keys."""
    torch.manual_seed(3)
    shape = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.1}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **heads, tie_word_embeddings=False)).eval()


@pytest.mark.parametrize("build", [tied_model, qwen])
def test_a_cost_is_the_loss_of_freezing_that_weight_alone(build: Callable[[], Any]) -> None:
    """Compare every weight at every width with a model in which only that weight is a torchao tensor."""
    chosen, given = scheme.choose_scheme(build(), GROUP), batch()
    schemes = layer_sensitivity.candidate_schemes(chosen)
    losses = layer_sensitivity.measure_layers(build(), schemes, [given], ignore)
    with torch.no_grad():
        reference = build()(input_ids=given.input_ids, attention_mask=given.attention_mask).logits[given.compared]
    assert losses.compared == 13
    for name, by_bits in schemes.items():
        for width, spec in by_bits.items():
            columns = build().get_submodule(name).weight.shape[1]
            full = dataclasses.replace(spec, group_size=columns) if width == 8 else spec
            alone = dataclasses.replace(chosen, weights={name: full})
            wanted = divergence(reference, frozen_logits(build, alone, given))
            # float32 sums in another order, and now and then an activation at a rounding boundary.
            assert losses.alone[name][width] == pytest.approx(wanted, rel=0.02, abs=1e-6), (name, width)
    assert losses.together[4] == pytest.approx(divergence(reference, frozen_logits(build, chosen, given)), rel=0.02)


def test_layers_before_the_weight_do_not_run_again() -> None:
    model, given = qwen(), batch()
    chosen = scheme.choose_scheme(model, GROUP)
    ran: list[int] = []
    for index, layer in enumerate(decoder.decoder_layers(model)):
        layer.mlp.register_forward_hook(lambda module, args, out, index=index: ran.append(index))
    head = {chosen.head: {8: chosen.weights[chosen.head]}}
    layer_sensitivity.measure_layers(model, head, [given], ignore)
    assert ran == [0, 1, 2, 0, 1, 2]  # the reference and all at once; none for the head alone
    ran.clear()
    layer_sensitivity.measure_layers(model, {UP: {4: chosen.weights[UP]}}, [given], ignore)
    assert ran == [0, 1, 2, 1, 2, 0, 1, 2]


def test_probing_leaves_the_model_unchanged() -> None:
    model, given = tied_model(), batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(input_ids=given.input_ids).logits
    layer_sensitivity.measure_layers(
        model, layer_sensitivity.candidate_schemes(scheme.choose_scheme(model, GROUP)), [given], ignore
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(model(input_ids=given.input_ids).logits, logits)


def test_rounding_the_embedding_does_not_round_the_head_tied_to_it() -> None:
    model = tied_model()
    table = model.lm_head.weight.detach().clone()
    chosen = scheme.choose_scheme(model, GROUP)
    with layer_sensitivity.fake_quantized(model, {chosen.embedding: chosen.weights[chosen.embedding]}):
        assert not torch.equal(model.model.embed_tokens.weight, table)
        assert torch.equal(model.lm_head.weight, table)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = tied_model()
    model.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match="no list of 5 decoder layers"):
        decoder.decoder_layers(model)


def synthetic() -> Sensitivity:
    """Four linear layers of one shape with costs that are easy to order, and tables that can only be int8."""
    small, large = weight_bytes(64, 64, 4, 32), weight_bytes(64, 64, 8, 32)
    kl = {
        ("q_proj", 0): (0.4, 0.1),
        ("up_proj", 0): (0.05, 0.01),
        ("q_proj", 1): (0.2, 0.0),
        ("up_proj", 1): (0.01, 0.02),
    }
    weights = {
        f"model.layers.{layer}.{kind}": LayerCost(layer, kind, (64, 64), {4: Cost(four, small), 8: Cost(eight, large)})
        for (kind, layer), (four, eight) in kl.items()
    }
    table = LayerCost(None, "embed", (288, 64), {8: Cost(0.001, weight_bytes(288, 64, 8, 64))})
    weights |= {"model.embed": table, "lm_head": dataclasses.replace(table, kind="lm_head")}
    return Sensitivity("tiny", 256, 200, 9, 0, 32, True, 1000, 3.5, {4: 0.7, 8: 0.14}, weights)


def eights(choice: Choice) -> set[str]:
    return {
        name.removeprefix("model.layers.") for name, width in choice.bits.items() if width == 8 and "layers" in name
    }


def test_sizes_of_a_weight() -> None:
    assert weight_bytes(576, 1536, 4, 32) == 576 * 1536 // 2 + 2 * 576 * 48
    assert weight_bytes(576, 1536, 8, 32) == 576 * 1536 + 4 * 576


def test_a_size_limit_raises_the_layers_that_save_most_first() -> None:
    costs = synthetic().costs
    least = sum(min(c.size_bytes for c in by_bits.values()) for by_bits in costs.values()) + 1000
    extra = weight_bytes(64, 64, 8, 32) - weight_bytes(64, 64, 4, 32)
    for raised, names in enumerate([set(), {"0.q_proj"}, {"0.q_proj", "1.q_proj"}]):
        choice = bit_allocation.within_budget(costs, 1000, (least + raised * extra + 5) / 1e6)
        assert eights(choice) == names
        assert choice.size_bytes == least + raised * extra
    everything = bit_allocation.within_budget(costs, 1000, 100.0)
    assert eights(everything) == {"0.q_proj", "1.q_proj", "0.up_proj"}  # 8 bits cost layer 1's up_proj more
    assert everything.kl_nats == pytest.approx(0.1 + 0.01 + 0.0 + 0.01 + 2 * 0.001)
    with pytest.raises(UsageError, match=r"--max-size-mb 0.001: .* MB, the least possible"):
        bit_allocation.within_budget(costs, 1000, 0.001)


def test_the_least_size_named_in_the_error_can_be_met() -> None:
    costs = synthetic().costs
    with pytest.raises(UsageError) as caught:
        bit_allocation.within_budget(costs, 1000, 0.0)
    named = float(re.findall(r"([\d.]+) MB", str(caught.value))[0])
    assert not eights(bit_allocation.within_budget(costs, 1000, named))
    assert named * 1e6 == pytest.approx(bit_allocation.within_budget(costs, 1000, named).size_bytes, rel=1e-3)


def test_a_kl_limit_raises_no_more_layers_than_needed() -> None:
    costs = synthetic().costs
    assert eights(bit_allocation.within_kl(costs, 1000, 0.7)) == set()
    assert eights(bit_allocation.within_kl(costs, 1000, 0.4)) == {"0.q_proj"}
    assert eights(bit_allocation.within_kl(costs, 1000, 0.2)) == {"0.q_proj", "1.q_proj"}
    with pytest.raises(UsageError, match=r"--max-kl 0.1: 0.122 nats per token .* the least possible"):
        bit_allocation.within_kl(costs, 1000, 0.1)
    with pytest.raises(UsageError) as caught:
        bit_allocation.within_kl(costs, 1000, 0.0)
    named = float(re.findall(r"([\d.]+) nats", str(caught.value))[0])
    assert bit_allocation.within_kl(costs, 1000, named).kl_nats <= named


def test_the_frontier_decreases_until_every_layer_is_raised() -> None:
    measured = synthetic()
    points = frontier(measured.costs, measured.float_bytes)
    assert len(points) == 4
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))
    last = bit_allocation.within_budget(measured.costs, measured.float_bytes, 100.0)
    assert points[-1] == (last.size_bytes, pytest.approx(last.kl_nats))


def test_shades_are_logarithmic() -> None:
    assert shade(1.0, 1.0) == SHADES and shade(0.9, 1.0) == SHADES
    assert shade(10**-DECADES, 1.0) == shade(1e-9, 1.0) == shade(0.0, 1.0) == 1
    assert 1 < shade(10 ** (-DECADES / 2), 1.0) < SHADES


def test_the_plots_show_every_layer_and_the_choice() -> None:
    measured = synthetic()
    cells = [e for e in ET.fromstring(heat_map("h", measured, 4)).iter() if "heat" in e.get("class", "")]
    assert len(cells) == 4
    assert "layer 0, q_proj: 0.400 nats per token at 4 bits" in {title.text for e in cells for title in e}
    assert "chosen:" in trade_off("t", measured, bit_allocation.within_kl(measured.costs, 1000, 0.4))
    assert "chosen:" not in trade_off("t", measured, None)


def test_the_page_is_self_contained_and_escaped() -> None:
    hostile = dataclasses.replace(synthetic(), model="<script>alert(1)</script>")
    page = render(hostile, bit_allocation.within_kl(hostile.costs, 1000, 0.4))
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert all(name in page for name in hostile.weights)
    assert "1 of 4 weights get 8 bits" in page


def test_a_model_without_decoder_layers_still_has_a_page() -> None:
    measured = synthetic()
    tables = {name: weight for name, weight in measured.weights.items() if weight.layer is None}
    page = render(dataclasses.replace(measured, weights=tables, together={8: 0.002}), None)
    assert "all at 8 bits" in page and "<svg" not in page


@pytest.mark.browser
@pytest.mark.parametrize("width", [1100, 500])
def test_the_page_renders_in_a_browser(tmp_path: Path, width: int) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on PATH")
    measured, picture = synthetic(), tmp_path / "page.png"
    (tmp_path / "page.html").write_text(render(measured, bit_allocation.within_kl(measured.costs, 1000, 0.4)))
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", f"--screenshot={picture}",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert len(picture.read_bytes()) > 20_000


@pytest.fixture
def run(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run folder whose FP32 fine-tune is a random model, so that no training is needed."""
    rows = plain_rows(40)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Run(tmp_path / "run")
    made.reference.mkdir(parents=True)
    options = FinetuneOptions(model=str(tiny_model_folder), data=str(tmp_path / "train.jsonl"), group_size=GROUP)
    config.save(made.config, "finetune", options)
    write_manifest(made.reference, "reference", model={"identity": IDENTITY}, kept_layers=None)
    calls: list[Path] = []

    def merged(adapter: Path, *args: Any) -> MergedModel:
        calls.append(adapter)
        model = tied_model()
        chosen = scheme.choose_scheme(model, GROUP)
        return MergedModel(model=model, tokenizer=make_tokenizer(), scheme=chosen, scales={})

    monkeypatch.setattr(sensitivity, "merged_model", merged)
    yield made
    assert set(calls) <= {made.reference}


def call(run: Run, *arguments: str) -> Any:
    return CliRunner().invoke(commands.main, ["sensitivity", str(run.path), *arguments])


def test_bits_are_chosen_without_measuring_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = call(run, "--tokens", "128")
    assert first.exit_code == 0, first.output
    folder = run.path / "sensitivity"
    assert {p.name for p in folder.iterdir()} == {"sensitivity.json", "sensitivity.html", "manifest.json"}
    measured = read_sensitivity(folder)
    assert measured.tokens == 128 and len(measured.weights) == 16
    assert measured.weights[DOWN].shape == (64, 128) and set(measured.weights[DOWN].costs) == {4, 8}
    assert set(measured.weights["lm_head"].costs) == {8}
    assert measured.float_bytes == 4 * 64 * 5  # two norms a layer and the last
    monkeypatch.setattr(sensitivity, "merged_model", None)  # nothing is loaded again
    limit = (measured.predicted(4) + measured.predicted(8)) / 2
    second = call(run, "--max-kl", str(limit), "--json")
    assert second.exit_code == 0, second.output
    chosen = load_bits(folder / "bits.yaml")
    assert chosen.keys() == measured.weights.keys() and {4, 8} == set(chosen.values())
    kl = sum(measured.costs[name][width].kl_nats for name, width in chosen.items())
    assert kl <= limit
    can = [name for name in chosen if len(measured.costs[name]) > 1]
    summary = f"{sum(chosen[name] == 8 for name in can)} of {len(can)} weights get 8 bits, "
    assert summary in second.stderr and "quantize" in second.stderr  # embedding and head always have 8 bits
    assert "get 8 bits" in (folder / "sensitivity.html").read_text()
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(listed) == {"sensitivity.json", "sensitivity.html", "bits.yaml"}
    scheme.choose_scheme(tied_model(), GROUP, chosen)
    # The file names the model, so that no other one gets its bits.
    trained = merge.adapter_metadata(run.reference)
    file = str(folder / "bits.yaml")
    bits_file.require_model(file, trained["model"]["identity"], None)
    with pytest.raises(UsageError, match="chosen for all layers, and this model has 1 layers"):
        bits_file.require_model(file, trained["model"]["identity"], 1)


def test_data_that_is_not_measured_on_is_mentioned(run: Run) -> None:
    assert call(run, "--tokens", "128").exit_code == 0
    arguments = ("--max-kl", "1", "--tokens", "128")
    assert "--force measures again" not in call(run, *arguments).stderr
    answer = call(run, *arguments, "--data", "other.jsonl")
    assert answer.exit_code == 0, answer.output
    assert "--force measures again, on 128 of --data other.jsonl (seed 0)" in answer.stderr


def test_three_widths_are_measured_chosen_and_shown(run: Run) -> None:
    first = call(run, "--tokens", "128", "--width", "2")
    assert first.exit_code == 0, first.output
    folder = run.path / "sensitivity"
    measured = read_sensitivity(folder)
    assert measured.widths == (2, 4, 8) and set(measured.weights[DOWN].costs) == {2, 4, 8}
    assert set(measured.weights["lm_head"].costs) == {8} and measured.levels == "seq"
    costs = measured.weights[DOWN].costs
    assert costs[2].kl_nats > costs[4].kl_nats > costs[8].kl_nats
    rows, width = measured.weights[DOWN].shape
    assert costs[2].size_bytes == rows * (width // 4 + width // GROUP * 4), "float32 scales, as in an ONNX folder"
    assert measured.together[2] > measured.together[4] > measured.together[8]
    assert all(f"at {bits} bits" in first.output for bits in (2, 4, 8))

    limit = (measured.predicted(2) + measured.predicted(4)) / 2
    second = call(run, "--max-kl", str(limit), "--width", "2")
    assert second.exit_code == 0, second.output
    chosen = load_bits(folder / "bits.yaml")
    assert {2, 8} <= set(chosen.values()) <= {2, 4, 8}
    assert requested_levels(str(folder / "bits.yaml"), None) == "seq"
    layers = [name for name in chosen if "layers" in name]
    counts = [sum(chosen[name] == bits for name in layers) for bits in (8, 4)]
    assert f"{counts[0]} of 14 weights get 8 bits, {counts[1]} get 4 bits" in second.stderr
    page = (folder / "sensitivity.html").read_text()
    assert all(
        text in page for text in ("KL, 2 bits", "all 2 bits", "instead of 2", "which alone can hold 2-bit weights")
    )
    scheme.choose_scheme(tied_model(), GROUP, chosen)

    # The same bits at other levels cost something else.
    path = folder / "sensitivity.json"
    path.write_text(path.read_text().replace('"levels": "seq"', '"levels": "integer"'))
    relist(folder)
    other = call(run, "--max-kl", str(limit))
    assert other.exit_code == 1 and "measured with --weight-levels integer" in other.output, other.output


def test_other_widths_than_those_measured_are_refused(run: Run) -> None:
    assert call(run, "--tokens", "64").exit_code == 0
    other = call(run, "--width", "2", "--max-kl", "1")
    assert other.exit_code == 1 and "measured at 4 and 8 bits" in other.output and "--force" in other.output


def test_two_bits_cost_what_freezing_with_them_costs() -> None:
    for levels in ("seq", "integer"):
        narrow, given, model = scheme.LinearCodes(2, levels), batch(), tied_model()
        chosen = scheme.choose_scheme(model, GROUP)
        candidates = layer_sensitivity.candidate_schemes(chosen, narrow)
        found = layer_sensitivity.measure_layers(model, candidates, [given], ignore).together[2]
        with torch.no_grad():
            out = model(input_ids=given.input_ids, attention_mask=given.attention_mask, use_cache=False)
        logits = out.logits[given.compared]
        at_two = scheme.choose_scheme(model, GROUP, default=narrow)
        assert found == pytest.approx(divergence(logits, frozen_logits(tied_model, at_two, given)), rel=1e-3)


def test_an_earlier_measurement_is_kept_unless_forced(run: Run) -> None:
    assert call(run, "--tokens", "64").exit_code == 0
    again = call(run, "--tokens", "96")
    assert again.exit_code == 1 and "exists already" in again.output and "--max-size-mb" in again.output
    assert call(run, "--tokens", "96", "--force").exit_code == 0
    assert read_sensitivity(run.path / "sensitivity").tokens == 96


def test_exactly_one_limit_that_can_be_met_is_accepted(run: Run) -> None:
    both = call(run, "--tokens", "64", "--max-kl", "1", "--max-size-mb", "1")
    assert both.exit_code == 2 and "--max-size-mb and --max-kl" in both.output
    assert not (run.path / "sensitivity").exists()
    little = call(run, "--tokens", "64", "--max-size-mb", "0.01")
    assert little.exit_code == 2 and "the least possible" in little.output
    # Minutes of measuring are not thrown away.
    assert read_sensitivity(run.path / "sensitivity").tokens == 64


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["weights", UP, "layer"], "x", r"layer is str, expected int"),
        (["weights", UP, "layer"], 0, r"layer is 0, and its name has 1"),
        (["weights", UP, "kind"], "down_proj", r"kind is 'down_proj'"),
        (["weights", UP, "shape"], "ab", r"shape is 'ab', expected two numbers"),
        (["weights", UP, "shape"], [0, 64], r"shape is \(0, 64\)"),
        (["weights", UP, "costs"], {}, r"costs is empty"),
        (["weights", UP, "costs", "3"], {"kl_nats": 0.1, "size_bytes": 9999}, r"costs has 3 bits"),
        (["weights", UP, "costs", "4", "kl_nats"], -5, r"costs\[4\].kl_nats is -5, expected a number of at least"),
        (["weights", UP, "costs", "4", "size_bytes"], "9", r"costs\[4\].size_bytes is str, expected int"),
        (["weights", UP, "costs", "4", "size_bytes"], 0, r"costs\[4\].size_bytes is 0"),
        (["weights", UP, "costs", "4", "size_bytes"], 12, r"size_bytes is 12; its codes alone have 4096"),
        (["together", "4"], None, r"together\[4\] is NoneType, expected float"),
        (["together", "4"], -1.0, r"together\['4'\] is -1.0"),
        (["together"], {"8": 0.1}, r"together has \[8\] bits, and weights have \[4, 8\]"),
        (["tokens"], 0, r"tokens is 0"),
        (["float_bytes"], -4, r"float_bytes is -4"),
        (["compared"], 10**6, r"compared is 1000000, more than the tokens"),
        (["levels"], "some", r"levels is 'some', expected seq or integer"),
    ],
)
def test_an_entry_of_a_measurement_that_cannot_be_is_named(run: Run, keys: list[str], value: Any, message: str) -> None:
    sensitivity.sensitivity(run, SensitivityOptions(tokens=64))
    path = run.path / "sensitivity/sensitivity.json"
    document = json.loads(path.read_text())
    *parents, last = keys
    entry = document
    for key in parents:
        entry = entry[key]
    entry[last] = value
    path.write_text(json.dumps(document))
    relist(path.parent)
    with pytest.raises(RunError, match=rf"sensitivity.json: .*damaged .*{message}.*--force"):
        sensitivity.sensitivity(run, SensitivityOptions(max_kl=9.0))
    assert not (path.parent / "bits.yaml").exists()


def test_a_weight_that_was_removed_or_renamed_is_a_changed_file(run: Run) -> None:
    sensitivity.sensitivity(run, SensitivityOptions(tokens=64))
    path = run.path / "sensitivity/sensitivity.json"
    whole = json.loads(path.read_text())
    removed = {name: weight for name, weight in whole["weights"].items() if name != UP}
    for weights in (removed, removed | {UP.replace("mlp", "other"): whole["weights"][UP]}):
        path.write_text(json.dumps(whole | {"weights": weights}))
        with pytest.raises(RunError, match=r"damaged \(changed since it was written\).*--force"):
            sensitivity.sensitivity(run, SensitivityOptions(max_kl=9.0))


def test_a_divergence_a_little_below_zero_is_rounding(run: Run) -> None:
    sensitivity.sensitivity(run, SensitivityOptions(tokens=64))
    path = run.path / "sensitivity/sensitivity.json"
    document = json.loads(path.read_text())
    document["weights"][UP]["costs"]["8"]["kl_nats"] = document["together"]["8"] = -5e-4
    path.write_text(json.dumps(document))
    relist(path.parent)
    assert read_sensitivity(path.parent).weights[UP].costs[8].kl_nats == -5e-4


def test_a_measurement_of_another_fine_tune_and_a_damaged_one_are_refused(run: Run) -> None:
    sensitivity.sensitivity(run, SensitivityOptions(tokens=64))
    path = run.path / "sensitivity/sensitivity.json"
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(RunError, match=r"sensitivity.json: missing or damaged .*--force"):
        sensitivity.sensitivity(run, SensitivityOptions(tokens=64, max_kl=9.0))
    path.write_text(whole)
    write_manifest(run.reference, "reference", model={"identity": {"name": "other"}})
    with pytest.raises(RunError, match="another fine-tune"):
        sensitivity.sensitivity(run, SensitivityOptions(tokens=64, max_kl=9.0))


def test_too_few_training_tokens_are_an_error(run: Run) -> None:
    with pytest.raises(
        DataError, match=r"train.jsonl: 40 rows have \d+ tokens, --tokens requests 50000: \d+ are missing"
    ):
        sensitivity.sensitivity(run, SensitivityOptions(tokens=50_000))
    assert not (run.path / "sensitivity").exists()
