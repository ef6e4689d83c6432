"""An ONNX folder is checked before a runtime gets it: keys, operators and files that an export does not have (C21)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from qat_edge.errors import ArtifactError
from qat_edge_exporters.onnx import folder_check, genai_config, names
from qat_edge_exporters.targets import TARGETS, target_named

# As the builder of onnxruntime-genai 0.18 writes it for a tiny Llama.
EXPORTED: dict[str, Any] = {
    "model": {
        "bos_token_id": 1,
        "context_length": 128,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": "model.onnx",
            "head_size": 16,
            "hidden_size": 64,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
        },
        "eos_token_id": [2],
        "pad_token_id": 2,
        "type": "llama",
        "vocab_size": 288,
    },
    "search": {
        "diversity_penalty": 0.0, "do_sample": False, "early_stopping": True, "length_penalty": 1.0, "max_length": 128,
        "min_length": 0, "no_repeat_ngram_size": 0, "num_beams": 1, "num_return_sequences": 1,
        "past_present_share_buffer": True, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
    },
}  # fmt: skip


def graph(*nodes: onnx.NodeProto, domains: tuple[str, ...] = ("",)) -> onnx.ModelProto:
    """A graph of these nodes, or of one Identity."""
    made = helper.make_graph(
        list(nodes) or [helper.make_node("Identity", ["x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid(domain, 1) for domain in domains])


def write(folder: Path, config: Any = EXPORTED, model: onnx.ModelProto | None = None) -> Path:
    (folder / names.GENAI_CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    (folder / names.MODEL_FILE).write_bytes((model or graph()).SerializeToString())
    return folder


def put(path: str, value: Any) -> dict[str, Any]:
    """The exported configuration with `value` at a dotted path."""
    config = copy.deepcopy(EXPORTED)
    *parents, key = path.split(".")
    inner = config
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[key] = value
    return config


def test_an_export_passes(tmp_path: Path) -> None:
    target_named("onnx").check(write(tmp_path))
    assert genai_config.check_config(tmp_path) == EXPORTED


SESSION = "model.decoder.session_options"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{SESSION}.custom_ops_library", "./evil.so"),
        (f"{SESSION}.enable_profiling", "/home/user/.bashrc"),
        (f"{SESSION}.ep.context_file_path", "x"),
        (f"{SESSION}.session.load_model_format", "ORT"),
        ("model.decoder.pipeline", []),
        ("model.decoder.run_options", {}),
        ("model.decoder.shared_initializers", [{"data_file": "/etc/passwd"}]),
        ("model.vision", {"filename": "other.onnx"}),
        ("model.speech", {"adapter_filename": "../x"}),
        ("engine", {}),
        ("speculative", {}),
        ("x" * 10_000, 1),
    ],
)
def test_any_other_key_is_refused_by_name(tmp_path: Path, path: str, value: Any) -> None:
    write(tmp_path, put(path, value))
    with pytest.raises(ArtifactError, match="is not among those that an export has") as raised:
        target_named("onnx").check(tmp_path)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{SESSION}.provider_options", [{"qnn": {"backend_path": "evil.so"}}]),
        (f"{SESSION}.provider_options", {"cuda": {}}),
        (f"{SESSION}.log_id", "a/b"),
        (f"{SESSION}.graph_optimization_level", 99),
        (SESSION, []),
        ("model.decoder.filename", "../model.onnx"),
        ("model.decoder.filename", "sub/model.onnx"),
        ("model.decoder.inputs.past_key_names", "past.%d.%s%n"),
        ("model.decoder.outputs.logits", "%d%d"),
        ("model.decoder.num_hidden_layers", True),
        ("model.context_length", 2**40),
        ("model.eos_token_id", ["2"]),
        ("model.type", "../llama"),
        ("search.max_length", -1),
        ("search.num_beams", 10**6),
        ("search.top_p", "1"),
        ("model", None),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(tmp_path: Path, path: str, value: Any) -> None:
    write(tmp_path, put(path, value))
    with pytest.raises(ArtifactError, match=f"'{path}' has a value that is not permitted".replace(".", r"\.")):
        target_named("onnx").check(tmp_path)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    # The runtime's parser might take the other one.
    write(tmp_path, '{"search": {}, "search": {}}')
    with pytest.raises(ArtifactError, match="key 'search' twice"):
        target_named("onnx").check(tmp_path)


def inner_node(make: Callable[[], onnx.NodeProto]) -> onnx.NodeProto:
    branch = helper.make_graph([make()], "branch", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    return helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)


def foreign() -> onnx.NodeProto:
    return helper.make_node("Run", ["x"], ["y"], domain="ai.onnx.contrib")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (graph(foreign()), "operators of 'ai.onnx.contrib' need a native library"),
        (graph(inner_node(foreign)), "operators of 'ai.onnx.contrib'"),
        (graph(domains=("", "stranger")), "operators of 'stranger'"),
        (graph(helper.make_node("EPContext", [], ["y"], domain="com.microsoft")), "EPContext runs other code"),
    ],
)
def test_operators_of_other_libraries_are_refused(tmp_path: Path, model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        folder_check.check_folder(write(tmp_path, model=model))


@pytest.mark.parametrize("location", ["/etc/passwd", "../model.onnx.data", "sub/model.onnx.data", "other"])
def test_tensors_in_other_files_are_refused(tmp_path: Path, location: str) -> None:
    model = graph()
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    with pytest.raises(ArtifactError, match=r"tensor 'w' is in '.*exports have all tensors in 'model.onnx.data'"):
        folder_check.check_folder(write(tmp_path, model=model))

    tensor.external_data[0].value = names.DATA_FILE
    folder_check.check_folder(write(tmp_path, model=model))


def test_no_runtime_gets_an_unchecked_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(
        "qat_edge_exporters.targets.load", lambda entry: lambda *_: calls.append(entry) or nullcontext()
    )
    for target in TARGETS.values():
        calls.clear()
        if target.expose:
            target.expose_outputs(tmp_path, tmp_path)
        if target.encoder:
            target.run_encoder(tmp_path, [])
        with target.open_generator(tmp_path, None):  # type: ignore[arg-type]
            pass
        assert calls == [
            entry
            for use in (*filter(None, (target.expose, target.encoder)), target.generator)
            for entry in ([target.checker] if target.checker else []) + [use]
        ]
    assert TARGETS["onnx"].checker
