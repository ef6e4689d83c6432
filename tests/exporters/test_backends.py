"""Programs for other backends than XNNPACK: a tiny model lowered to each, and read back out of the file."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CONTEXT, SHAPE, Exported, export_into, freeze, llama, sqnr
from transformers import AutoModelForCausalLM, MistralConfig

from conftest import make_tokenizer
from qat_edge.config import ARTIFACTS, BACKENDS, RUNTIMES, TARGETS, ExportOptions, ValidateOptions
from qat_edge.errors import ArtifactError, ExportError, RunError, UsageError
from qat_edge.quant import frozen
from qat_edge.run import Run, Variant, read_manifest, write_manifest
from qat_edge.verbs import export as exporting
from qat_edge.verbs import generate, validate
from qat_edge.verbs.verify import Verified, verify_folder
from qat_edge_exporters import READERS
from qat_edge_exporters.executorch import known_runtimes
from qat_edge_exporters.executorch.backends import registry
from qat_edge_exporters.executorch.pte import backend_readers, delegates, runner_contract
from qat_edge_exporters.executorch.pte.inspection import inspect
from qat_edge_exporters.executorch.pte.program_info import Program

needs_coremltools = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools is not installed")
LAYERS = 1
MATRICES = 7 * LAYERS
INT8 = "model.layers.0.self_attn.k_proj"  # among int4: on Vulkan it is XNNPACK's, between two delegates


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backends") / "frozen"
    freeze(llama(num_hidden_layers=LAYERS), 32, folder, {INT8: 8})
    return folder


@pytest.fixture(scope="module")
def vulkan(checkpoint: Path) -> Exported:
    return export_into(checkpoint, checkpoint.parent / "executorch-vulkan", backend="vulkan")


@pytest.fixture(scope="module")
def coreml(checkpoint: Path) -> Exported:
    return export_into(checkpoint, checkpoint.parent / "executorch-coreml", backend="coreml")


def verified(made: Exported) -> Verified:
    return verify_folder(made.folder, made.folder.name, made.frozen)


def flipped(made: Exported, codes: bytes, folder: Path) -> Verified:
    """What verify says once the lowest bit of the first of these codes has changed in the file."""
    shutil.copytree(made.folder, folder / made.folder.name)
    path = folder / made.folder.name / "model.pte"
    data = bytearray(path.read_bytes())
    assert data.count(codes) == 1
    data[data.index(codes)] ^= 1
    path.write_bytes(data)
    return verify_folder(path.parent, path.parent.name, made.frozen)


def packed(codes: np.ndarray[Any, Any], offset: int) -> bytes:
    """Codes of int4 in pairs, low nibble first."""
    nibbles = (codes + offset).astype(np.uint8) & 15
    return bytes((nibbles[:, 0::2] | nibbles[:, 1::2] << 4).tobytes())


def traced_logits(name: str, checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What the graph that is lowered computes, a prompt and then token by token."""
    model, compiler = frozen.load(checkpoint), registry.compiler(name)
    compiler.prepare(model)
    program = compiler.trace(model, CONTEXT).module()
    steps = [(0, 7), *((i, i + 1) for i in range(7, tokens.shape[1]))]
    rows = [program(tokens[:, a:b], torch.tensor([a])) for a, b in steps]
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
        for name, weight in weights.items():
            scales = weight.scales.repeat_interleave(weight.codes.shape[1] // weight.scales.shape[1], dim=1)
            plain.get_submodule(name).weight = torch.nn.Parameter(weight.codes * scales)
        rest = {k: v for k, v in model.state_dict().items() if k.removesuffix(".weight") not in weights}
        plain.load_state_dict(rest, strict=False)
        found = traced_logits("coreml", checkpoint, tokens)
        assert sqnr(plain(tokens).logits[0, 6:], found) > 100
        assert sqnr(model(tokens).logits[0, 6:], found) < 60  # which is the difference that export tells of


def loading(program: Program) -> list[str]:
    """Apps that load it, once the LLM runner is found to have all that it asks for."""
    assert [entry.name for entry in runner_contract.entries(program) if entry.problem] == []
    assert runner_contract.forward_problems(program) == []
    return [check.runtime for check in known_runtimes.check(program, RUNTIMES[1:], {}) if check.loads]


def test_vulkan_program(vulkan: Exported) -> None:
    program = inspect(vulkan.pte)
    assert loading(program) == ["android-vulkan-app"]
    assert set(program.delegates) == {"VulkanBackend", "XnnpackBackend"}
    assert program.shared_bytes == 0  # tied, and two tables: sharing one was only tried with XNNPACK alone
    pte = delegates.open_pte(vulkan.pte)
    plan = next(p for p in pte.program.execution_plan if p.name == "forward")
    graphs = delegates.graphs(pte, plan)
    calls = [node["name"] for graph in graphs if "chain" in graph for node in graph["chain"]]
    assert calls.count(delegates.VULKAN_LINEAR) == MATRICES - 1
    assert calls.count("sdpa_with_kv_cache.default") == LAYERS
    assert calls.count("et_vk.rms_norm.default") == 2 * LAYERS + 1
    assert not [name for name in calls if "dequantize" in name]  # Vulkan has no such operator for weights
    kernels = [k["xnode_union_type"] for graph in graphs if "chain" not in graph for k in graph["xnodes"]]
    assert kernels.count("XNNFullyConnected") == 2  # the int8 layer and the head
    assert "quantized_decomposed::embedding_byte.out" in program.operators
    assert not [name for name in program.operators if name.endswith(("mm.out", "linear.out"))]


def test_vulkan_takes_int4_tables(tokens: torch.Tensor, tmp_path: Path) -> None:
    reference = freeze(llama(num_hidden_layers=LAYERS), 32, tmp_path / "frozen", table_bits=(4, 4))
    # torch's stand-in for the kernel that looks int4 rows up multiplies in bfloat16, the kernel itself in float32.
    reference.get_input_embeddings().register_forward_hook(lambda module, args, rows: rows.bfloat16().float())
    with torch.no_grad():
        assert sqnr(reference(tokens).logits[0, 6:], traced_logits("vulkan", tmp_path / "frozen", tokens)) > 100
    made = export_into(tmp_path / "frozen", tmp_path / "executorch-vulkan", backend="vulkan")
    result, program = verified(made), inspect(made.pte)
    assert result.faults == [] and result.embedding_equal and result.head_equal
    assert loading(program) == ["android-vulkan-app"]
    assert program.delegates == {"VulkanBackend": 1}  # the head as well
    assert "quantized_decomposed::embedding_4bit.dtype_out" in program.operators
    head = packed(frozen.read_weights(made.frozen)["lm_head"].codes.numpy(), 8)
    found = flipped(made, head, tmp_path / "copy")
    assert (found.embedding_equal, found.head_equal, found.linears_equal) == (True, False, MATRICES)


def assert_read_back(exported: Exported, zero: int, folder: Path) -> None:
    """Every code is the frozen one, and one that was changed is named. zero: what the file adds to a code."""
    result = verified(exported)
    assert result.faults == []
    assert (result.linears_equal, result.embedding_equal, result.head_equal) == (MATRICES, True, True)
    layer = "model.layers.0.mlp.up_proj"
    codes = frozen.read_weights(exported.frozen)[layer].codes.numpy()
    result = flipped(exported, packed(codes, zero), folder)
    assert result.linears_equal == MATRICES - 1
    assert [fault for fault in result.faults if fault.startswith(f"{layer}: 1 of") and "row 0, column 0" in fault]


def test_vulkan_reads_back_what_was_frozen(vulkan: Exported, tmp_path: Path) -> None:
    assert_read_back(vulkan, 8, tmp_path)


@needs_coremltools
def test_coreml_program(coreml: Exported) -> None:
    program = inspect(coreml.pte)
    assert loading(program) == ["ios-app"]
    assert program.delegates == {"CoreMLBackend": 1} and program.operators == {}
    sizes = backend_readers.read_coreml(coreml.folder).size_bytes
    assert sum(sizes.values()) == sum(p.stat().st_size for p in coreml.folder.iterdir())
    assert sizes["embedding"] == 288 * (64 + 4) and sizes["head"] == 0  # one table for both


@needs_coremltools
def test_coreml_reads_back_what_was_frozen(coreml: Exported, tmp_path: Path) -> None:
    assert_read_back(coreml, 0, tmp_path)


def test_a_missing_compiler_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs coremltools.*pip install 'qat-edge\[coreml\]'"):
        export_into(tmp_path / "no checkpoint", tmp_path / "out", backend="coreml")
    with pytest.raises(ExportError, match="needs coremltools"):
        exporting.export(Run(tmp_path / "no run"), ExportOptions(backend="coreml"))


def test_codes_that_cannot_be_read_are_not_called_equal(
    vulkan: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match=r"codes cannot be read, nothing is proved.*coremltools"):
        backend_readers.read_coreml(vulkan.folder)


def test_vulkan_refuses_a_window(tmp_path: Path) -> None:
    freeze(MistralConfig(**SHAPE, sliding_window=8), 32, tmp_path / "frozen")
    with pytest.raises(ExportError, match=r"looks back over 8 tokens.*--context-length 8 or less"):
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
def test_combinations_that_cannot_be(options: ExportOptions, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        exporting.export(Run(tmp_path), options)


@pytest.mark.parametrize("name", registry.BACKENDS)
def test_has_a_folder_of_its_own_and_tells_what_differs(name: str, tmp_path: Path) -> None:
    variant, said, given = Variant(tmp_path), [], {}

    def exporter(checkpoint: Path, out: Path, context_length: int, **extras: Any) -> None:
        given[out.name.split(".")[1]] = extras

    write_manifest(variant.quantized, "quantized")
    for target in TARGETS:
        exporting.export_one(variant, target, exporter, ExportOptions(backend=name))
    folder = f"executorch-{name}"
    assert variant.targets() == [folder, "onnx"]
    assert given == {folder: {"backend": name}, "onnx": {}}
    differences = list(registry.BACKENDS[name].differences)
    assert read_manifest(variant.exports / folder)["differences"] == differences
    assert all(any(difference in line for line in said) for difference in differences)
    assert read_manifest(variant.exports / "onnx")["differences"] == []
    assert exporting._is_current(variant.exports / folder, ExportOptions(backend=name))


def test_every_backend_is_an_option_with_a_reader() -> None:
    assert (registry.XNNPACK, *registry.BACKENDS) == BACKENDS
    assert {*ARTIFACTS} == {*READERS} == {*TARGETS, *(backend.folder for backend in registry.BACKENDS.values())}


@pytest.mark.parametrize("artifact", [backend.folder for backend in registry.BACKENDS.values()])
def test_cannot_run_here(artifact: str, tmp_path: Path, messages: list[str]) -> None:
    run = Run(tmp_path)
    write_manifest(run.exports / artifact, "export", quantized_sha256="")
    with pytest.raises(RunError, match=f"{artifact} cannot run here.*is not in ExecuTorch's Python package"):
        generate.generate(run, "Hello", artifact, silent, raw=True, system=None, max_new_tokens=1)
    with pytest.raises(RunError, match=f"{artifact} cannot run here"):
        validate.validate(run, ValidateOptions(target=(artifact,)))
    with pytest.raises(RunError, match="nothing exported"):
        validate.validate(run, ValidateOptions())
    assert messages == [f"Left out {registry.runs_elsewhere(artifact)}"]
