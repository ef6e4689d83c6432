"""Outline of a frozen checkpoint that does not exist yet, from which targets predict the sizes of their files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qat_edge.models import tokenizer

FLOAT_BYTES = 4  # of norms, biases, tables in float, scales per channel


@dataclass(frozen=True)
class WeightOutline:
    """Shape and codes of one quantized matrix.

    Attributes:
        rows: Output features, or tokens of a table.
        width: Input features.
        bits: Of a code.
        group_size: Weights per scale.
    """

    rows: int
    width: int
    bits: int
    group_size: int

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes without padding."""
        return self.rows * self.width * self.bits // 8

    @property
    def groups(self) -> int:
        """Scales of all rows together."""
        return self.rows * (self.width // self.group_size)


@dataclass(frozen=True)
class FrozenOutline:
    """A frozen checkpoint without its tensors.

    Attributes:
        folder: Configurations, tokenizer and manifest, as in the checkpoint.
        weights: Quantized matrices by module name.
        floats: Elements of the other tensors by name, without rotations.
        embedding: Module name of the token embedding.
        head: Module name of the output head.
        tied: Embedding and head have the same codes.
        rotated_norms: Modules whose output is multiplied by a matrix (width, width).
        cache_values: Keys and values of one token in all layers.
        head_width: Channels of one attention head.
        layers: Number of decoder layers.
    """

    folder: Path
    weights: Mapping[str, WeightOutline]
    floats: Mapping[str, int]
    embedding: str
    head: str
    tied: bool
    rotated_norms: tuple[str, ...]
    cache_values: int
    head_width: int
    layers: int

    @property
    def linears(self) -> dict[str, WeightOutline]:
        """Matrices between the ends."""
        return {name: weight for name, weight in self.weights.items() if name not in (self.embedding, self.head)}

    @property
    def rotation_elements(self) -> int:
        """Elements of all rotations of norms."""
        return len(self.rotated_norms) * self.weights[self.embedding].width ** 2

    def tokenizer_files(self) -> dict[str, int]:
        """Return the sizes of the tokenizer's files, which every artifact has, in bytes by name."""
        return self.file_sizes(*tokenizer.tokenizer_files(self.folder))

    def file_sizes(self, *names: str) -> dict[str, int]:
        """Return the sizes of those of the named files that there are, in bytes by name."""
        paths = [(name, self.folder / name) for name in names]
        return {name: path.stat().st_size for name, path in paths if path.is_file()}

    def count_floats(self) -> FloatCounts:
        """Count the float tensors by what they are."""
        names = [(name, elements) for name, elements in self.floats.items()]
        biases = sum(name.endswith(".bias") for name, _ in names)
        heads = sum(elements == self.head_width and not name.endswith(".bias") for name, elements in names)
        return FloatCounts(biases, heads, len(names) - biases - heads)


@dataclass(frozen=True)
class FloatCounts:
    """Numbers of float tensors.

    Attributes:
        biases: Of linear layers.
        head_norms: Norms of single attention heads.
        norms: Norms of the hidden states.
    """

    biases: int
    head_norms: int
    norms: int


@dataclass(frozen=True)
class PlannedFiles:
    """Predicted artifact.

    Attributes:
        files: Sizes in bytes by name, without the manifest.
        read_bytes: Weights that computing one token reads: all but an embedding with a table of its own.
        cache_bytes: Keys and values of one token in all layers, as the target's runtime stores them by default.
    """

    files: dict[str, int]
    read_bytes: int
    cache_bytes: int

    @property
    def size_bytes(self) -> int:
        """Sum of all files."""
        return sum(self.files.values())


def aligned(size: int, alignment: int) -> int:
    """Return a size with the padding up to the next multiple."""
    return -(-size // alignment) * alignment


def json_bytes(document: object, indent: int) -> int:
    """Return the size of a JSON file with a newline at its end."""
    return len((json.dumps(document, indent=indent) + "\n").encode())


def float_sizes(outline: FrozenOutline) -> Iterator[int]:
    """Yield the bytes of each float tensor, rotations among them."""
    yield from (elements * FLOAT_BYTES for elements in outline.floats.values())
    width = outline.weights[outline.embedding].width
    yield from (width * width * FLOAT_BYTES for _ in outline.rotated_norms)
