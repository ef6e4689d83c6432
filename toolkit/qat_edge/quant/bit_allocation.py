"""Choice of bits per layer: sizes of weights, and selection by measured sensitivity.

    size  = 1/2 byte per weight and a bfloat16 scale per group of int4, 1 byte per weight and a float32 scale per row of
            int8, 4 bytes per float parameter; a table that embedding and head share counts once, as exporters store it.
            With int2 (1/4 byte), which ONNX alone can store, the scales of all groups are float32, as there
    KL    = sum over the weights of the KL divergence that each causes alone

The sum is a first-order prediction: it leaves out how two roundings interact, as HAWQ-V2
(https://arxiv.org/abs/1911.03852) and ZeroQ (https://arxiv.org/abs/2001.00281) do. Measure the chosen scheme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from qat_edge.errors import UsageError

MEASURED = "sensitivity.json"
MEGABYTE = 1e6  # bytes


@dataclass(frozen=True)
class Cost:
    """Cost of one weight at one width, everything else unquantized.

    Attributes:
        kl_nats: KL divergence from the float model, mean per token.
        size_bytes: Codes and scales.
    """

    kl_nats: float
    size_bytes: int


CostTable = Mapping[str, Mapping[int, Cost]]  # module name -> bits -> cost


@dataclass(frozen=True)
class LayerCost:
    """Costs of one weight at every width that it can have.

    Attributes:
        layer: Number of its decoder layer; None for embedding and head.
        kind: Last part of its name, such as "q_proj".
        shape: Rows and width.
        costs: By bits.
    """

    layer: int | None
    kind: str
    shape: tuple[int, int]
    costs: dict[int, Cost]


@dataclass(frozen=True)
class Sensitivity:
    """A measurement of all weights of a model.

    Attributes:
        model: Name of the model.
        tokens: Number of tokens fed to the model.
        compared: Those of them that training puts loss on; KL is their mean.
        rows: Number of texts.
        seed: Of the choice of texts.
        group_size: Of int4 and int2 weights.
        tied: Embedding and head share a table.
        float_bytes: Size of the parameters that no scheme quantizes.
        wall_s: Duration of the measurement.
        together: Bits -> KL with every weight at those bits at once; the sum of single costs only predicts it.
        weights: By module name.
        levels: Levels of weights at 2 bits; None where none was measured at them, and in files of earlier versions.
    """

    model: str
    tokens: int
    compared: int
    rows: int
    seed: int
    group_size: int
    tied: bool
    float_bytes: int
    wall_s: float
    together: dict[int, float]
    weights: dict[str, LayerCost]
    levels: str | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits that at least one weight was measured at, ascending."""
        return tuple(sorted(self.together))

    @property
    def costs(self) -> dict[str, dict[int, Cost]]:
        """Module name -> bits -> cost, from which bits are chosen.

        A head that shares the embedding's table adds no bytes: a .pte for XNNPACK and an ONNX folder store the table
        once, after a rotation of the hidden states too. (The rotated norm then adds 4 width^2 bytes, not counted here.)
        """
        shared = self._shared_head
        return {
            name: {bits: replace(cost, size_bytes=0) for bits, cost in weight.costs.items()}
            if name == shared
            else weight.costs
            for name, weight in self.weights.items()
        }

    @property
    def _shared_head(self) -> str | None:
        """Name of the head whose table is the embedding's, if there is one."""
        # Weights are in the model's order: the head is the last one outside the decoder layers, and the embedding is
        # another of the same shape.
        outside = [name for name, weight in self.weights.items() if weight.layer is None]
        if not self.tied or len(outside) < 2:
            return None
        *others, head = outside
        same_shape = any(self.weights[name].shape == self.weights[head].shape for name in others)
        return head if same_shape else None

    def uniform(self, bits: int) -> dict[str, int]:
        """Return `bits` for every weight that can have them, and the widest for the others."""
        return {name: bits if bits in costs else max(costs) for name, costs in self.costs.items()}

    def predicted(self, bits: int) -> float:
        """Return the sum of the single costs at one width, in nats per token, to compare with `together`."""
        return _kl(self.costs, self.uniform(bits))

    def size_bytes(self, bits: int) -> int:
        """Return the size of all weights at one width and of the parameters that stay float."""
        return _size(self.costs, self.uniform(bits)) + self.float_bytes

    def by_cost(self) -> list[tuple[str, LayerCost]]:
        """Return names and weights, the greatest KL at the fewest bits first."""
        return sorted(self.weights.items(), key=lambda item: -item[1].costs[min(item[1].costs)].kl_nats)


@dataclass(frozen=True)
class Choice:
    """Chosen bits and what is predicted of them.

    Attributes:
        bits: By module name.
        size_bytes: Size of all weights.
        kl_nats: Sum of the single costs, per token.
        request: The flag that it was chosen by, such as "--max-kl 0.1".
    """

    bits: dict[str, int]
    size_bytes: int
    kl_nats: float
    request: str


class _Upgrade(NamedTuple):
    """A wider width for one weight."""

    name: str
    bits: int


def weight_bytes(rows: int, width: int, bits: int, group_size: int, scale_bytes: int = 2) -> int:
    """Return the size of codes and scales of one matrix (rows, width), in bytes.

    Groups have scales of `scale_bytes`: 2 in a .pte, 4 in an ONNX folder. Rows of int8 have float32 scales.
    """
    # Per row a float32 scale (int8), or one per group.
    scales = 4 * rows if bits == 8 else scale_bytes * rows * (width // group_size)
    return rows * width * bits // 8 + scales


def within_budget(costs: CostTable, float_bytes: int, max_size_mb: float) -> Choice:
    """Choose the bits that save most KL per byte while all weights together stay within a size.

    Args:
        costs: Module name -> bits -> cost.
        float_bytes: Size of the parameters that stay float.
        max_size_mb: Greatest size, in 10^6 bytes.

    Raises:
        UsageError: The size is less than the least possible one.
    """
    # Begin with the fewest bits everywhere: if that is too large, nothing fits.
    budget = max_size_mb * MEGABYTE
    chosen = _narrowest(costs)
    size = _size(costs, chosen) + float_bytes
    if size > budget:
        raise UsageError(
            f"--max-size-mb {max_size_mb:g}: at their fewest bits the weights are {_round_up(size / MEGABYTE)} MB, the "
            "least possible. Give that much or more, or fine-tune with a larger --group-size."
        )

    # Greedy by KL saved per byte: an upgrade that does not fit is skipped, a smaller one after it may fit.
    for name, bits in _upgrades(costs):
        extra = costs[name][bits].size_bytes - costs[name][chosen[name]].size_bytes
        if size + extra <= budget:
            chosen[name] = bits
            size += extra
    return _choice(costs, chosen, float_bytes, f"--max-size-mb {max_size_mb:g}")


def within_kl(costs: CostTable, float_bytes: int, max_kl: float) -> Choice:
    """Choose as few upgrades as bring the predicted KL to a limit, those first that save most KL per byte.

    Args:
        costs: Module name -> bits -> cost.
        float_bytes: Size of the parameters that stay float.
        max_kl: Greatest predicted KL, in nats per token.

    Raises:
        UsageError: The limit is less than the least possible KL.
    """
    chosen = _narrowest(costs)
    for name, bits in _upgrades(costs):
        if _kl(costs, chosen) <= max_kl:
            break
        chosen[name] = bits

    # Every upgrade that helps may have been made, and still not be enough.
    least = _kl(costs, chosen)
    if least > max_kl:
        raise UsageError(
            f"--max-kl {max_kl:g}: {_round_up(least)} nats per token are predicted of all layers at 8 bits, the least "
            "possible. Give that much or more."
        )
    return _choice(costs, chosen, float_bytes, f"--max-kl {max_kl:g}")


def frontier(costs: CostTable, float_bytes: int) -> list[tuple[int, float]]:
    """Return size in bytes and predicted KL after each upgrade, those first that save most KL per byte."""
    chosen = _narrowest(costs)
    size, kl = _size(costs, chosen) + float_bytes, _kl(costs, chosen)
    points = [(size, kl)]
    for name, bits in _upgrades(costs):
        before, after = costs[name][chosen[name]], costs[name][bits]
        size += after.size_bytes - before.size_bytes
        kl += after.kl_nats - before.kl_nats
        chosen[name] = bits
        points.append((size, kl))
    return points


def _round_up(value: float) -> str:
    """Format four significant digits, rounded up: a value named as the least possible must be accepted."""
    if value <= 0:
        return "0"
    # One unit of the fourth digit.
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / step) * step:.4g}"


def _narrowest(costs: CostTable) -> dict[str, int]:
    return {name: min(by_bits) for name, by_bits in costs.items()}


def _upgrades(costs: CostTable) -> list[_Upgrade]:
    """Return upgrades from the narrowest widths, most KL saved per byte first; none that would save nothing.

    Those of one weight are in the order of its widths: each saves less per byte than the one before.
    """
    found = []
    for name, by_bits in costs.items():
        bits = min(by_bits)
        while (steeper := _steepest_upgrade(by_bits, bits)) is not None:
            saved_per_byte, bits = steeper
            found.append((saved_per_byte, _Upgrade(name, bits)))
    found.sort(key=lambda item: -item[0])
    return [upgrade for _, upgrade in found]


def _steepest_upgrade(by_bits: Mapping[int, Cost], bits: int) -> tuple[float, int] | None:
    """Return the width beyond `bits` that saves most KL per byte, with that saving; None where none saves any.

    The next upgrade from there saves less per byte, or it would have been the steepest itself.
    """
    candidates = []
    for wider in sorted(width for width in by_bits if width > bits):
        extra = by_bits[wider].size_bytes - by_bits[bits].size_bytes
        saved = by_bits[bits].kl_nats - by_bits[wider].kl_nats
        # Rounding noise can make 8 bits look worse than 4 on a few tokens: such an upgrade is never made.
        if saved > 0 and extra > 0:
            candidates.append((saved / extra, wider))
    return max(candidates, default=None)


def _size(costs: CostTable, chosen: Mapping[str, int]) -> int:
    return sum(by_bits[chosen[name]].size_bytes for name, by_bits in costs.items())


def _kl(costs: CostTable, chosen: Mapping[str, int]) -> float:
    return sum(by_bits[chosen[name]].kl_nats for name, by_bits in costs.items())


def _choice(costs: CostTable, chosen: dict[str, int], float_bytes: int, request: str) -> Choice:
    return Choice(chosen, _size(costs, chosen) + float_bytes, _kl(costs, chosen), request)
