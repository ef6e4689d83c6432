"""Check options of finetune against the model, before any row is tokenized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

from qat_edge.errors import ModelError, UsageError
from qat_edge.models import packing_check
from qat_edge.options import FinetuneOptions
from qat_edge.quant import rotation
from qat_edge.quant.ptq.method_names import COMPENSATED
from qat_edge.quant.scheme import Scheme
from qat_edge.train import prune

ALL_LINEAR = "all-linear"  # peft's name for all linear layers but the head
NOTHING_TO_TRAIN = (
    "--codes fixed: no layer with an adapter has weights in groups, so nothing would be left to train in QAT. "
    "Give bits below 8 to a layer that has an adapter, or leave it out."
)


def check(model: PreTrainedModel, options: FinetuneOptions, choose: Callable[[], Scheme]) -> None:
    """Refuse options that the model rules out.

    Args:
        model: The base model, as loaded. Layers that --keep-layers removes later are still there.
        options: Of finetune.
        choose: Returns the scheme of the model; raises for bits that it cannot have.

    Raises:
        UsageError: Names the option.
    """
    _require_vocabulary(options, model)
    if options.keep_layers is not None:
        prune.require_layers(model, options.keep_layers)
    if options.packing:
        packing_check.require_packing(model)
    if options.method == "lora":
        check_targets(model, options.target_modules)
        _require_linears(model, options.target_modules)

    weights, targets = choose(), options.target_modules
    names = weights.linears if list(targets) == [ALL_LINEAR] else [n for n in weights.weights if is_named(n, targets)]
    if options.has_fixed_codes and not any(weights.weights[name].has_groups for name in names):
        raise UsageError(NOTHING_TO_TRAIN)


def require_rotatable(model: PreTrainedModel, weights: Scheme) -> None:
    """Refuse --rotate on for a model that allows no rotation.

    Raises:
        UsageError: It allows none.
    """
    try:
        rotation.find_rotatable(model, weights)
    except ModelError as error:
        raise UsageError(f"--rotate on: {error} Use --rotate auto.") from error


def requests_rotation(options: FinetuneOptions) -> bool:
    """Return whether the PTQ initialization is to rotate what the model allows.

    It rotates the weights under the adapters; `auto` for methods that compensate rounding alone.
    """
    useful = options.method == "lora" and options.ptq_init in COMPENSATED
    return options.rotate == "on" or (options.rotate == "auto" and useful)


def is_named(name: str, targets: Sequence[str]) -> bool:
    """Return whether one of the target modules names a module, as peft decides it."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _require_vocabulary(options: FinetuneOptions, model: PreTrainedModel) -> None:
    """Refuse to keep more tokens of the teacher's prediction than the model has.

    Raises:
        UsageError: --distill-top-k is beyond the vocabulary.
    """
    tokens = model.get_input_embeddings().weight.shape[0]
    if options.distill_top_k > tokens:
        raise UsageError(
            f"--distill-top-k {options.distill_top_k}: this model has {tokens} tokens. Give at most {tokens}, or 0 to "
            "run the teacher at every step."
        )


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Refuse target modules that no module is named like: peft accepts them if another one of the list exists."""
    if list(targets) == [ALL_LINEAR]:
        return
    names = [name for name, _ in model.named_modules()]
    unknown = [target for target in targets if not any(is_named(name, [target]) for name in names)]
    if not unknown:
        return

    linears = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    hint = f" '{ALL_LINEAR}' stands alone." if ALL_LINEAR in unknown else ""
    joined = next((target for target in unknown if "," in target), None)
    if joined is not None:
        flags = " ".join(f"--target-modules {name.strip()}" for name in joined.split(",") if name.strip())
        hint += f" '{joined}' is read as one name: a comma does not separate names. Repeat the flag: {flags}."
    raise UsageError(
        f"--target-modules: Target modules that are not in this model: {', '.join(unknown)}. Its linear layers are "
        f"named {', '.join(linears)}.{hint}"
    )


def _require_linears(model: nn.Module, targets: Sequence[str]) -> None:
    """Refuse target modules with weights that are no linear layers: their adapters could not be merged.

    Raises:
        UsageError: Names the first one.
    """
    for name, module in _leaves(model):
        if is_named(name, targets) and not isinstance(module, nn.Linear):
            raise UsageError(
                f"--target-modules: {name.rpartition('.')[2]} is a {type(module).__name__}; only "
                "adapters of linear layers are merged before they are rounded. Leave it out."
            )


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules without further ones inside, with their names."""
    return ((name, module) for name, module in model.named_modules() if not list(module.children()))
