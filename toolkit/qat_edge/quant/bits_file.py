"""The file of bits per layer, which `qat-edge sensitivity` or a person writes and `finetune` and `quantize` read.

    bits         module name: 2, 4 or 8
    levels       levels of 2-bit weights
    model        model that was measured; the file is refused for any other

Only `bits` is required. Further keys record the limit by which bits were chosen and the prediction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qat_edge import readers, storage
from qat_edge.errors import UsageError
from qat_edge.field_types import check_types
from qat_edge.options import LAYER_WIDTHS
from qat_edge.quant.bit_allocation import Choice
from qat_edge.quant.codebook import FEWEST, LEVELS
from qat_edge.quant.scheme import describe_widths

FILE_KEYS = ("asked", "prediction", "model", "levels", "bits")
REMEDY = "Choose bits on a run of this model with `qat-edge sensitivity`, or remove 'model' from the file if they fit."


@dataclass(frozen=True)
class MeasuredModel:
    """The model for which bits were chosen.

    Attributes:
        name: Hub id, folder or file.
        weights: Commit on the Hub, or sha256 of the local weight files' own hashes.
        kept_layers: Indices of the decoder layers that pruning kept, counted before it; None for all.
    """

    name: str
    weights: str
    kept_layers: list[int] | None = None

    @classmethod
    def of_training(cls, metadata: Mapping[str, Any]) -> MeasuredModel:
        """Return the model of a training, from the manifest of its adapter."""
        return cls.of_base(metadata["model"]["identity"], metadata["kept_layers"])

    @classmethod
    def of_base(cls, identity: Mapping[str, Any], kept_layers: Sequence[int] | None) -> MeasuredModel:
        """Return the model with an identity (fields of `models.load.ModelIdentity`) and pruned to some layers."""
        # Names do not count: files may have been moved.
        hashes = sorted(identity["files"].values())
        weights = identity["revision"] or hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
        return cls(identity["name"], weights, None if kept_layers is None else list(kept_layers))


class _BitsFile(NamedTuple):
    """Contents of a file of bits: bits by module name, and levels and measured model, if it has them."""

    bits: dict[str, int]
    levels: str | None
    model: MeasuredModel | None


def save_bits(path: Path, choice: Choice, model: MeasuredModel, levels: str | None = None) -> None:
    """Write the file that `load_bits` reads, with the prediction as a record.

    Args:
        path: File to write.
        choice: Chosen bits.
        model: Model that was measured.
        levels: Levels that 2 bits were measured at; written if a weight has 2 bits.
    """
    prediction = {
        "kl_nats": choice.kl_nats,
        "size_bytes": choice.size_bytes,
        "note": "sum of what each layer costs alone; a first-order prediction",
    }
    narrow = levels is not None and FEWEST in choice.bits.values()
    document = {
        "asked": choice.request,
        "prediction": prediction,
        "model": {key: value for key, value in asdict(model).items() if value is not None},
        **({"levels": levels} if narrow else {}),
        "bits": choice.bits,
    }
    # The first key is the same in files of every version.
    head = "# Bits by weight. Use: qat-edge finetune --bits FILE, or quantize --method METHOD --bits FILE.\n"
    storage.write_text(path, head + yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def load_bits(path: Path) -> dict[str, int]:
    """Read bits by module name, from a file of `qat-edge sensitivity` or one written by hand.

    Weights that the file does not name keep their bits.

    Raises:
        UsageError: The file is missing, is no YAML or JSON, has no `bits:` with lines of `module name: 2, 4 or 8`, an
            unknown key, or levels that fit no weight.
    """
    return _read(path).bits


def requested_levels(file: str | None, given: str | None) -> str | None:
    """Return the levels of 2-bit weights: those of the option, or those of the file of bits; None if neither has them.

    Args:
        file: Path of --bits, if given.
        given: Value of --weight-levels, if given.

    Raises:
        UsageError: The file cannot be read, or its bits were chosen at other levels than those given.
    """
    levels = None if file is None else _read(Path(file)).levels
    if given is None or levels is None or given == levels:
        return given or levels
    raise UsageError(
        f"--weight-levels {given} and --bits {file}: the file has 'levels: {levels}', at which its bits were chosen. "
        "Leave --weight-levels out, or choose the bits again with `qat-edge sensitivity`, on a run with these levels."
    )


def require_model(file: str | None, identity: Mapping[str, Any], kept_layers: Sequence[int] | int | None) -> None:
    """Refuse a file of bits that were chosen for another model, or for other layers of it.

    Args:
        file: Path of --bits, if given.
        identity: Of the base model, with the fields of `models.load.ModelIdentity`.
        kept_layers: Indices of the decoder layers that pruning keeps, or their number where they are not chosen yet;
            None for all.

    Raises:
        UsageError: The file cannot be read, or names another model or other layers.
    """
    measured = _read(Path(file)).model if file is not None else None
    if measured is None:
        return
    this = MeasuredModel.of_base(identity, kept_layers if isinstance(kept_layers, Sequence) else None)
    if measured.weights != this.weights:
        raise UsageError(
            f"--bits {file}: its bits were chosen for {measured.name}, and this model is {this.name}, with other "
            f"weights. {REMEDY}"
        )
    before = measured.kept_layers
    same = (
        before is not None and len(before) == kept_layers
        if isinstance(kept_layers, int)
        else before == this.kept_layers
    )
    if not same:
        raise UsageError(
            f"--bits {file}: its bits were chosen for {_describe_layers(before)}, and this model has "
            f"{_describe_layers(kept_layers)}; pruning numbers layers anew. {REMEDY}"
        )


def _describe_layers(kept: Sequence[int] | int | None) -> str:
    """Return which layers a model has, for an error."""
    if kept is None:
        return "all layers"
    return f"{kept} layers" if isinstance(kept, int) else f"layers {readers.shorten(', '.join(map(str, kept)))}"


def _read(path: Path) -> _BitsFile:
    """Read and check a file of bits."""
    if not path.exists():
        raise UsageError(f"--bits {path}: no such file. `qat-edge sensitivity RUN --max-size-mb X` writes one.")
    document = readers.read_yaml(path, UsageError, f"--bits {path}")

    # People write this file by hand: name what was found instead.
    bits = document.get("bits") if isinstance(document, dict) else None
    if not isinstance(bits, dict) or not bits:
        keys = f"the keys {readers.shorten(', '.join(map(str, document)))}" if isinstance(document, dict) else ""
        found = keys or type(document).__name__
        raise UsageError(
            f"--bits {path}: expected 'bits:' with lines such as 'model.layers.0.mlp.up_proj: 8', found "
            f"{found if bits is None else 'no such line under it'}."
        )
    # `True` is an int too; `type` refuses it.
    for name, width in bits.items():
        if not isinstance(name, str) or type(width) is not int or width not in LAYER_WIDTHS:
            found = f"'bits.{readers.shorten(name)}' is {readers.show(width)}"
            raise UsageError(f"--bits {path}: {found}; a weight can have {describe_widths()} bits.")
    levels = _read_levels(document, path)
    return _BitsFile(bits, levels, _read_model(document, path))


def _read_levels(document: dict[Any, Any], path: Path) -> str | None:
    """Return the entry `levels` of a file of bits, if it has one, after a check of all its keys."""
    unknown = next((key for key in document if key not in FILE_KEYS), None)
    if unknown is not None:
        raise UsageError(f"--bits {path}: unknown key '{readers.shorten(unknown)}'. Known: {', '.join(FILE_KEYS)}.")
    if "levels" not in document:
        return None

    levels = document["levels"]
    if levels not in LEVELS:
        raise UsageError(f"--bits {path}: 'levels' is {readers.show(levels)}, expected {' or '.join(LEVELS)}.")
    if FEWEST not in document["bits"].values():
        raise UsageError(
            f"--bits {path}: 'levels' is {levels}, but only 2-bit weights have a choice of levels, and no line under "
            "'bits' has 2. Remove it."
        )
    return str(levels)


def _read_model(document: dict[Any, Any], path: Path) -> MeasuredModel | None:
    """Return the entry `model` of a file of bits, if it has one."""
    if "model" not in document:
        return None
    try:
        found = MeasuredModel(**document["model"])
        check_types(found, MeasuredModel, "model", lambda value, name, where: None)
    except TypeError as error:
        raise UsageError(
            f"--bits {path}: 'model' is {readers.show(document['model'])}, expected name, weights and kept_layers as "
            "`qat-edge sensitivity` writes them. Remove it if the bits fit this model."
        ) from error
    return found
