"""Keys and values in int8: results of the .pte, loss of accuracy, and models that are refused."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.extension.pybindings.portable_lib import _load_for_executorch
from tiny import CONTEXT, SHAPE, TinyExport, export_into, freeze, llama, prefill_and_decode, sqnr
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, Gemma2Config, MistralConfig, PretrainedConfig

from qat_edge.errors import ExportError, UsageError
from qat_edge.manifest import read_manifest, write_manifest
from qat_edge.options import DoctorOptions, ExportOptions
from qat_edge.quant import frozen
from qat_edge.run import Run, Variant
from qat_edge.verbs import doctor
from qat_edge.verbs import export as exporting
from qat_edge_exporters import targets
from qat_edge_exporters.executorch.graph import attention, tracing

LENGTHS = (1, 2, 7, 33)  # tokens of prompts
STEPS = 3  # tokens decoded after each
WINDOW = 8
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": llama,
    "windows": lambda: MistralConfig(**SHAPE, sliding_window=WINDOW),
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    root = tmp_path_factory.mktemp(request.param)
    freeze(MODELS[request.param](), 32, root / "frozen")
    return export_into(root / "frozen", root / "int8", kv_cache="int8")


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every torch model round queries, keys and values (1, heads, S, D) before attention."""
    attend = AttentionInterface()["sdpa"]

    def rounded(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **extras: Any) -> Any:
        return attend(module, int8(query), int8(key), int8(value), *args, **extras)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", rounded)


def int8(x: Tensor) -> Tensor:
    """Round asymmetrically: 255 steps between the extreme channels of each token and head, and zero is exact."""
    lowest, highest = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (highest.double() - lowest) / 255
    zero = torch.where(highest < -lowest, 127 - highest / scale, -128 - lowest / scale).float().round()
    return (((x / scale.float()).round() + zero).clamp(-128, 127) - zero) * scale.float()


def logits(pte: Path) -> list[Tensor]:
    """Return the logits of prompts, and of the tokens decoded after each."""
    found = []
    for length in LENGTHS:
        program = _load_for_executorch(str(pte))
        for begin, end in prefill_and_decode(length, length + STEPS):
            part = tokens(length)[:, begin:end].contiguous()
            found.append(program.forward((part, torch.tensor([begin])))[0][0, 0])
    return found


def torch_logits(model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [row for n in LENGTHS for row in model(tokens(n)).logits[0, n - 1 :]]


def tokens(length: int) -> Tensor:
    return torch.randint(3, 288, (1, length + STEPS), generator=torch.Generator().manual_seed(length))


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("name", MODELS)
def test_attention_reads_rounded_keys_and_values(name: str) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    decoder = tracing.Decoder(model, attention.Int8Cache(CONTEXT)).eval()
    given = tokens(20)
    with torch.no_grad():
        wanted = model(given).logits[0]
        with attention.replace_attention(decoder.cache, model.config):
            decoder(given[:, :1], torch.tensor([0]))  # creates the cache's buffers
            for begin, end in [(0, 13), (13, 14), (14, 20), (20, 21)]:
                found = decoder(given[:, begin:end], torch.tensor([begin]))
                torch.testing.assert_close(found[0, 0], wanted[end - 1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("rounding")
def test_the_pte_computes_the_frozen_model_with_rounded_keys_and_values(exported: TinyExport) -> None:
    pairs = zip(torch_logits(frozen.load(exported.frozen)), logits(exported.pte), strict=True)
    agreement = [sqnr(wanted, found) for wanted, found in pairs]
    # Float rounding, except where it moves a number across a rounding boundary of its int8 form.
    assert statistics.median(agreement) > 100 and min(agreement) > 25, agreement


def test_the_loss_of_accuracy_is_bounded_and_not_zero(exported: TinyExport) -> None:
    plain = torch_logits(frozen.load(exported.frozen))
    ratios = [sqnr(wanted, found) for wanted, found in zip(plain, logits(exported.pte), strict=True)]
    assert min(ratios) > 25 and max(ratios) < 50, ratios


def test_prefill_in_parts_is_prefill_at_once(exported: TinyExport) -> None:
    given = tokens(33)
    at_once, in_parts = _load_for_executorch(str(exported.pte)), _load_for_executorch(str(exported.pte))
    (wanted,) = at_once.forward((given, torch.tensor([0])))
    for begin, end in prefill_and_decode(20, given.shape[1]):
        (found,) = in_parts.forward((given[:, begin:end].contiguous(), torch.tensor([begin])))
    assert sqnr(wanted, found) > 40  # float rounding, where nothing crosses a boundary of its int8 form


def test_doctor_and_export_report_its_size(exported: TinyExport) -> None:
    write_manifest(exported.folder, "export")
    diagnosis = doctor.doctor(exported.folder, DoctorOptions())
    assert diagnosis.faults == [] and [c.runtime for c in diagnosis.runtimes if not c.loads] == ["minimal"]
    each = 2 * 2 * 2 * (16 + 4 + 1)  # layers, keys and values, heads; codes, scale and zero point
    line = f"cache      keys and values in int8: {CONTEXT * each / 1e3:.1f} kB for {CONTEXT} tokens, {each} bytes each"
    assert line in doctor.lines(diagnosis)
    assert f"KV cache in int8: {each} bytes per token, 0.0 MB for {CONTEXT}" in exported.messages


def test_the_size_of_a_float_cache() -> None:
    cache = attention.KeyValueCache(CONTEXT)
    for layer in (0, 1):
        cache._make_buffers(layer, torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    assert cache.size_bytes == CONTEXT * 2 * 2 * 2 * 16 * 4


def test_a_model_that_caps_its_scores_is_refused(tmp_path: Path) -> None:
    freeze(Gemma2Config(**SHAPE, head_dim=16, attn_logit_softcapping=2.0), 32, tmp_path / "frozen")
    with pytest.raises(ExportError, match="--kv-cache int8: gemma2 caps its attention scores"):
        export_into(tmp_path / "frozen", tmp_path / "export", kv_cache="int8")
    assert list((tmp_path / "export").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions(kv_cache="int8"), "--kv-cache int8 is for --target executorch alone; onnx has no such cache"),
        (ExportOptions(target=("executorch",), portable=True, kv_cache="int8"), "--kv-cache int8 and --portable"),
    ],
)
def test_invalid_combinations_are_usage_errors(options: ExportOptions, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        exporting.export(Run(tmp_path), options)


@pytest.mark.usefixtures("stand_in_exports")
def test_the_manifest_records_the_cache_and_another_one_is_exported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def exporter(checkpoint: Path, out: Path, context_length: int, **extras: Any) -> None:
        given.update(extras)

    variant, options = Variant(tmp_path), ExportOptions(target=("executorch",), kv_cache="int8")
    variant.quantized.mkdir()
    (variant.quantized / "config.json").write_text('{"model_type": "llama"}')
    write_manifest(variant.quantized, "quantized")
    monkeypatch.setattr(targets, "load", lambda entry: exporter)
    target = targets.target_named("executorch")
    exporting.export_one(variant, target, options)
    folder = variant.exports / "executorch"
    assert given == {"kv_cache": "int8"} and read_manifest(folder)["options"]["kv_cache"] == "int8"
    assert exporting._is_current(folder, target, options)
    assert not exporting._is_current(folder, target, ExportOptions())
