"""What was trained, on disk, and the models it belongs to: on what, merged in float32.

`finetune --method full` leaves whole models in the adapters' place: model.safetensors and config.json.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat_edge import progress
from qat_edge.errors import RunError
from qat_edge.models import load, tasks
from qat_edge.quant import fake, frozen, numerics, qlora_base, rotation, scheme
from qat_edge.quant.fake import SCALE_FACTOR
from qat_edge.quant.qat_init import Start
from qat_edge.run import LIBRARIES, library_version, read_manifest, replace_folder, write_manifest

WHOLE_MODEL = "model.safetensors"

# Those whose arithmetic a trained code depends on.
NUMERIC_LIBRARIES = tuple(name for name in LIBRARIES if name in ("torch", "torchao", "transformers", "peft"))


@dataclass(frozen=True)
class Merged:
    """Base model with adapters merged in float32, not yet rounded.

    scales: group scales by module name (out, in // group) of weights that have their own; the others
    take those of their largest values.
    """

    model: Any
    tokenizer: Any
    scheme: scheme.Scheme
    scales: dict[str, Tensor]


def adapter_facts(folder: Path) -> dict[str, Any]:
    """What an adapter folder was trained on.

    Raises:
        RunError: the folder holds no finished adapter.
    """
    if not folder.is_dir():
        raise RunError(
            f"{folder} is missing: the training has not come that far. `qat-edge finetune --resume` goes on."
        )
    return read_manifest(folder)


def merged_model(adapter: Path, force: bool = False) -> Merged:
    """Base model with the adapters of one folder merged in float32.

    force: merge although the quantizer or libraries have other versions than those of the training.

    Raises:
        RunError: no adapter there, or the base model, the start or a library is not the one of the training.
    """
    facts = adapter_facts(adapter)
    _same_numerics(adapter, facts, force)
    trained, _, tokenizer, plan = _trained(adapter, facts)
    # A stored base is dequantized on the device of the training, too.
    merged, scales = fake.merge_adapters(trained.to(_merge_device(facts["device"])))
    merged = merged.to("cpu").eval().requires_grad_(False)
    return Merged(merged, tokenizer, plan, {name: s.cpu() for name, s in scales.items()})


def float_model(reference: Path, quantized: Path) -> Any:
    """The FP32 fine-tune in the coordinates of a checkpoint that was frozen of its run: one may stand in for parts of
    the other.

    Raises:
        RunError: see `merged_model`.
    """
    merged = merged_model(reference)
    seed = read_manifest(quantized).get("rotation_seed")
    if seed is not None:
        rotation.rotate(merged.model, replace(merged.scheme, tied=frozen.read_scheme(quantized).tied), seed)
    return merged.model


def rounding_model(adapter: Path) -> Any:
    """The model as it ended its training: adapters beside the base, rounded in every forward pass; float32.

    Raises:
        RunError: see `merged_model`.
    """
    trained, switch, _, _ = _trained(adapter, adapter_facts(adapter))
    switch.enabled = True
    return trained.eval().requires_grad_(False)


def base_model(adapter: Path) -> Any:
    """The base model that was trained on, in float32, without what was trained.

    As the training had it: with the layers it kept, and in the values that a base in few bits stands for.
    """
    model, _, plan = _base_model(adapter_facts(adapter))
    for layer in map(model.get_submodule, plan.linears):
        if isinstance(layer, qlora_base.StoredLinear):
            qlora_base.make_dense(layer)
    return model.eval()


def save(model: Any, folder: Path, kind: str, facts: dict[str, Any], scales: bool = True) -> None:
    """Write the adapters of a peft model, or a model without any as a whole.

    scales: with the factors of learned scales; without them it is plain LoRA, or a plain Hugging Face model.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if scales or SCALE_FACTOR not in name}
    with replace_folder(folder, force=True) as work:
        if isinstance(model, PeftModel):
            model.save_pretrained(work, save_embedding_layers=False, state_dict=state)
        else:
            model.config.save_pretrained(work)
            # One name for each tensor: a head that shares the embedding's table goes without.
            own = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
            tensors = {name: state[name].contiguous() for name in own.values()}
            save_file(tensors, work / WHOLE_MODEL, metadata={"format": "pt"})
        write_manifest(work, kind, **facts)


def _trained(adapter: Path, facts: dict[str, Any]) -> tuple[Any, fake.Switch, Any, scheme.Scheme]:
    """Base model with what one folder adds to it, not merged; the switch of its rounding, tokenizer, scheme."""
    model, tokenizer, plan = _base_model(facts)
    switch = fake.insert(model, plan, facts["learned_scales"])
    if facts["start"]:
        Start.load(adapter.parent / "start", facts["start"]["sha256"]).apply(model)
        plan = replace(plan, tied=plan.tied and scheme.share_table(model))
    if facts["method"] == "full":
        return _load_whole(fake.train_weights(model), adapter), switch, tokenizer, plan
    config = fake.register(LoraConfig.from_pretrained(str(adapter)))
    return PeftModel.from_pretrained(model, str(adapter), config=config), switch, tokenizer, plan


def _load_whole(model: Any, folder: Path) -> Any:
    """Put the weights that `save` wrote into their model.

    Raises:
        RunError: they are missing, or those of another model.
    """
    path = folder / WHOLE_MODEL
    if not path.is_file():
        raise RunError(f"{path} is missing, though the manifest beside it speaks of a whole model. Train again.")
    tensors = load_file(path)
    own = dict(model.named_parameters())  # each shared one once
    wrong = sorted(n for n in own if SCALE_FACTOR not in n and n not in tensors)
    if wrong or not tensors.keys() <= model.state_dict().keys():
        raise RunError(f"{path} holds another model ({', '.join(wrong[:3]) or 'more tensors'}). Train again.")
    model.load_state_dict(tensors, strict=False)
    return model


def _base_model(facts: dict[str, Any]) -> tuple[Any, Any, scheme.Scheme]:
    """As it was prepared for training: pruned, its weights held as they were then. With tokenizer and scheme."""
    recorded = facts["model"]
    kind = tasks.recorded(recorded)
    model, tokenizer, identity = load.load_model(recorded["source"], recorded["trust_remote_code"], kind=kind)
    found, trained = dataclasses.asdict(identity), recorded["identity"]
    changed = [k for k in ("revision", "files") if found[k] != trained[k]]
    if changed:
        raise RunError(
            f"{recorded['source']} is not the model that was trained: {changed[0]} is {found[changed[0]]}, the run "
            f"was trained on {trained[changed[0]]}. Restore that model, or run finetune again."
        )
    if facts["kept_layers"] is not None:
        load.keep_layers(model, facts["kept_layers"])
    plan = scheme.choose(model, facts["group_size"], facts["bits"], tuple(facts.get("table_bits", (8, 8))))
    if facts["base"] != "fp32":
        qlora_base.store(model, plan.linears, facts["base"])
    return model, tokenizer, plan


def _same_numerics(adapter: Path, facts: dict[str, Any], force: bool) -> None:
    """Refuse to merge under other numerics than were trained, unless forced."""
    trained = facts["libraries"] | {"quantizer": facts["quantizer"]}
    current = {name: library_version(name) for name in NUMERIC_LIBRARIES} | {"quantizer": numerics.QUANTIZER}
    changed = [f"{name} {now} (trained with {trained[name]})" for name, now in current.items() if trained[name] != now]
    if not changed:
        return
    told = f"{adapter} was trained under other numerics: {', '.join(changed)}. A code at a rounding tie may differ."
    if not force:
        raise RunError(f"{told} Install those versions, train again, or give --force to go on.")
    progress.info(f"--force: {told}")


def _merge_device(trained_on: str) -> str:
    """Merge where it was trained: the last bit of B A, and with it a code at a tie, depends on the device."""
    if trained_on == "cuda" and not torch.cuda.is_available():
        progress.info(
            "Trained on CUDA, merged on this CPU: a few codes at rounding ties may differ from those in training."
        )
        return "cpu"
    return trained_on
