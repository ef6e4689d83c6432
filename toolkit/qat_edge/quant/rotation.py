"""Rotate the hidden states of a decoder: the same function, in a basis that loses less when it is rounded.

A few channels of the hidden states are many times larger than the others, and an int8 input has one scale for all of
them. Between the norms a decoder only adds to its hidden states x, so that an orthogonal Q can be inserted (QuaRot [1],
SpinQuant [2]). With x Q in place of x,

    embedding     E Q                                 layer that writes to x      Q^T W, b Q
    norm          weight g -> h, since x / rms(x)     layer that reads a norm     W diag(g) Q diag(1/h)
                  rotates with x

Q is a random Hadamard matrix, which spreads each channel over all others. h is 1, so that exporters may leave it out,
except in the first norm, where each channel has its own h close to 1: otherwise the first layers would be given the
embedding's integers times one number, and many of those are ties of their int8 form, where runtimes round differently.
The weighted sums of values inside attention are rotated as well, head by head (SpinQuant's R2): H^T W_v, W_o H. This is
possible, and done alone, where a norm after a layer keeps Q out of the weights, as in Gemma.

Nothing is added that has to run, with one exception: where embedding and head share a table, g applies to the head
alone, so the last norm's output is rotated once more for it (`rotated_norm`). A head with adapters gets a table of its
own.

[1] https://arxiv.org/abs/2404.00456
[2] https://arxiv.org/abs/2405.16406
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qat_edge.errors import ModelError
from qat_edge.quant import fake, rotated_norm
from qat_edge.quant.autocast import trial_pass
from qat_edge.quant.scheme import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE = 8  # tokens of the trial passes
SPREAD = 1 / 16  # of h around 1, in the first norm
SAME = 1e-3  # of the logits' standard deviation; float32 leaves 1e-5, a wrong structure 0.1 and more
SAME_HEADS = 1e-2  # of the change by half a rotation; float32 leaves 1e-4 where attention adds little
ROWS = 8192  # multiplied at once, in float64


@dataclass(frozen=True)
class Norm:
    """A norm of the hidden states.

    Attributes:
        module: The norm.
        neutral: The weight with which it only divides by the root mean square: 1, or 0 where it stores weight - 1.
        readers: Names of the linear layers that its output goes to.
    """

    module: Any
    neutral: float
    readers: list[str]


@dataclass(frozen=True)
class Heads:
    """Layers before and after attention, by the name of the attention module.

    Attributes:
        width: Channels of one head.
        values: Layers that make the values.
        outputs: Layers that read the weighted sums of values.
    """

    width: int
    values: dict[str, str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class Stream:
    """Modules that make, read and add to the hidden states (the residual stream).

    Attributes:
        width: Channels of the hidden states.
        embedding: The token embedding.
        norms: In the order of execution.
        writers: Names of the linear layers whose output is added.
    """

    width: int
    embedding: Any
    norms: list[Norm]
    writers: list[str]


@dataclass(frozen=True)
class Rotatable:
    """Parts of a model that can be rotated.

    Attributes:
        stream: Its hidden states; None where they cannot be.
        heads: Values of attention; None where no layer makes them alone.
        obstacle: Why the hidden states cannot be rotated; empty where they can.
    """

    stream: Stream | None
    heads: Heads | None
    obstacle: str

    def describe(self) -> str:
        """Return a line for people."""
        if self.obstacle:
            return f"Rotation is on for the values of attention alone. {self.obstacle}"
        return "Rotation is on: the hidden states are rotated"


def find_rotatable(model: PreTrainedModel, scheme: Scheme) -> Rotatable:
    """Find what can be rotated in a model. Runs it on a few tokens and leaves it unchanged.

    Raises:
        ModelError: Nothing can be; the message says why.
    """
    try:
        stream, obstacle = find_stream(model, scheme), ""
    except ModelError as error:
        stream, obstacle = None, str(error)
    heads = find_heads(model, scheme)
    if stream is None and heads is None:
        raise ModelError(obstacle)
    return Rotatable(stream, heads, obstacle)


def rotate(trained: nn.Module, scheme: Scheme, seed: int) -> Rotatable:
    """Rotate a float32 model by random Hadamard matrices: weights, norms and adapters, in place.

    The hidden states are rotated where the model allows it, and the heads of attention where a layer makes their values
    alone. A table that embedding and head share stays one where `scheme` has it so and the head has no adapter;
    otherwise a rotation of the hidden states makes it two.

    Args:
        trained: The model, with or without adapters around its layers.
        scheme: Names the layers.
        seed: Of the random matrices.

    Returns:
        What was rotated.

    Raises:
        ModelError: Neither is possible.
    """
    model = fake.base_of(trained)
    found = find_rotatable(model, scheme)
    with torch.no_grad():
        if found.stream is not None:
            _rotate_stream(model, scheme, found.stream, seed)
        if found.heads is not None:
            device = model.get_input_embeddings().weight.device
            _rotate_heads(model, found.heads, random_hadamard(found.heads.width, seed).to(device))
    return found


def _rotate_stream(model: PreTrainedModel, scheme: Scheme, stream: Stream, seed: int) -> None:
    """Rotate the hidden states: tables, norms, and the layers that read and write."""
    rotation = random_hadamard(stream.width, seed).to(stream.embedding.weight.device)

    # The weights h of the first norm; those of all others are 1.
    draws = torch.rand(stream.width, generator=torch.Generator().manual_seed(seed))
    first_gains = (1 + SPREAD * (2 * draws - 1)).to(rotation)

    # A shared table can stay shared only if the last norm's output is rotated for the head.
    last = _norm_of_shared_table(model, scheme, stream)
    if last is None:
        untie(model)
    _multiply_right(stream.embedding.weight, rotation)
    for norm in stream.norms:
        gains = first_gains if norm is stream.norms[0] else torch.ones_like(first_gains)
        _rotate_norm(model, norm, rotation, gains, keep_readers=norm is last)
    for name in stream.writers:
        for matrix in _output_side(model.get_submodule(name)):
            matrix.copy_(rotation.T @ matrix.double())


def _rotate_norm(model: PreTrainedModel, norm: Norm, rotation: Tensor, gains: Tensor, keep_readers: bool) -> None:
    """Replace a norm's weight g by `gains` (width,), and put diag(g) Q diag(1/h) into what reads it.

    keep_readers: rotate the norm's output instead of the layers, since their table belongs to the embedding as well.
    """
    # diag(g) Q diag(1/h), in float64 so that the model's function changes by float32 rounding only.
    folded = (norm.module.weight.double() + (1 - norm.neutral))[:, None] * rotation / gains
    if keep_readers:
        rotated_norm.rotate_output(norm.module, rotation.T @ folded)
    else:
        for name in norm.readers:
            for matrix in _input_side(model.get_submodule(name)):
                _multiply_right(matrix, folded)
    norm.module.weight.copy_(gains - (1 - norm.neutral))


def _rotate_heads(model: PreTrainedModel, heads: Heads, rotation: Tensor) -> None:
    """Rotate the values of every head, and rotate them back where they are read."""
    for name in heads.values.values():
        for matrix in _output_side(model.get_submodule(name)):
            # Rows of W_v are channels of the values, head after head.
            by_head = matrix.view(-1, heads.width, matrix.shape[1])
            by_head.copy_(rotation.T @ by_head.double())
    for name in heads.outputs.values():
        for matrix in _input_side(model.get_submodule(name)):
            # Columns of W_o are the same channels.
            _multiply_right(matrix.view(-1, heads.width), rotation)


def _norm_of_shared_table(model: PreTrainedModel, scheme: Scheme, stream: Stream) -> Norm | None:
    """Return the norm before a head that shares the embedding's table and can continue to; None where there is none."""
    head: Any = model.get_output_embeddings()
    if not scheme.tied or isinstance(head, BaseTunerLayer) or head.weight is not stream.embedding.weight:
        return None
    return next((norm for norm in stream.norms if norm.readers == [scheme.head]), None)


def untie(model: PreTrainedModel) -> None:
    """Give a head that shares the embedding's table one of its own, with the same values, in place."""
    head: Any = model.get_output_embeddings()
    head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    if head.weight is not model.get_input_embeddings().weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False


def random_hadamard(width: int, seed: int) -> Tensor:
    """Return a random orthogonal matrix (width, width) in float64 that spreads every channel evenly.

    It is a Hadamard matrix of the largest power of two in `width`, times a random rotation of the odd rest, with random
    signs.
    """
    generator = torch.Generator().manual_seed(seed)
    even = width & -width  # the largest power of two that divides width
    odd = torch.linalg.qr(torch.randn(width // even, width // even, generator=generator, dtype=torch.float64))[0]

    # Sylvester's construction: [[H, H], [H, -H]].
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < even:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])

    signs = torch.randint(0, 2, (width, 1), generator=generator) * 2 - 1
    return torch.kron(odd.contiguous(), hadamard / even**0.5) * signs


def find_stream(model: PreTrainedModel, scheme: Scheme) -> Stream:
    """Find what makes, reads and adds to the hidden states, and verify it on a few tokens.

    Raises:
        ModelError: Something reads or changes the hidden states that does not rotate with them.
    """
    if not scheme.head:
        raise ModelError(
            f"{type(model).__name__} has no output head, so no logits show that a rotation leaves the model unchanged."
        )
    embedding = model.get_input_embeddings()
    width = int(embedding.weight.shape[1])
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in (*scheme.linears, scheme.head)}

    # A layer that reads no norm and is as wide as the stream is taken to write to it; `_verify_stream` finds out.
    norms = _connect_norms(model, width, linears)
    readers = {name for norm in norms for name in norm.readers}
    writers = [name for name, module in linears.items() if name not in readers and module.weight.shape[0] == width]
    stream = Stream(width, embedding, norms, writers)
    _verify_stream(model, stream)
    return stream


def _connect_norms(model: PreTrainedModel, width: int, linears: dict[str, Any]) -> list[Norm]:
    """Run a few tokens and find which linear layers are given the output of which norm, in the order of execution."""
    outputs: dict[int, tuple[Any, Tensor]] = {}  # keeps the tensors alive, so that no storage is used twice
    sources: dict[str, Any] = {}  # linear layer -> the norm whose output it was given

    def note_output(norm: Any, _: Any, output: Tensor) -> None:
        outputs[_storage(output)] = norm, output

    def note_input(name: str, args: tuple[Tensor, ...]) -> None:
        sources[name] = outputs.get(_storage(args[0]), (None, None))[0]

    # Norms note what they return, layers look up what they are given: the same storage means the same tensor.
    with ExitStack() as stack:
        for norm in _norms_of(model, width):
            stack.callback(norm.register_forward_hook(note_output).remove)
        for name, module in linears.items():
            hook = module.register_forward_pre_hook(lambda _, args, name=name: note_input(name, args))
            stack.callback(hook.remove)
        _logits(model)

    # A norm that no linear layer reads does not belong to the stream.
    found = []
    for norm, _ in outputs.values():
        readers = [name for name, source in sources.items() if source is norm]
        if readers:
            found.append(Norm(norm, _neutral_weight(norm, width), readers))
    return found


def find_heads(model: PreTrainedModel, scheme: Scheme) -> Heads | None:
    """Find the layers that make the values of attention and those that read their weighted sums, by trial.

    Returns None where no layer makes values alone, as with fused projections, and where there are no logits to compare.
    """
    if not scheme.head:
        return None
    # Only a rotation of the values, undone where their sums are read, leaves the logits as they are.
    expected = _logits(model)
    for output_name, value_name in _pairs_of_attention(model, scheme):
        attentions = _attentions_with(scheme, output_name, value_name)
        widths = {_head_width(model, attention) for attention in attentions}
        if len(widths) != 1:
            continue
        heads = Heads(
            widths.pop(),
            {attention: f"{attention}.{value_name}" for attention in attentions},
            {attention: f"{attention}.{output_name}" for attention in attentions},
        )
        half_rotated = (_logits_with_heads(model, replace(heads, values={})) - expected).abs().max()
        if (_logits_with_heads(model, heads) - expected).abs().max() < SAME_HEADS * half_rotated:
            return heads
    return None


def _pairs_of_attention(model: PreTrainedModel, scheme: Scheme) -> list[tuple[str, str]]:
    """Return candidates for output and value projection: own names of two layers of an attention module."""
    hidden = model.get_input_embeddings().weight.shape[1]
    found: dict[tuple[str, str], None] = {}
    by_module: dict[str, list[str]] = {}
    for name in scheme.linears:
        by_module.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    for attention, own_names in by_module.items():
        width = _head_width(model, attention)
        shapes = {name: _weight(model, f"{attention}.{name}").shape for name in own_names} if width else {}
        outputs = [name for name, (out, width_in) in shapes.items() if out == hidden and width_in % width == 0]
        values = [name for name, (out, width_in) in shapes.items() if width_in == hidden and out % width == 0]
        # Models list their output projection last.
        found |= dict.fromkeys((o, v) for o in reversed(outputs) for v in values if o != v)
    return list(found)


def _attentions_with(scheme: Scheme, *own_names: str) -> list[str]:
    """Return the modules that have layers of all these names."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in scheme.linears)
    return [module for module in modules if all(f"{module}.{name}" in scheme.linears for name in own_names)]


def _head_width(model: PreTrainedModel, attention: str) -> int:
    """Return the channels of one head, 0 for a module that is no attention. Transformers' attention has it always."""
    return int(getattr(model.get_submodule(attention), "head_dim", 0))


def _logits_with_heads(model: PreTrainedModel, heads: Heads) -> Tensor:
    """Return the logits with the heads rotated where values are made, and rotated back where they are read."""
    rotation = random_hadamard(heads.width, 0).to(model.get_input_embeddings().weight.device, torch.float32)

    def rotated(x: Tensor, by: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, heads.width)) @ by).flatten(-2)

    with ExitStack() as stack:
        for module in map(model.get_submodule, heads.values.values()):
            stack.callback(module.register_forward_hook(lambda _, __, output: rotated(output, rotation)).remove)
        for module in map(model.get_submodule, heads.outputs.values()):
            hook = module.register_forward_pre_hook(lambda _, args: (rotated(args[0], rotation.T),))
            stack.callback(hook.remove)
        return _logits(model)


def _storage(tensor: Tensor) -> int:
    """Return an id that a tensor and a slice of it have in common; the head is given a slice."""
    return tensor.untyped_storage().data_ptr()


def _weight(model: PreTrainedModel, name: str) -> Tensor:
    module: Any = model.get_submodule(name)
    return torch.as_tensor(module.weight)


def _norms_of(model: PreTrainedModel, width: int) -> list[nn.Module]:
    weights = ((module, getattr(module, "weight", None)) for module in model.modules())
    return [m for m, weight in weights if isinstance(weight, nn.Parameter) and weight.shape == (width,)]


def _neutral_weight(norm: Any, width: int) -> float:
    """Return the weight with which a norm computes x / rms(x).

    Raises:
        ModelError: It computes something else, such as subtracting the mean.
    """
    # An input whose mean is not zero: LayerNorm would subtract it.
    x = torch.linspace(-1, 2, width, device=norm.weight.device)[None]
    kept = norm.weight.detach().clone()
    with torch.no_grad():
        for neutral in (1.0, 0.0):
            norm.weight.fill_(neutral)
            output = norm(x)
            norm.weight.copy_(kept)
            if torch.allclose(output, x / x.square().mean().sqrt(), rtol=1e-3):
                return neutral
    raise ModelError(
        f"{type(norm).__name__} is no root-mean-square norm, so it does not commute with a rotation of its input."
    )


def _verify_stream(model: PreTrainedModel, stream: Stream) -> None:
    """Verify that the logits stay the same when the stream is rotated, and rotated back at the input of each norm.

    The output of a norm is also doubled, and halved where it is read: only linear layers may read it.

    Raises:
        ModelError: The logits change.
    """
    rotation = random_hadamard(stream.width, 0).to(stream.embedding.weight.device, torch.float32)
    expected = _logits(model)
    with ExitStack() as stack:
        # Rotate whatever is written to the stream ...
        for module in (stream.embedding, *(model.get_submodule(n) for n in stream.writers)):
            stack.callback(module.register_forward_hook(lambda _, __, output: output @ rotation).remove)
        # ... rotate it back where a norm reads it, and double the norm's output for its known readers alone.
        for norm in stream.norms:
            stack.callback(norm.module.register_forward_pre_hook(lambda _, args: (args[0] @ rotation.T,)).remove)
            stack.callback(norm.module.register_forward_hook(lambda _, __, output: output * 2).remove)
            for name in norm.readers:
                hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: (args[0] / 2,))
                stack.callback(hook.remove)
        found = _logits(model)
    # `not <` also refuses NaN.
    if not (found - expected).abs().max() < SAME * expected.std():
        raise ModelError(
            f"{type(model).__name__}: a module other than linear layers after norms reads the hidden states or adds to "
            "them (for example, a norm after a layer), so a rotation cannot be folded into the weights."
        )


def _logits(model: PreTrainedModel) -> Tensor:
    """Return the logits of a few tokens in evaluation mode: (tokens, vocabulary)."""
    with trial_pass(model) as device:
        logits: Tensor = model(input_ids=torch.arange(PROBE, device=device)[None], use_cache=False).logits[0]
    return logits


def _input_side(layer: Any) -> list[Tensor]:
    """Return the matrices of a layer with its input's width: the weight (out, in), and A (rank, in) of an adapter."""
    return [layer.weight, *([layer.lora_A[fake.ADAPTER].weight] if isinstance(layer, fake.LoraFakeQuantLinear) else [])]


def _output_side(layer: Any) -> list[Tensor]:
    """Return the matrices of a layer with its output's width: weight, B (out, rank) of an adapter, bias (out, 1)."""
    # The bias as a column is a view: changing it in place changes the bias.
    found = [layer.weight]
    if isinstance(layer, fake.LoraFakeQuantLinear):
        found.append(layer.lora_B[fake.ADAPTER].weight)
    return found if layer.bias is None else [*found, layer.bias[:, None]]


def _multiply_right(matrix: Tensor, by: Tensor) -> None:
    """Multiply `matrix` (rows, width) by `by` (width, width), in place and in float64."""
    for begin in range(0, matrix.shape[0], ROWS):
        rows = matrix[begin : begin + ROWS]
        rows.copy_(rows.double() @ by)
