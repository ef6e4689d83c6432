"""The ExecuTorch exporter and its reader: tiny models in the runtime and in the LLM runner of the phone apps."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import executorch.kernels.quantized  # noqa: F401  operators of the .pte
import numpy as np
import pytest
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  operators of the .pte
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
from executorch.extension.pybindings.portable_lib import _load_for_executorch
from tiny import CONTEXT, MIXED, SHAPE, TinyExport, export_into, freeze, llama, prefill_and_decode, sqnr
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from conftest import make_tokenizer
from qat_edge.errors import ExportError
from qat_edge.verbs.verify import verify_folder
from qat_edge_exporters.executorch.export_pte import export
from qat_edge_exporters.executorch.graph import attention, quantized_modules, tracing
from qat_edge_exporters.executorch.graph.portable_attention import PortableCache
from qat_edge_exporters.executorch.pte import delegates, runner_contract
from qat_edge_exporters.executorch.pte.pte_reader import read

LENGTHS = (1, 2, 7, 33)  # tokens of prompts
STEPS = 3  # tokens decoded after each
MODELS: dict[str, tuple[Callable[[], PretrainedConfig], int]] = {
    "llama": (llama, 32),
    "llama_biases_untied": (lambda: llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=False), 64),
    "qwen2": (lambda: Qwen2Config(**SHAPE), 32),
    "qwen3": (lambda: Qwen3Config(**SHAPE, head_dim=32), 32),
    # First down_proj in groups of 32 and the others of 64, then layers that are 72 wide: int8 per channel.
    "mixed_groups": (lambda: llama(intermediate_size=96), 64),
    "int8_layers": (lambda: llama(intermediate_size=72), 32),
    "mixed_bits": (llama, 32),  # chosen for each layer, see tiny.MIXED
    "mistral_short": (lambda: MistralConfig(**SHAPE, sliding_window=CONTEXT), 32),
    "int4_embedding": (llama, 32),
    "int4_head_untied": (lambda: llama(tie_word_embeddings=False), 64),
    "int4_tables": (llama, 32),
    "rotated": (llama, 32),
    "rotated_int4_tables": (llama, 32),
}
TABLES = {  # bits of embedding and head
    "int4_embedding": (4, 8), "int4_head_untied": (8, 4), "int4_tables": (4, 4), "rotated_int4_tables": (4, 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    """Export a tied llama whose generation_config has a second end token, one that the model generates."""
    root = tmp_path_factory.mktemp("executorch")
    model = freeze(llama(), 32, root / "frozen")
    prompt, completion = next(pair for pair in map(partial(complete, model), ascii_lowercase) if pair is not None)

    # Its last token ends a text from now on.
    config = json.loads((root / "frozen/generation_config.json").read_text())
    config["eos_token_id"] = [2, completion[-1]]
    (root / "frozen/generation_config.json").write_text(json.dumps(config))
    made = export_into(root / "frozen", root / "export")
    return replace(made, prompt=prompt, completion=completion)


def complete(model: Any, prompt: str) -> tuple[str, tuple[int, ...]] | None:
    """Return `prompt` and three tokens that continue it greedily.

    None unless they differ and are ASCII: the runner's callback fails on a part of a character.
    """
    tokenizer = make_tokenizer()
    tokens = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        for _ in range(3):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    completion = tokens[-3:]
    usable = len(set(completion)) == 3 and 2 not in completion and tokenizer.decode(completion).isascii()
    return (prompt, tuple(completion)) if usable else None


@pytest.mark.parametrize("name", MODELS)
def test_computes_the_frozen_function(name: str, tmp_path: Path) -> None:
    config, group_size = MODELS[name]
    bits, table_bits = MIXED if name == "mixed_bits" else None, TABLES.get(name, (8, 8))
    rotated = name.startswith("rotated")
    reference = freeze(config(), group_size, tmp_path / "frozen", bits, table_bits, rotated=rotated)
    made = export_into(tmp_path / "frozen", tmp_path / "export")
    pte = made.pte

    # Logits of prompts, and of tokens decoded after each, next to those of the frozen model in torch.
    torch.manual_seed(1)
    agreement = []
    for length in LENGTHS:
        program = _load_for_executorch(str(pte))
        tokens = torch.randint(3, 288, (1, length + STEPS))
        with torch.no_grad():
            wanted = reference(tokens).logits[0]
        for begin, end in prefill_and_decode(length, length + STEPS):
            (logits,) = program.forward((tokens[:, begin:end].contiguous(), torch.tensor([begin])))
            assert logits.shape == (1, 1, 288)
            agreement.append(sqnr(wanted[end - 1], logits[0, 0]))
    # Float rounding, except where it moves an activation across a rounding boundary of its int8 form (40 to 60 dB).
    assert statistics.median(agreement) > 100, agreement
    assert min(agreement) > 25, agreement

    # Codes and scales are those of the checkpoint, and the parts sum to the folder.
    result, sizes = verify_folder(made.folder, "executorch", made.frozen), read(made.folder).size_bytes
    assert result.faults == [] and result.embedding_equal and result.head_equal
    assert sum(sizes.values()) == sum(p.stat().st_size for p in made.folder.iterdir() if p.name != "manifest.json")

    # The head of a tied table has no bytes.
    codes = {8: 288 * 64, 4: 288 * 64 // 2}  # bytes
    scales = {8: 288 * 4, 4: 288 * 64 // group_size * 2}  # float32, or bfloat16 by group
    both = {bits: codes[bits] + scales[bits] for bits in codes}
    shared = both[table_bits[0]] if len(set(table_bits)) == 1 and config().tie_word_embeddings else 0
    assert (sizes["embedding"], sizes["head"]) == (both[table_bits[0]], both[table_bits[1]] - shared)


def test_prefill_in_two_parts_gives_the_same_logits(exported: TinyExport) -> None:
    torch.manual_seed(2)
    tokens = torch.randint(3, 288, (1, 12))
    at_once, in_parts = _load_for_executorch(str(exported.pte)), _load_for_executorch(str(exported.pte))
    (wanted,) = at_once.forward((tokens, torch.tensor([0])))
    in_parts.forward((tokens[:, :5].contiguous(), torch.tensor([0])))
    (found,) = in_parts.forward((tokens[:, 5:].contiguous(), torch.tensor([5])))
    torch.testing.assert_close(found, wanted)


def test_the_whole_context_can_be_used(exported: TinyExport) -> None:
    torch.manual_seed(3)
    tokens = torch.randint(3, 288, (1, CONTEXT))
    at_once, last_alone = _load_for_executorch(str(exported.pte)), _load_for_executorch(str(exported.pte))
    (wanted,) = at_once.forward((tokens, torch.tensor([0])))
    last_alone.forward((tokens[:, :-1].contiguous(), torch.tensor([0])))
    (found,) = last_alone.forward((tokens[:, -1:].contiguous(), torch.tensor([CONTEXT - 1])))
    torch.testing.assert_close(found, wanted)


def test_files_and_constant_methods(exported: TinyExport) -> None:
    names = {p.name for p in exported.folder.iterdir()}
    assert {"model.pte", "layers.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert read(exported.folder).metadata == {
        "get_max_seq_len": CONTEXT, "get_max_context_len": CONTEXT, "enable_dynamic_shape": True,
        "use_kv_cache": True, "use_sdpa_with_kv_cache": True, "get_eos_ids": [2, exported.completion[-1]],
        "get_eos_id": 2, "get_bos_id": 1, "get_vocab_size": 288, "get_n_layers": 2,
    }  # fmt: skip


WITHOUT_CUSTOM_OPERATORS = """
import sys, numpy
from executorch.extension.pybindings.portable_lib import _get_operator_names, _load_for_executorch
import torch
spaces = {name.partition("::")[0] for name in _get_operator_names()}
assert not spaces & {"llama", "quantized_decomposed"}, spaces
tokens = torch.from_numpy(numpy.load(sys.argv[2]))
rows = []
for length in map(int, sys.argv[4:]):
    program = _load_for_executorch(sys.argv[1])
    for begin, end in [(0, length), *((i, i + 1) for i in range(length, tokens.shape[1]))]:
        rows.append(program.forward((tokens[:, begin:end].contiguous(), torch.tensor([begin])))[0][0, 0].numpy())
numpy.save(sys.argv[3], numpy.stack(rows))
"""


@pytest.mark.parametrize("head_bits", [8, 4])
def test_a_portable_int4_embedding_looks_up_the_same_rows(head_bits: int, tmp_path: Path) -> None:
    model = freeze(llama(), 32, tmp_path / "frozen", table_bits=(4, head_bits))
    embedding, tokens = model.get_input_embeddings(), torch.arange(288).unsqueeze(0)
    table = quantized_modules.PlainEmbedding(embedding.weight, as_head=head_bits == 4)
    torch.testing.assert_close(table(tokens), embedding(tokens), rtol=0, atol=0)
    made = export_into(tmp_path / "frozen", tmp_path / "export", portable=True)
    result = verify_folder(made.folder, "executorch", made.frozen)
    assert result.faults == [] and result.embedding_equal
    assert (read(made.folder).size_bytes["head"] == 0) == (head_bits == 4), "one table for both"
    (found,) = _load_for_executorch(str(made.pte)).forward((tokens[:, 5:30].contiguous(), torch.tensor([0])))
    with torch.no_grad():
        assert sqnr(model(tokens[:, 5:30]).logits[0, -1], found[0, 0]) > 25


def test_portable_computes_the_same_without_custom_operators(exported: TinyExport, tmp_path: Path) -> None:
    # In a process that registers no custom operator.
    (tmp_path / "portable").mkdir()
    export(exported.frozen, tmp_path / "portable", CONTEXT, portable=True)
    torch.manual_seed(1)
    tokens = torch.randint(3, 288, (1, max(LENGTHS) + STEPS))
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    files = [tmp_path / "portable" / "model.pte", tmp_path / "tokens.npy", tmp_path / "logits.npy"]
    command = [sys.executable, "-c", WITHOUT_CUSTOM_OPERATORS, *map(str, [*files, *LENGTHS])]
    subprocess.run(command, check=True, capture_output=True)

    # The program with custom operators is the reference.
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    wanted = []
    for length in LENGTHS:
        program = _load_for_executorch(str(exported.pte))
        for begin, end in prefill_and_decode(length, tokens.shape[1]):
            wanted.append(program.forward((tokens[:, begin:end].contiguous(), torch.tensor([begin])))[0][0, 0])
    agreement = [sqnr(a, b) for a, b in zip(wanted, found, strict=True)]
    assert statistics.median(agreement) > 100 and min(agreement) > 25, agreement

    # The same codes and scales, and no operator outside of ATen.
    result = verify_folder(tmp_path / "portable", "executorch", exported.frozen)
    assert result.faults == [] and result.linears_equal == result.linears == 14
    assert result.embedding_equal and result.head_equal
    plan = next(p for p in delegates.open_pte(files[0]).program.execution_plan if p.name == runner_contract.FORWARD)
    assert {operator.name.partition("::")[0] for operator in plan.operators} == {"aten"}
    assert len(plan.delegates) == 5  # attention is inside: no more delegates than with custom operators


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SHAPE, sliding_window=8),
        Gemma2Config(**SHAPE, head_dim=16, sliding_window=8, attn_logit_softcapping=2.0),
        llama(num_key_value_heads=4),
    ],
    ids=["window", "window_and_softcap", "a_key_for_each_query"],
)
def test_portable_attention_computes_the_models_own(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = torch.randint(3, 288, (1, 20))
    decoder = tracing.Decoder(model, PortableCache(CONTEXT)).eval()
    with torch.no_grad():
        wanted = model(tokens).logits[0]
        with attention.replace_attention(decoder.cache, model.config):
            decoder(tokens[:, :1], torch.tensor([0]))  # creates the cache's buffers
            for begin, end in [(0, 13), (13, 14), (14, 20)]:
                logits = decoder(tokens[:, begin:end], torch.tensor([begin]))
                torch.testing.assert_close(logits[0, 0], wanted[end - 1], rtol=1e-4, atol=1e-5)


def test_the_llm_runner_generates_and_stops(exported: TinyExport) -> None:
    runner = TextLLMRunner(str(exported.pte), str(exported.folder / "tokenizer.json"))
    pieces: list[str] = []
    stats: list[Any] = []
    config = GenerationConfig(max_new_tokens=20, temperature=0.0, echo=False)
    runner.generate(exported.prompt, config, token_callback=pieces.append, stats_callback=stats.append)
    # The third token is an end token in generation_config.json, but not in the tokenizer.
    assert stats[0].num_generated_tokens <= 3
    assert "".join(pieces).startswith(make_tokenizer().decode(exported.completion[:2]))


def export_error(config: PretrainedConfig, tmp_path: Path, context_length: int, tokenizer: bool = True) -> str:
    freeze(config, 32, tmp_path / "frozen")
    if not tokenizer:
        (tmp_path / "frozen/tokenizer.json").unlink()
    (tmp_path / "export").mkdir()
    with pytest.raises(ExportError) as caught:
        export(tmp_path / "frozen", tmp_path / "export", context_length)
    assert list((tmp_path / "export").iterdir()) == []
    return str(caught.value)


def test_more_positions_than_the_model_has_are_refused(tmp_path: Path) -> None:
    assert "positions for 128 tokens at most" in export_error(llama(), tmp_path, 129)


def test_rotary_embeddings_that_change_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
            "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}  # fmt: skip
    assert "change beyond 32 tokens" in export_error(llama(rope_parameters=rope), tmp_path, 64)


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    assert "no tokenizer.json" in export_error(llama(), tmp_path, 64, tokenizer=False)
