"""Where the quantization-aware phase starts from: weights that a PTQ method has prepared, and scales of their own.

start.safetensors holds, of every quantized linear layer, NAME.scales in bfloat16 and, where the method or a rotation
changed the weight, PARAMETER in bfloat16, as of the tables that a rotation changed; other parameters that changed
(AWQ folds into norms), and what a norm's output is turned by, in float32. Weights are rounded to bfloat16 before
training sees them, so what is stored is what was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat_edge.errors import RunError
from qat_edge.quant import fake, rotated_norm, rotation
from qat_edge.quant.ptq import methods
from qat_edge.quant.scheme import Scheme
from qat_edge.run import read_manifest, replace_folder, sha256, write_manifest

FILE = "start.safetensors"
SCALES = ".scales"


@dataclass(frozen=True)
class Start:
    """scales: (out, in // group) by module name. changed: parameters of the base model by name, and NORM.turn."""

    scales: dict[str, Tensor]
    changed: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path, expected_sha256: str) -> Start:
        """What `save` wrote.

        Raises:
            RunError: it is missing, or another one than the adapter was trained from.
        """
        path = folder / FILE
        if not path.is_file():
            raise RunError(f"{path} is missing, and the adapter beside it means nothing without it. Restore it.")
        if sha256(path) != expected_sha256:
            raise RunError(f"{path} is not the start this adapter was trained from (another sha256). Restore it.")
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        scales = {name.removesuffix(SCALES): t for name, t in tensors.items() if name.endswith(SCALES)}
        return cls(scales, {name: t for name, t in tensors.items() if not name.endswith(SCALES)})

    def save(self, folder: Path, **facts: Any) -> str:
        """Write the folder and return the sha256 of its tensors; `facts` go into the manifest."""
        tensors = {name + SCALES: scales.to(torch.bfloat16).cpu() for name, scales in self.scales.items()}
        tensors |= {name: tensor.cpu().contiguous() for name, tensor in self.changed.items()}
        with replace_folder(folder, force=True) as work:
            save_file(tensors, work / FILE)
            write_manifest(work, "start", **facts)
        return sha256(folder / FILE)

    def apply(self, model: Any) -> None:
        """Put weights and scales into a base model that `fake.insert` prepared, adapters around it or not."""
        fake.set_scales(model, self.scales)
        turns = {name for name in self.changed if name.endswith(f".{rotated_norm.TURN}")}
        layers = {f"{name}.weight" for name in self.scales}
        if not turns and any(t.dim() == 2 and name not in layers for name, t in self.changed.items()):
            rotation.untie(model)  # embedding and head changed, each in its own way
        with torch.no_grad():
            for name, tensor in self.changed.items():
                module, _, attribute = name.rpartition(".")
                if name in turns:
                    rotated_norm.turn_output(model.get_submodule(module), tensor)
                else:
                    getattr(model.get_submodule(module), attribute).data.copy_(tensor)


def make(
    trained: Any,
    scheme: Scheme,
    method: str,
    calibration: Sequence[Mapping[str, Tensor]],
    rotation_seed: int | None = None,
) -> Start:
    """Quantize the merged weights of a training model by `method`; the adapters go on as they are.

    trained: a model whose layers `fake.insert` prepared, with adapters around them or not, its switch off; its base is
    changed in place and ends as `Start.apply` would leave it. method: one of run.PTQ_METHODS. Afterwards
    base + s B A is what the method would round.
    rotation_seed: turn the hidden states first, adapters as well; only for methods that change the base.

    Raises:
        ModelError: hidden states that cannot be turned.
    """
    model = fake.base_of(trained)
    if method not in methods.CALIBRATED:  # it only looks, so that no weight changes by so much as a bit
        start = Start(methods.apply(fake.MergedWeights(trained), scheme, method, calibration), {})
        start.apply(model)
        return start
    vectors = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 1}
    if rotation_seed is not None:
        rotation.rotate(trained, scheme, rotation_seed)
    layers = {name: model.get_submodule(name) for name in scheme.linears}
    with torch.no_grad(), _folded(list(layers.values())):
        scales = methods.apply(model, scheme, method, calibration)
    changed = {n: p.detach() for n, p in model.named_parameters() if n in vectors and not torch.equal(p, vectors[n])}
    turns = rotated_norm.turns_of(model)
    tables = () if rotation_seed is None else (scheme.embedding, *(() if turns else (scheme.head,)))
    weights = {name: model.get_submodule(name).weight for name in (*layers, *tables)}
    changed |= {f"{name}.weight": weight.detach().to(torch.bfloat16) for name, weight in weights.items()}
    changed |= {f"{name}.{rotated_norm.TURN}": turn for name, turn in turns.items()}
    # An adapter stands between a layer and its name; `apply` goes through it, and works before it is there.
    start = Start(scales, {name.replace(".base_layer", ""): tensor for name, tensor in changed.items()})
    start.apply(model)
    return start


def recorded_sha256(folder: Path) -> str:
    """Of the tensors of the start in `folder`, as its manifest has it.

    Raises:
        RunError: there is none.
    """
    return str(read_manifest(folder)["files"][FILE]["sha256"])


@contextmanager
def _folded(layers: Sequence[nn.Module]) -> Iterator[None]:
    """For the duration, every adapter is merged into its base weight and adds nothing itself."""
    held = []
    for layer in layers:
        if isinstance(layer, fake.LoraFakeQuantLinear):
            lora_b = layer.lora_B[fake.ADAPTER].weight
            update = layer.get_delta_weight(fake.ADAPTER).detach()
            layer.weight.data.add_(update)
            held.append((layer, lora_b, lora_b.detach().clone()))
            lora_b.data.zero_()
    yield
    for layer, lora_b, values in held:
        lora_b.data.copy_(values)
        layer.weight.data.sub_(layer.get_delta_weight(fake.ADAPTER).detach())
