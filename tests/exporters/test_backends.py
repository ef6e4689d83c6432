"""Programs for backends other than XNNPACK: a tiny model lowered to each, and read back from the file."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CONTEXT, SHAPE, TinyExport, export_into, freeze, llama, prefill_and_decode, sqnr
from transformers import AutoModelForCausalLM, MistralConfig

from conftest import make_tokenizer
from qat_edge.errors import ArtifactError, ExportError, RunError, UsageError
from qat_edge.lazy import load
from qat_edge.manifest import read_manifest, write_manifest
from qat_edge.options import (
    ARTIFACTS,
    DEFAULT_FORMATS,
    EXPORT_BACKENDS,
    FORMATS,
    RUNTIMES,
    ExportOptions,
    ValidateOptions,
)
from qat_edge.quant import frozen
from qat_edge.run import Run, Variant
from qat_edge.verbs import export as exporting
from qat_edge.verbs import generate, validate
from qat_edge.verbs.verify import Verified, verify_folder
from qat_edge_exporters import targets
from qat_edge_exporters.executorch import known_runtimes
from qat_edge_exporters.executorch.backends import registry
from qat_edge_exporters.executorch.pte import backend_readers, delegates, runner_contract
from qat_edge_exporters.executorch.pte.inspection import inspect
from qat_edge_exporters.executorch.pte.program_info import ProgramInfo

needs_coremltools = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools is not installed")
LAYERS = 1
MATRICES = 7 * LAYERS
INT8 = "model.layers.0.self_attn.k_proj"  # among int4 layers: for Vulkan it is XNNPACK's, between two delegates


def ignore(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backends") / "frozen"
    freeze(llama(num_hidden_layers=LAYERS), 32, folder, {INT8: 8})
    return folder


@pytest.fixture(scope="module")
def vulkan(checkpoint: Path) -> TinyExport:
    return export_into(checkpoint, checkpoint.parent / "executorch-vulkan", backend="vulkan")


@pytest.fixture(scope="module")
def coreml(checkpoint: Path) -> TinyExport:
    return export_into(checkpoint, checkpoint.parent / "executorch-coreml", backend="coreml")


def verify(made: TinyExport) -> Verified:
    return verify_folder(made.folder, made.folder.name, made.frozen)


def verify_after_a_flip(made: TinyExport, codes: bytes, folder: Path) -> Verified:
    """Verify a copy in which the lowest bit of the first of these codes is changed."""
    shutil.copytree(made.folder, folder / made.folder.name)
    path = folder / made.folder.name / "model.pte"
    data = bytearray(path.read_bytes())
    assert data.count(codes) == 1
    data[data.index(codes)] ^= 1
    path.write_bytes(data)
    return verify_folder(path.parent, path.parent.name, made.frozen)


def pack_pairs(codes: np.ndarray[Any, Any], offset: int) -> bytes:
    """Pack int4 codes in pairs, low nibble first. offset: what the file adds to a code."""
    nibbles = (codes + offset).astype(np.uint8) & 15
    return bytes((nibbles[:, 0::2] | nibbles[:, 1::2] << 4).tobytes())


def traced_logits(name: str, checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of the graph before it is lowered, for a prompt and then token by token."""
    model, compiler = frozen.load(checkpoint), registry.compiler(name)
    compiler.prepare(model)
    program = compiler.trace(model, CONTEXT).module()
    calls = prefill_and_decode(7, tokens.shape[1])
    rows = [program(tokens[:, begin:end], torch.tensor([begin])) for begin, end in calls]
    return torch.cat(rows, dim=1)[0]


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 288, (1, 12))


def test_vulkan_lowers_the_frozen_function(checkpoint: Path, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        wanted = frozen.load(checkpoint)(tokens).logits[0, 6:]
        assert sqnr(wanted, traced_logits("vulkan", checkpoint, tokens)) > 100


@needs_coremltools
def test_coreml_lowers_the_function_without_rounded_inputs(checkpoint: Path, tokens: torch.Tensor) -> None:
    weights = frozen.read_weights(checkpoint)
    model = frozen.load(checkpoint)
    plain = AutoModelForCausalLM.from_config(model.config).eval()
    with torch.no_grad():
        # The same weights in float layers, which do not round their inputs.
        for name, weight in weights.items():
            scales = weight.scales.repeat_interleave(weight.codes.shape[1] // weight.scales.shape[1], dim=1)
            plain.get_submodule(name).weight = torch.nn.Parameter(weight.codes * scales)
        rest = {k: v for k, v in model.state_dict().items() if k.removesuffix(".weight") not in weights}
        plain.load_state_dict(rest, strict=False)
        found = traced_logits("coreml", checkpoint, tokens)
        assert sqnr(plain(tokens).logits[0, 6:], found) > 100
        assert sqnr(model(tokens).logits[0, 6:], found) < 60  # the difference that export reports


def loading_apps(program: ProgramInfo) -> list[str]:
    """Check the contract of the LLM runner, and return the apps that load the program."""
    assert [entry.name for entry in runner_contract.entries(program) if entry.problem] == []
    assert runner_contract.forward_problems(program) == []
    return [check.runtime for check in known_runtimes.check_runtimes(program, RUNTIMES[1:], None) if check.loads]


def test_vulkan_program(vulkan: TinyExport) -> None:
    program = inspect(vulkan.pte)
    assert loading_apps(program) == ["android-vulkan-app"]
    assert set(program.delegates) == {"VulkanBackend", "XnnpackBackend"}
    assert program.shared_bytes == 0  # tied, and yet two tables: one table was only tested with XNNPACK

    # Vulkan's delegates: int4 layers, attention and norms as single operators.
    pte = delegates.open_pte(vulkan.pte)
    plan = next(p for p in pte.program.execution_plan if p.name == "forward")
    graphs = delegates.delegate_graphs(pte, plan)
    calls = [node["name"] for graph in graphs if "chain" in graph for node in graph["chain"]]
    assert calls.count(delegates.VULKAN_LINEAR) == MATRICES - 1
    assert calls.count("sdpa_with_kv_cache.default") == LAYERS
    assert calls.count("et_vk.rms_norm.default") == 2 * LAYERS + 1
    assert not [name for name in calls if "dequantize" in name]  # Vulkan has no such operator for weights

    # XNNPACK's delegates, and the kernels outside of any.
    kernels = [k["xnode_union_type"] for graph in graphs if "chain" not in graph for k in graph["xnodes"]]
    assert kernels.count("XNNFullyConnected") == 2  # the int8 layer and the head
    assert "quantized_decomposed::embedding_byte.out" in program.operators
    assert not [name for name in program.operators if name.endswith(("mm.out", "linear.out"))]


def test_vulkan_computes_int4_tables(tokens: torch.Tensor, tmp_path: Path) -> None:
    reference = freeze(llama(num_hidden_layers=LAYERS), 32, tmp_path / "frozen", table_bits=(4, 4))
    # torch's substitute for the kernel that looks up int4 rows multiplies in bfloat16, the kernel itself in float32.
    reference.get_input_embeddings().register_forward_hook(lambda module, args, rows: rows.bfloat16().float())
    with torch.no_grad():
        assert sqnr(reference(tokens).logits[0, 6:], traced_logits("vulkan", tmp_path / "frozen", tokens)) > 100

    made = export_into(tmp_path / "frozen", tmp_path / "executorch-vulkan", backend="vulkan")
    result, program = verify(made), inspect(made.pte)
    assert result.faults == [] and result.embedding_equal and result.head_equal
    assert loading_apps(program) == ["android-vulkan-app"]
    assert program.delegates == {"VulkanBackend": 1}  # the head as well
    assert "quantized_decomposed::embedding_4bit.dtype_out" in program.operators

    # Embedding and head are two tables, though tied.
    head = pack_pairs(frozen.read_weights(made.frozen)["lm_head"].codes.numpy(), 8)
    found = verify_after_a_flip(made, head, tmp_path / "copy")
    assert (found.embedding_equal, found.head_equal, found.linears_equal) == (True, False, MATRICES)


def assert_read_back(exported: TinyExport, offset: int, folder: Path) -> None:
    """Check that every code is the frozen one, and that a changed one is named. offset: added to a code in the file."""
    result = verify(exported)
    assert result.faults == []
    assert (result.linears_equal, result.embedding_equal, result.head_equal) == (MATRICES, True, True)

    # One changed bit is found at its row and column.
    layer = "model.layers.0.mlp.up_proj"
    codes = frozen.read_weights(exported.frozen)[layer].codes.numpy()
    result = verify_after_a_flip(exported, pack_pairs(codes, offset), folder)
    assert result.linears_equal == MATRICES - 1
    assert [fault for fault in result.faults if fault.startswith(f"{layer}: 1 of") and "row 0, column 0" in fault]


def test_vulkan_codes_are_those_of_the_checkpoint(vulkan: TinyExport, tmp_path: Path) -> None:
    assert_read_back(vulkan, 8, tmp_path)


@needs_coremltools
def test_coreml_program(coreml: TinyExport) -> None:
    program = inspect(coreml.pte)
    assert loading_apps(program) == ["ios-app"]
    assert program.delegates == {"CoreMLBackend": 1} and program.operators == {}
    sizes = backend_readers.read_coreml(coreml.folder).size_bytes
    assert sum(sizes.values()) == sum(p.stat().st_size for p in coreml.folder.iterdir())
    assert sizes["embedding"] == 288 * (64 + 4) and sizes["head"] == 0  # one table for both


@needs_coremltools
def test_coreml_codes_are_those_of_the_checkpoint(coreml: TinyExport, tmp_path: Path) -> None:
    assert_read_back(coreml, 0, tmp_path)


def test_a_missing_compiler_is_reported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs coremltools.*pip install 'qat-edge\[coreml\]'"):
        export_into(tmp_path / "no checkpoint", tmp_path / "out", backend="coreml")
    with pytest.raises(ExportError, match="needs coremltools"):
        exporting.export(Run(tmp_path / "no run"), ExportOptions(backend="coreml"))


def test_codes_that_cannot_be_read_are_an_error(
    vulkan: TinyExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match=r"codes cannot be read, so nothing is verified.*coremltools"):
        backend_readers.read_coreml(vulkan.folder)


def test_vulkan_refuses_a_sliding_window(tmp_path: Path) -> None:
    freeze(MistralConfig(**SHAPE, sliding_window=8), 32, tmp_path / "frozen")
    with pytest.raises(ExportError, match=r"has a sliding window of 8 tokens.*--context-length 8 or less"):
        export_into(tmp_path / "frozen", tmp_path / "out", backend="vulkan")


def test_float_checkpoints_are_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(llama(num_hidden_layers=1)).save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    with pytest.raises(ExportError, match="--backend vulkan is for frozen checkpoints"):
        export_into(tmp_path / "float", tmp_path / "out", backend="vulkan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions(target=("onnx",), backend="vulkan"), "--backend vulkan is for --target executorch"),
        (ExportOptions(target=("executorch",), backend="vulkan", portable=True), "--portable is for --backend xnnpack"),
        (ExportOptions(target=("executorch",), backend="coreml", kv_cache="int8"), "--kv-cache int8 is for --backend"),
    ],
    ids=["target", "portable", "kv_cache"],
)
def test_invalid_combinations_are_usage_errors(options: ExportOptions, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        exporting.export(Run(tmp_path), options)


@pytest.mark.usefixtures("stand_in_exports")
@pytest.mark.parametrize("name", registry.BACKENDS)
def test_each_backend_has_its_folder_and_reports_its_differences(
    name: str, tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = Variant(tmp_path)
    given: dict[str, dict[str, Any]] = {}

    def exporter(checkpoint: Path, out: Path, context_length: int, **extras: Any) -> None:
        given[out.name.split(".")[1]] = extras

    variant.quantized.mkdir()
    (variant.quantized / "config.json").write_text('{"model_type": "llama"}')
    write_manifest(variant.quantized, "quantized")
    monkeypatch.setattr(targets, "load", lambda entry: exporter)
    options = ExportOptions(backend=name)
    for format in DEFAULT_FORMATS:
        exporting.export_one(variant, targets.target_for(format, name), options)
    folder = f"executorch-{name}"
    assert variant.targets() == [folder, "onnx"]
    assert given == {folder: {"backend": name}, "onnx": {}}
    differences = list(registry.BACKENDS[name].differences)
    assert read_manifest(variant.exports / folder)["differences"] == differences
    assert all(any(difference in line for line in messages) for difference in differences)
    assert read_manifest(variant.exports / "onnx")["differences"] == []
    assert exporting._is_current(variant.exports / folder, targets.target_named(folder), options)


def test_every_backend_has_an_option_and_a_reader() -> None:
    assert (registry.XNNPACK, *registry.BACKENDS) == EXPORT_BACKENDS
    assert {*ARTIFACTS} == {*FORMATS, *(backend.folder for backend in registry.BACKENDS.values())}
    assert all(callable(load(target.reader)) for target in targets.TARGETS.values())


@pytest.mark.parametrize("artifact", [backend.folder for backend in registry.BACKENDS.values()])
def test_artifacts_of_other_backends_do_not_run_here(artifact: str, tmp_path: Path, messages: list[str]) -> None:
    run = Run(tmp_path)
    write_manifest(run.exports / artifact, "export", quantized_sha256="")
    with pytest.raises(RunError, match=f"{artifact} cannot run here.*is not in ExecuTorch's Python package"):
        generate.generate(run, "Hello", artifact, ignore, raw=True, system=None, max_new_tokens=1)
    with pytest.raises(RunError, match=f"{artifact} cannot run here"):
        validate.validate(run, ValidateOptions(target=(artifact,)))
    with pytest.raises(RunError, match="nothing exported"):
        validate.validate(run, ValidateOptions())
    assert messages == [f"Left out {targets.target_named(artifact).runs_elsewhere}"]
