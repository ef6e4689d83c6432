"""Take tiny random models of many architectures through the whole line, and write what became of each.

    python tools/sweep_architectures.py [NAME ...] [--out docs/reference]

For each architecture of `ARCHITECTURES`: is it refused before training, and why; else two steps of `finetune`, and for
each target the refusal that training printed, or the export and its distance from the frozen checkpoint. Results go to
`architectures.json`, one entry at a time, and from there into the table of `architectures.md`. With names, only these
are measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from qat_edge import storage
from qat_edge.errors import ModelError, QatEdgeError, UsageError
from qat_edge.evaluate.reference import DISTURBANCE, load_exact
from qat_edge.logs import quiet_libraries
from qat_edge.models import load, load_config
from qat_edge.options import ExportOptions, FinetuneOptions
from qat_edge.quant import scheme
from qat_edge.run import Run
from qat_edge.verbs.export import export
from qat_edge.verbs.finetune import finetune

TARGETS = ("executorch", "onnx")
CONTEXT = 64
GROUP_SIZE = 32  # default of finetune
PREFILLS = (3, 41)  # tokens of the prompts: inside the attention windows below, and five times as long
STEPS = 4  # tokens given one at a time after each prompt
# Without a rounding of activations, two implementations of these models agree to 110 dB or more; a wrong factor, window
# or epsilon gives less than 90. With the rounding, a last-bit difference can move an activation to another code, which
# a disturbed checkpoint shows as well.
FLOAT_DB = 100.0
BELOW_FLOOR_DB = 6.0
DISTURBANCES = (DISTURBANCE,) * 4 + (10 * DISTURBANCE,) * 4

SIZES: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
WINDOW = {"sliding_window": 8}
BOTH = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
ALL_HEADS = {"num_key_value_heads": 4}
HEAD_16 = {"head_dim": 16}
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 32,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32,
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 12.0, "attention_multiplier": 0.0625, "residual_multiplier": 0.22, "logits_scaling": 8.0,
}  # fmt: skip

EPSILON = {"rms_norm_eps": 1e-3}
NO_ROPE_SCALING = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LLAMA3_ROPE = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}  # fmt: skip
YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64,
    }
}  # fmt: skip
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}

# transformers' model type, with a colon and a variant where there are several -> settings of the tiny model, on top of
# `SIZES`. Settings that change the function have other values than those that change nothing.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": STATES,
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {**BOTH, "logit_scale": 0.0625},
    "cwm": {**BOTH, **HEAD_16},
    "deepseek_v2": {**EXPERTS, **LATENT, "v_head_dim": 32, "num_key_value_heads": 4},
    "diffllama": {},
    "doge": {},
    "ernie4_5": {**HEAD_16, **EPSILON, "tie_word_embeddings": True},
    "exaone4": BOTH,
    "falcon": {},
    "falcon_h1": {**STATES, "mamba_d_ssm": 128},
    "falcon_mamba": {"state_size": 4},
    "gemma": {**HEAD_16, **EPSILON},
    "gemma2": {
        **BOTH, **HEAD_16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**BOTH, "head_dim": 32, "query_pre_attn_scalar": 24, "hidden_size": 96},
    "gemma3_text: soft cap, epsilon": {
        **BOTH, **EPSILON, "head_dim": 32, "query_pre_attn_scalar": 24, "final_logit_softcapping": 3.0,
    },
    "gemma4_text": {
        **BOTH, "head_dim": 32, "hidden_size": 96, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 288,
    },
    "glm": HEAD_16,
    "glm4": {"head_dim": 32},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {"num_attention_heads": 2},
    "gpt_oss": {**EXPERTS, **BOTH, **HEAD_16},
    "gptj": {"rotary_dim": 8},
    "granite": {**MULTIPLIERS, **EPSILON, "tie_word_embeddings": True},
    "granitemoe": {**EXPERTS, **MULTIPLIERS},
    "helium": HEAD_16,
    "hunyuan_v1_dense": {**HEAD_16, **EPSILON, **NO_ROPE_SCALING},
    "hyperclovax": {},
    "jais2": {},
    "jamba": {**EXPERTS, "mamba_d_state": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama": {"tie_word_embeddings": True},
    "llama: biases, GELU, wide heads, epsilon": {
        **EPSILON, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh", "head_dim": 32,
    },
    "llama: Llama 3's rotary scaling": LLAMA3_ROPE,
    "llama4_text": {**EXPERTS, **HEAD_16, "intermediate_size_mlp": 128},
    "mamba": {"state_size": 4},
    "ministral": {**BOTH, **HEAD_16, **NO_ROPE_SCALING},
    "ministral3": HEAD_16,
    "mistral": {**WINDOW, **EPSILON},
    "mixtral": EXPERTS,
    "modernbert-decoder": {"local_attention": 16},
    "mpt": {},
    "nanochat": ALL_HEADS,
    "nemotron": {"num_attention_heads": 2, "num_key_value_heads": 1, "norm_eps": 1e-3},
    "olmo": {},
    "olmo: clipping": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": BOTH,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "persimmon": {"num_attention_heads": 2},
    "phi": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "phi3": {**WINDOW, "original_max_position_embeddings": 128},
    "phi3: half of each head rotated": {
        "num_attention_heads": 2, "num_key_value_heads": 1, "original_max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "phimoe": EXPERTS,
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen2: YaRN": YARN,
    "qwen2_moe": EXPERTS,
    "qwen3": {**HEAD_16, **EPSILON, "tie_word_embeddings": True},
    "qwen3_5_text": {**HEAD_16, "layer_types": ["linear_attention", "full_attention"]},
    "qwen3_moe": {**EXPERTS, **HEAD_16},
    "qwen3_next": {**EXPERTS, **HEAD_16},
    "rwkv": {},
    "seed_oss": HEAD_16,
    "smollm3": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "stablelm": {"num_attention_heads": 2, "num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "starcoder2": {**WINDOW, **ALL_HEADS},
    "vaultgemma": {**BOTH, **HEAD_16, "query_pre_attn_scalar": 24},
    "xglm": {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4},
    "youtu": {**LATENT, "v_head_dim": 32, "num_key_value_heads": 4},
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture, and of it for one target.

    Attributes:
        refusal: Sentence that refuses it before training; empty where it is exported.
        decibels: Least signal-to-noise ratio of the artifact's logits against the frozen checkpoint's, of those with
            the same rounding of activations; None where it is refused.
        floor: The same of the frozen checkpoint against itself, its embeddings disturbed in the last bits.
        fault: Why it did neither: a fault of qat-edge.
    """

    refusal: str = ""
    decibels: float | None = None
    floor: float | None = None
    fault: str = ""


def make_config(name: str) -> PretrainedConfig:
    """Return the configuration of a tiny model of one architecture."""
    config: PretrainedConfig = CONFIG_MAPPING[name.partition(":")[0]](**{**SIZES, **ARCHITECTURES[name]})
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    return config


def refusals(config: PretrainedConfig) -> dict[str, str]:
    """Return why a model cannot be trained ("training"), or exported to a target, from its configuration alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        load_config.refuse_unlike_layers(config)
        scheme.choose_scheme(model, GROUP_SIZE)
    except (ModelError, UsageError) as error:
        return {"training": str(error)}
    return load.export_gaps(config)


def sweep(name: str, folder: Path) -> dict[str, Outcome]:
    """Take one architecture through the line: target -> outcome. folder: for its files, empty."""
    config = make_config(name)
    known = refusals(config)
    if "training" in known:
        known = dict.fromkeys(TARGETS, known["training"])
    if known.keys() == set(TARGETS):
        return {target: Outcome(refusal=known[target]) for target in TARGETS}

    save_model(config, folder / "model")
    try:
        run = _train(folder)
    except QatEdgeError as error:
        # A refusal that comes with the training is one before the first step only if no run has been written.
        late = (folder / "run").exists()
        found = Outcome(fault=str(error)) if late else Outcome(refusal=str(error))
        return dict.fromkeys(TARGETS, found)
    return {target: _export_and_compare(run, target, known.get(target, "")) for target in TARGETS}


def save_model(config: PretrainedConfig, folder: Path) -> None:
    """Save a model with random weights, norms and biases included, and a byte tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    model.save_pretrained(folder)

    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    ).save_pretrained(folder)


def _train(folder: Path) -> Run:
    """Fine-tune the model in `folder` for two steps, the second one of QAT."""
    rows = [{"prompt": f"say {i}", "completion": f"{i}!"} for i in range(8)]
    storage.write_text(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    options = FinetuneOptions(
        model=str(folder / "model"), data=str(folder / "rows.jsonl"), steps=2, qat_start=0.5, batch_size=2, lora_rank=4,
        track=(),
    )  # fmt: skip
    run = Run(folder / "run")
    finetune(options, run.path)
    return run


def _export_and_compare(run: Run, target: str, gap: str) -> Outcome:
    """Export a run to one target and compare the artifact with the frozen checkpoint. gap: refusal of the target."""
    if gap:
        return Outcome(refusal=gap)
    try:
        export(run, ExportOptions(target=(target,), context_length=CONTEXT, ptq=("none",)), force=True)
        artifact_logits = {"executorch": _pte_logits, "onnx": _onnx_logits}[target]
        decibels, floor = _distances(run, target, artifact_logits)
    except Exception as error:
        return Outcome(fault=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    if decibels < min(floor - BELOW_FLOOR_DB, FLOAT_DB):
        return Outcome(decibels=decibels, floor=floor, fault="the artifact computes another function")
    return Outcome(decibels=decibels, floor=floor)


def _distances(run: Run, target: str, artifact_logits: Any) -> tuple[float, float]:
    """Return the least SNR of the artifact's logits, and the least of the disturbed checkpoint's, in dB."""
    reference = load_exact(run.quantized)
    if target == "onnx":
        # onnxruntime on x86 rounds activations per block, torch per token: leave the rounding out on both sides.
        for module in reference.modules():
            module._forward_pre_hooks.clear()

    found, floor = [], []
    for prefill in PREFILLS:
        ids = torch.randint(3, 250, (1, prefill + STEPS), generator=torch.Generator().manual_seed(prefill))
        wanted = _torch_logits(reference, ids)
        for position, logits in artifact_logits(run.exports / target, ids, prefill):
            found.append(decibels_of(wanted[position], logits))
        for seed, size in enumerate(DISTURBANCES):
            other = _torch_logits(reference, ids, size, seed)
            floor += [decibels_of(wanted[p], other[p]) for p in range(prefill - 1, ids.shape[1])]
    return min(found), min(floor)


def _torch_logits(model: Any, ids: torch.Tensor, disturbance: float = 0.0, seed: int = 0) -> NDArray[np.float32]:
    """Return the logits of all tokens. disturbance: of the embeddings, relative."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + disturbance * torch.randn(output.shape, generator=generator))

    handle = model.get_input_embeddings().register_forward_hook(disturb)
    with torch.no_grad():
        logits: NDArray[np.float32] = model(ids).logits[0].numpy()
    handle.remove()
    return logits


def _pte_logits(folder: Path, ids: torch.Tensor, prefill: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield position and logits: of the prompt's last token, then of one token at a time."""
    import executorch.kernels.quantized  # noqa: F401  operators of the .pte
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  operators of the .pte
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    program = _load_for_executorch(str(folder / "model.pte"))
    for begin, end in [(0, prefill), *((i, i + 1) for i in range(prefill, ids.shape[1]))]:
        (logits,) = program.forward((ids[:, begin:end].contiguous(), torch.tensor([begin])))
        yield end - 1, logits[0, -1].numpy()


def _onnx_logits(folder: Path, ids: torch.Tensor, prefill: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield position and logits of all tokens: a prompt, then one token at a time, with float activations."""
    import onnx
    import onnxruntime

    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    outputs = [output.name for output in session.get_outputs()]
    decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    empty = [i for i in session.get_inputs() if i.name.startswith("past")]
    cache = {i.name: np.zeros((1, i.shape[1], 0, decoder["head_size"]), np.float32) for i in empty}
    takes = {i.name for i in session.get_inputs()}
    for end in range(prefill, ids.shape[1] + 1):
        begin = 0 if end == prefill else end - 1
        feeds = {
            "input_ids": ids[:, begin:end].numpy(),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(begin, end)[None],
            **cache,
        }
        found = dict(zip(outputs, session.run(outputs, {k: v for k, v in feeds.items() if k in takes}), strict=True))
        for offset, row in enumerate(found.pop("logits")[0]):
            yield begin + offset, row
        cache = {name.replace("present", "past_key_values"): value for name, value in found.items()}


def decibels_of(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Return the signal-to-noise ratio in dB, at most 300; -300 where a logit is not finite."""
    signal, noise = np.asarray(wanted, np.float64), np.asarray(wanted, np.float64) - np.asarray(found, np.float64)
    ratio = float((signal**2).sum() / max((noise**2).sum(), 1e-30))
    return min(10 * math.log10(ratio), 300.0) if math.isfinite(ratio) and ratio > 0 else -300.0


# --- the table ----------------------------------------------------------------------------------------------

HEADER = """# Architectures

Tiny random models of these architectures, two layers each and with every setting that changes the function, go through
the whole line: fine-tune, freeze, export to both targets, and run the artifact against the frozen checkpoint, on
prompts at once and token by token. The table is written by `tools/sweep_architectures.py`; a test keeps its refusals
current.

A number is the distance of the artifact's logits from those of the frozen checkpoint, in dB of signal to noise: the
least of all tokens, and in brackets that of the checkpoint from itself when its embeddings are disturbed in their last
bits. Both are about 40 dB where a last bit moves an activation to another int8 code.
For ONNX the rounding of activations is left out on both sides, because onnxruntime on x86 rounds them per block.
A sentence is the reason for which `finetune` refuses the model or warns of the target, before training.

| architecture | ExecuTorch | ONNX |
|---|---|---|
"""


def write_table(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the results as a page of the documentation."""
    rows = []
    for name, outcomes in sorted(results.items()):
        cells = [_cell(Outcome(**outcomes[target])) for target in TARGETS]
        refused = cells[0] == cells[1] and bool(outcomes[TARGETS[0]]["refusal"])
        rows.append(f"| `{name}` | {cells[0]} | {'the same' if refused else cells[1]} |\n")
    storage.write_text(path, HEADER + "".join(rows))


def _cell(outcome: Outcome) -> str:
    if outcome.refusal:
        return outcome.refusal.replace("|", "\\|")
    if outcome.decibels is None or outcome.floor is None or outcome.fault:
        return f"**{outcome.fault}**".replace("|", "\\|")
    return f"exported: {outcome.decibels:.0f} dB ({outcome.floor:.0f})"


def main(arguments: list[str]) -> int:
    """Measure, and write after each architecture; the exit code is the number of faults, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures to measure; all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/reference")
    given = parser.parse_args(arguments)

    store = given.out / "architectures.json"
    results: dict[str, dict[str, Any]] = json.loads(store.read_text(encoding="utf-8")) if store.is_file() else {}
    results = {name: outcomes for name, outcomes in results.items() if name in ARCHITECTURES}
    faults = 0
    for name in given.names or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = sweep(name, Path(folder))
        results[name] = {target: vars(outcome) for target, outcome in outcomes.items()}
        for target, outcome in outcomes.items():
            faults += bool(outcome.fault)
            print(f"{name} {target}: {_cell(outcome)}", flush=True)
        storage.write_text(store, json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        write_table(results, given.out / "architectures.md")
    return int(faults > 0)


if __name__ == "__main__":
    quiet_libraries(verbose=False)
    sys.exit(main(sys.argv[1:]))
