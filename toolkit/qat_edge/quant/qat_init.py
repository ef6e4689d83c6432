"""Initialization of the QAT phase: weights prepared by a PTQ method, and scales of their own.

start.safetensors holds, for every quantized linear layer, NAME.scales in bfloat16 and, where the method or a rotation
changed the weight, PARAMETER in bfloat16; likewise for tables. Other parameters that
changed (AWQ folds into norms) and the rotation of a norm's output are in float32. Weights are rounded to bfloat16
before training sees them, so the stored weights are those trained on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat_edge import readers
from qat_edge.errors import RunError
from qat_edge.manifest import read_manifest, sha256, write_manifest
from qat_edge.quant import fake, numerics, rotated_norm, rotation
from qat_edge.quant.ptq import methods
from qat_edge.quant.ptq.method_names import CALIBRATED
from qat_edge.quant.scheme import Scheme, shares_table
from qat_edge.storage import replace_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "start.safetensors"
SCALES = ".scales"  # ends the names of scales in the file


@dataclass(frozen=True)
class QatInit:
    """Weights and scales that the QAT phase begins from.

    Attributes:
        scales: Module name -> scales (out, in // group).
        changed: Parameters of the base model by name, and NORM.turn: the rotation of a norm's output.
        path: File that they were read from, for messages.
    """

    scales: dict[str, Tensor]
    changed: dict[str, Tensor]
    path: Path = Path(FILE)

    @classmethod
    def load(cls, folder: Path, expected_sha256: str) -> QatInit:
        """Read a saved initialization.

        Raises:
            RunError: It is missing, or not the one that the adapter was trained from.
        """
        path = folder / FILE
        if not path.is_file():
            raise RunError(f"{path} is missing, and the adapter of this run is useless without it. Restore it.")
        if sha256(path) != expected_sha256:
            raise RunError(
                f"{path} is not the initialization that this adapter was trained from (another sha256). Restore it."
            )
        # Everything is float32 in memory; bfloat16 values stay what they are.
        try:
            tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise RunError(
                f"{path}: damaged ({readers.shorten(str(error), 200)}). Restore it, or train again."
            ) from error
        scales = {name.removesuffix(SCALES): t for name, t in tensors.items() if name.endswith(SCALES)}
        return cls(scales, {name: t for name, t in tensors.items() if not name.endswith(SCALES)}, path)

    def save(self, folder: Path, **metadata: Any) -> str:
        """Write the folder, with `metadata` in its manifest, and return the sha256 of its tensors."""
        tensors = {name + SCALES: scales.to(torch.bfloat16).cpu() for name, scales in self.scales.items()}
        tensors |= {name: tensor.cpu().contiguous() for name, tensor in self.changed.items()}
        with replace_folder(folder, force=True) as work:
            save_file(tensors, work / FILE)
            write_manifest(work, "start", **metadata)
        return sha256(folder / FILE)

    def copy(self, folder: Path, **metadata: Any) -> str:
        """Write the file that it was read from into another folder, and return the sha256 of its tensors."""
        with replace_folder(folder, force=True) as work:
            shutil.copyfile(self.path, work / FILE)
            write_manifest(work, "start", **metadata)
        return sha256(folder / FILE)

    def apply(self, model: PreTrainedModel) -> None:
        """Put weights and scales into a base model that `fake.insert` prepared, with or without adapters around it."""
        self._require_fitting(model)
        # Loading and preparing end in this one function, so that a resumed run trains the same numbers.
        fake.set_scales(model, self.scales)

        # Tables that changed without a rotated norm changed differently in embedding and head.
        rotations = {name for name in self.changed if name.endswith(f".{rotated_norm.ROTATION}")}
        layers = {f"{name}.weight" for name in self.scales}
        tables_changed = any(t.dim() == 2 and name not in layers for name, t in self.changed.items())
        if tables_changed and not rotations:
            rotation.untie(model)

        with torch.no_grad():
            for name, tensor in self.changed.items():
                module_name, _, attribute = name.rpartition(".")
                module = model.get_submodule(module_name)
                if name in rotations:
                    rotated_norm.rotate_output(module, tensor)
                else:
                    getattr(module, attribute).data.copy_(tensor)

    def _require_fitting(self, model: PreTrainedModel) -> None:
        """Check that every tensor has a place in a model, its shape, and values that scales and weights can have.

        Raises:
            RunError: Names the file and a tensor.
        """
        kinds = fake.FakeQuantLinear | fake.FakeQuantEmbedding | BaseTunerLayer
        layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
        for name, scales in self.scales.items():
            layer: Any = layers.get(name)
            base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
            if not isinstance(base, fake.FakeQuantLinear | fake.FakeQuantEmbedding):
                raise self._misfit(f"{name}{SCALES} belongs to no quantized layer of the model")
            shape = base.scales_shape
            if tuple(scales.shape) != shape or not bool((torch.isfinite(scales) & (scales > 0)).all()):
                raise self._misfit(f"{name}{SCALES} {list(scales.shape)} are not positive scales {list(shape)}")

        # Embedding and head may be one table until they are untied.
        parameters = model.named_parameters(remove_duplicate=False)
        shapes = {name.replace(".base_layer", ""): tuple(p.shape) for name, p in parameters}
        for name, tensor in self.changed.items():
            owner, _, attribute = name.rpartition(".")
            width = shapes.get(f"{owner}.{rotated_norm.WEIGHT}", ())
            expected = (*width, *width) if attribute == rotated_norm.ROTATION else shapes.get(name)
            if tuple(tensor.shape) != expected or not bool(torch.isfinite(tensor).all()):
                raise self._misfit(f"{name} {list(tensor.shape)} has no place in the model, or is not finite")

    def _misfit(self, reason: str) -> RunError:
        return RunError(f"{self.path}: not the initialization of this training: {reason}. Restore it, or train again.")


def prepare(
    trained: nn.Module,
    scheme: Scheme,
    method: str,
    calibration: Sequence[Mapping[str, Tensor]],
    rotation_seed: int | None = None,
    on_grid: bool = False,
) -> QatInit:
    """Quantize the merged weights of a training model by `method`, and start QAT from the result.

    The adapters continue as they are: afterwards base + s B A is the weight that the method would round.

    Args:
        trained: A model prepared by `fake.insert`, with or without adapters, its switch off. Its base is changed in
            place and ends as `QatInit.apply` would leave it.
        scheme: Bits and group size by module name.
        method: One of `PTQ_METHODS`.
        calibration: Batches as `methods.apply` takes them.
        rotation_seed: Rotate what the model allows first, adapters included; only for methods that change the base.
        on_grid: Round the weights that the method changed, for a model without a step of QAT: then bfloat16 changes no
            code. Training begins from what the method would round, which it may still move across a border.

    Raises:
        ModelError: Nothing can be rotated.
    """
    model = fake.base_of(trained)
    if method not in CALIBRATED:
        # The method only looks at weights, so not a bit of them may change.
        init = QatInit(methods.apply(fake.MergedWeights(trained), scheme, method, calibration), {})
        init.apply(model)
        return init

    # Norms and biases as they were, to find out later which of them changed.
    vectors = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 1}
    tables_rotated = False
    if rotation_seed is not None:
        tables_rotated = rotation.rotate(trained, scheme, rotation_seed).stream is not None

    # The method sees merged weights; the adapters are subtracted from its result again.
    layers: list[Any] = [model.get_submodule(name) for name in scheme.linears]
    with torch.no_grad(), _folded(layers):
        scales = methods.apply(model, scheme, method, calibration)
        for name, layer in zip(scheme.linears, layers, strict=True) if on_grid else ():
            weight, spec = layer.weight.data, scheme.weights[name]
            weight.copy_(numerics.fake_quantize_weight(weight, spec.codebook, spec.group_size, scales[name]))

    changed = _changed_parameters(model, scheme, scales, vectors, tables_rotated)
    # An adapter is part of a parameter's name; `apply` also has to work before there is one.
    init = QatInit(scales, {name.replace(".base_layer", ""): tensor for name, tensor in changed.items()})
    # Train on the bfloat16 weights that `save` writes, not on the float32 ones.
    init.apply(model)
    return init


def repeat(trained: nn.Module, scheme: Scheme, method: str, saved: QatInit, rotation_seed: int | None) -> None:
    """Bring a model to where `prepare` left it, from the initialization that it returned then.

    Args:
        trained: The model as it was before `prepare`, adapters included.
        scheme: As for `prepare`.
        method: As for `prepare`.
        saved: Result of `prepare`, saved and loaded again.
        rotation_seed: As for `prepare`.
    """
    # Adapters are not part of the saved initialization, so they are rotated again.
    if method in CALIBRATED and rotation_seed is not None:
        rotation.rotate(trained, scheme, rotation_seed)
    saved.apply(fake.base_of(trained))


def _changed_parameters(
    model: PreTrainedModel,
    scheme: Scheme,
    scales: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor],
    tables_rotated: bool,
) -> dict[str, Tensor]:
    """Collect what a method and a rotation changed: norms and biases, weights in bfloat16, and rotations of norms.

    Args:
        model: The base model afterwards.
        scheme: Names the layers.
        scales: What the method returned.
        vectors: Its one-dimensional parameters before.
        tables_rotated: The hidden states were rotated, and the tables with them.
    """
    rotations = rotated_norm.output_rotations(model)
    # Those whose codes a method chose have scales of their own; a rotation changes both.
    tables = [n for n in (scheme.embedding, scheme.head) if n and (tables_rotated or n in scales)]
    if len(tables) == 2 and shares_table(model):
        tables = tables[:1]

    changed = {n: p.detach() for n, p in model.named_parameters() if n in vectors and not torch.equal(p, vectors[n])}
    for name in (*scheme.linears, *tables):
        module: Any = model.get_submodule(name)
        changed[f"{name}.weight"] = module.weight.detach().to(torch.bfloat16)
    for name, matrix in rotations.items():
        changed[f"{name}.{rotated_norm.ROTATION}"] = matrix
    return changed


def recorded_sha256(folder: Path) -> str:
    """Return the sha256 of the tensors in `folder` from its manifest.

    Raises:
        RunError: There is no manifest.
    """
    return str(read_manifest(folder)["files"][FILE]["sha256"])


@contextmanager
def _folded(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Merge every adapter into its base weight while the context is open, so that the adapter itself adds nothing."""
    kept = []
    for layer in layers:
        if isinstance(layer, fake.LoraFakeQuantLinear):
            layer.weight.data.add_(layer.get_delta_weight(fake.ADAPTER).detach())
            # peft's forward then leaves the adapter out, which would add zeros at the cost of two products.
            layer.merged_adapters.append(fake.ADAPTER)
            kept.append(layer)
    yield
    # Updates are computed again instead of kept: they would take as much memory as the base weights.
    for layer in kept:
        layer.merged_adapters.remove(fake.ADAPTER)
        layer.weight.data.sub_(layer.get_delta_weight(fake.ADAPTER).detach())
