"""A decoder whose outputs are arithmetic: after ids x1..xn the most likely next id is (x1 + ... + xn) mod 13.

Its KV cache holds the ids it has seen, so a cache that is lost, kept too long or written at the wrong position gives
another sum.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

VOCABULARY = 13
CONTEXT = 400
PEAK = 10.0  # logit of the most likely id; all others are 0


def sums(ids: list[int]) -> list[int]:
    """Return the most likely next id after each prefix of `ids`."""
    return [int(n) for n in np.cumsum(ids) % VOCABULARY]


def greedy(prompt: list[int], count: int) -> list[int]:
    """Return the first `count` ids that follow `prompt`."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(sum(ids) % VOCABULARY)
    return ids[len(prompt) :]


def summing_graph() -> onnx.ModelProto:
    """Build the graph: input_ids (1, S) and a cache of earlier ids -> logits (1, S, 13) and the extended cache."""
    node = helper.make_node
    cache = ["batch", 1, "past", "kv_cache_dim"]
    nodes = [
        node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["floats", "axes_1_3"], ["new"]),  # (1, 1, S, 1)
        node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
        node("CumSum", ["present.0.key", "axis_2"], ["running"]),
        node("Shape", ["past_key_values.0.key"], ["past_length"], start=2, end=3),
        node("Slice", ["running", "past_length", "end", "axes_2"], ["recent"]),
        node("Mod", ["recent", "modulus"], ["next"], fmod=1),
        node("Squeeze", ["next", "axes_1_3"], ["flat"]),  # (1, S)
        node("Cast", ["flat"], ["indices"], to=TensorProto.INT64),
        node("OneHot", ["indices", "depth", "values"], ["logits"], axis=-1),
    ]
    constants = {
        "axes_1_3": np.array([1, 3]),
        "axis_2": np.array(2),
        "axes_2": np.array([2]),
        "end": np.array([np.iinfo(np.int64).max]),
        "modulus": np.array(VOCABULARY, np.float32),
        "depth": np.array(VOCABULARY),
        "values": np.array([0, PEAK], np.float32),
    }
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, cache),
        helper.make_tensor_value_info("past_key_values.0.value", TensorProto.FLOAT, cache),
    ]
    grown = ["batch", 1, "total", "kv_cache_dim"]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", VOCABULARY]),
        helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, grown),
        helper.make_tensor_value_info("present.0.value", TensorProto.FLOAT, grown),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "summing", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def genai_config() -> dict[str, object]:
    """Return the configuration of the summing decoder for onnxruntime-genai."""
    return {
        "model": {
            "type": "llama",
            "bos_token_id": 1,
            "eos_token_id": [1],
            "pad_token_id": 1,
            "vocab_size": VOCABULARY,
            "context_length": CONTEXT,
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": "model.onnx",
                "head_size": 1,
                "hidden_size": 1,
                "num_attention_heads": 1,
                "num_hidden_layers": 1,
                "num_key_value_heads": 1,
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
            },
        },
        "search": {"do_sample": False, "max_length": CONTEXT, "past_present_share_buffer": False},
    }


class Summing(torch.nn.Module):
    """The summing decoder with its cache in a buffer, as in a .pte: logits of the last token only."""

    cache: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(CONTEXT))

    def forward(self, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        places = start + torch.arange(tokens.shape[1])
        self.cache.index_put_((places,), tokens[0].float())
        seen = torch.arange(CONTEXT) < start + tokens.shape[1]
        total = torch.where(seen, self.cache, 0.0).sum()
        likeliest = torch.remainder(total, float(VOCABULARY))
        peak = (torch.arange(VOCABULARY) == likeliest).float() * PEAK
        return peak.reshape(1, 1, VOCABULARY)


def write_onnx(folder: Path) -> Path:
    """Write the summing decoder as an ONNX folder that onnxruntime and onnxruntime-genai both read."""
    folder.mkdir()
    onnx.save(summing_graph(), folder / "model.onnx")
    (folder / "genai_config.json").write_text(json.dumps(genai_config()))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_pte(folder: Path) -> Path:
    """Write the summing decoder as a .pte next to a tokenizer."""
    from executorch.exir import to_edge

    length = torch.export.Dim("length", min=1, max=CONTEXT - 1)
    inputs = (torch.tensor([[1, 2, 3]]), torch.tensor([0]))
    program = torch.export.export(Summing(), inputs, dynamic_shapes=({1: length}, None))
    constants = {
        "get_max_seq_len": CONTEXT // 2,
        "get_max_context_len": CONTEXT,
        "enable_dynamic_shape": True,
    }
    folder.mkdir()
    with (folder / "model.pte").open("wb") as file:
        to_edge(program, constant_methods=constants).to_executorch().write_to_file(file)
    (folder / "tokenizer.json").write_text("{}")
    return folder
