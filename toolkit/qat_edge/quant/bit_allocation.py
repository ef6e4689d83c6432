"""Bits by layer: what they weigh, how they are picked from a measurement, and the file that keeps the choice.

    size  = 1/2 byte a weight and a bfloat16 scale a group of int4, 1 byte a weight and a float32 scale a row of int8,
            4 bytes a float parameter; embedding and head are two tables, as in a .pte whose hidden states are turned
    KL    = sum over the weights of what each costs alone

The sum is a first-order prediction: it leaves out what two roundings do to each other, as HAWQ-V2
(https://arxiv.org/abs/1911.03852) and ZeroQ (https://arxiv.org/abs/2001.00281) do. Measure the chosen scheme.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qat_edge import run
from qat_edge.errors import RunError, UsageError

MEASURED = "sensitivity.json"
MEGABYTE = 1e6  # bytes
WIDTHS = (4, 8)  # what a file may ask for; quant.scheme decides which weight can have which


@dataclass(frozen=True)
class Cost:
    """One weight at one width, everything else unquantized. kl_nats: mean by token; size_bytes: codes and scales."""

    kl_nats: float
    size_bytes: int


@dataclass(frozen=True)
class LayerCost:
    """One weight (rows, width). layer: number of its decoder layer, None for embedding and head. costs: by bits."""

    layer: int | None
    kind: str
    shape: tuple[int, int]
    costs: dict[int, Cost]


@dataclass(frozen=True)
class Sensitivity:
    """What was measured. tokens: fed to the model; compared: those of them at which training puts loss.

    together: KL with every weight at 4 or at 8 bits at once, which the sum of single costs only predicts.
    float_bytes: parameters that no scheme rounds.
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

    @property
    def costs(self) -> dict[str, dict[int, Cost]]:
        """Module name -> bits -> cost: what bits are picked from."""
        return {name: weight.costs for name, weight in self.weights.items()}

    def uniform(self, bits: int) -> dict[str, int]:
        """Every weight at `bits` where it can, at its widest elsewhere."""
        return {name: bits if bits in costs else max(costs) for name, costs in self.costs.items()}

    def predicted(self, bits: int) -> float:
        """Sum of the single costs at one width, nats per token: what `together` is to be compared with."""
        return _kl(self.costs, self.uniform(bits))

    def size_bytes(self, bits: int) -> int:
        """All weights at one width, with the parameters that stay float."""
        return _size(self.costs, self.uniform(bits)) + self.float_bytes

    def by_cost(self) -> list[tuple[str, LayerCost]]:
        """Names and weights, the greatest KL at the fewest bits first."""
        return sorted(self.weights.items(), key=lambda item: -item[1].costs[min(item[1].costs)].kl_nats)


@dataclass(frozen=True)
class Choice:
    """Bits by module name and what is predicted of them. size_bytes: all weights; kl_nats: the sum, by token."""

    bits: dict[str, int]
    size_bytes: int
    kl_nats: float
    asked: str


def read_measured(folder: Path) -> Sensitivity:
    """What `sensitivity` wrote into a folder.

    Raises:
        RunError: missing or damaged.
    """
    path = folder / MEASURED
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts["weights"] = {name: _read_layer(weight) for name, weight in facts["weights"].items()}
        facts["together"] = {int(bits): kl for bits, kl in facts["together"].items()}
        return Sensitivity(**facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: missing or damaged ({error}). Give --force to measure again.") from error


def weight_bytes(rows: int, width: int, bits: int, group_size: int) -> int:
    """Codes and scales of one matrix (rows, width): bfloat16 scales for groups, a float32 one for a whole row."""
    scales = 4 * rows if bits == 8 else 2 * rows * (width // group_size)
    return rows * width * bits // 8 + scales


def within_budget(costs: Mapping[str, Mapping[int, Cost]], float_bytes: int, max_size_mb: float) -> Choice:
    """The bits that save most KL a byte while all weights together stay within `max_size_mb` (10^6 bytes).

    costs: module name -> bits -> cost. float_bytes: of parameters that stay float.

    Raises:
        UsageError: less than the least possible size.
    """
    budget = max_size_mb * MEGABYTE
    picked = _narrowest(costs)
    size = _size(costs, picked) + float_bytes
    if size > budget:
        raise UsageError(
            f"--max-size-mb {max_size_mb:g}: at their fewest bits the weights are {_round_up(size / MEGABYTE)} MB, the "
            "least possible. Give that much or more, or fine-tune with a larger --group-size."
        )
    for name, wider, extra in _by_worth(costs, picked):
        if size + extra <= budget:
            picked[name] = wider
            size += extra
    return _choice(costs, picked, float_bytes, f"--max-size-mb {max_size_mb:g}")


def within_kl(costs: Mapping[str, Mapping[int, Cost]], float_bytes: int, max_kl: float) -> Choice:
    """The fewest raised layers, most KL saved a byte first, that bring the predicted KL to `max_kl` or below.

    Raises:
        UsageError: less than the least possible KL.
    """
    picked = _narrowest(costs)
    for name, wider, _ in _by_worth(costs, picked):
        if _kl(costs, picked) <= max_kl:
            break
        picked[name] = wider
    least = _kl(costs, picked)
    if least > max_kl:
        raise UsageError(
            f"--max-kl {max_kl:g}: {_round_up(least)} nats per token are predicted of all layers at 8 bits, the least "
            "possible. Give that much or more."
        )
    return _choice(costs, picked, float_bytes, f"--max-kl {max_kl:g}")


def frontier(costs: Mapping[str, Mapping[int, Cost]], float_bytes: int) -> list[tuple[int, float]]:
    """Size in bytes and predicted KL as layers are raised one after the other, most KL saved a byte first."""
    picked = _narrowest(costs)
    size, kl = _size(costs, picked) + float_bytes, _kl(costs, picked)
    points = [(size, kl)]
    for name, wider, extra in _by_worth(costs, picked):
        size += extra
        kl += costs[name][wider].kl_nats - costs[name][picked[name]].kl_nats
        points.append((size, kl))
    return points


def save_bits(path: Path, choice: Choice) -> None:
    """Write what `load_bits` reads, with the prediction beside it."""
    prediction = {
        "kl_nats": choice.kl_nats,
        "size_bytes": choice.size_bytes,
        "note": "sum of what each layer costs alone; a first-order prediction",
    }
    document = {"asked": choice.asked, "prediction": prediction, "bits": choice.bits}
    head = "# Bits by weight. Use: qat-edge finetune --bits FILE, or quantize --method METHOD --bits FILE.\n"
    run.write_text(path, head + yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def load_bits(path: Path) -> dict[str, int]:
    """Module name -> 4 or 8, from a file that `sensitivity` wrote or a person did; weights not named keep theirs.

    Raises:
        UsageError: no such file, no YAML or JSON, or not `bits:` with lines of `module name: 4 or 8`.
    """
    try:
        document: Any = yaml.load(path.read_text(encoding="utf-8"), _OnceEach)
    except FileNotFoundError as error:
        raise UsageError(
            f"--bits {path}: no such file. `qat-edge sensitivity RUN --max-size-mb X` writes one."
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--bits {path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    bits = document.get("bits") if isinstance(document, dict) else None
    if not isinstance(bits, dict) or not bits:
        found = f"the keys {', '.join(map(str, document))}" if isinstance(document, dict) else type(document).__name__
        raise UsageError(
            f"--bits {path}: expected 'bits:' with lines such as 'model.layers.0.mlp.up_proj: 8', found "
            f"{found if bits is None else 'no such line under it'}."
        )
    for name, width in bits.items():
        if not isinstance(name, str) or type(width) is not int or width not in WIDTHS:
            raise UsageError(f"--bits {path}: 'bits.{name}' is {width!r}; a weight can have 4 or 8 bits.")
    return bits


class _OnceEach(yaml.SafeLoader):
    """YAML in which no key may stand twice: the later line would win unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"'{key}' stands there twice, line {node.start_mark.line + 1} and below")
        return super().construct_mapping(node, deep)


def _read_layer(facts: dict[str, Any]) -> LayerCost:
    costs = {int(bits): Cost(**cost) for bits, cost in facts["costs"].items()}
    return LayerCost(facts["layer"], facts["kind"], (facts["shape"][0], facts["shape"][1]), costs)


def _round_up(value: float) -> str:
    """Four significant digits, never fewer than `value`: what is named as the least must be accepted."""
    if value <= 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / step) * step:.4g}"


def _narrowest(costs: Mapping[str, Mapping[int, Cost]]) -> dict[str, int]:
    return {name: min(by_bits) for name, by_bits in costs.items()}


def _by_worth(costs: Mapping[str, Mapping[int, Cost]], narrow: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Module, its wider width and the bytes that adds, by KL saved a byte; none that would save nothing."""
    found = []
    for name, by_bits in costs.items():
        wider = max(by_bits)
        extra = by_bits[wider].size_bytes - by_bits[narrow[name]].size_bytes
        saved = by_bits[narrow[name]].kl_nats - by_bits[wider].kl_nats
        if saved > 0 and extra > 0:
            found.append((saved / extra, name, wider, extra))
    found.sort(key=lambda item: -item[0])
    return [(name, wider, extra) for _, name, wider, extra in found]


def _size(costs: Mapping[str, Mapping[int, Cost]], picked: Mapping[str, int]) -> int:
    return sum(by_bits[picked[name]].size_bytes for name, by_bits in costs.items())


def _kl(costs: Mapping[str, Mapping[int, Cost]], picked: Mapping[str, int]) -> float:
    return sum(by_bits[picked[name]].kl_nats for name, by_bits in costs.items())


def _choice(costs: Mapping[str, Mapping[int, Cost]], picked: dict[str, int], float_bytes: int, asked: str) -> Choice:
    return Choice(picked, _size(costs, picked) + float_bytes, _kl(costs, picked), asked)
