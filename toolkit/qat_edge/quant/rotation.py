"""A decoder whose hidden states are turned: the same function, in coordinates that round better.

A few channels of the hidden states are many times larger than the others, and an int8 input has one scale for all of
them. Between the norms a decoder only adds to its hidden states x, so that an orthogonal Q may be put in (QuaRot [1],
SpinQuant [2]): with x Q in place of x,

    embedding     E Q                               written to x      Q^T W, b Q
    norm          weight g -> h, since x / rms(x) turns with x        read from a norm      W diag(g) Q diag(1/h)

Q is a random Hadamard matrix, which spreads a channel over all others, and h is 1, which exporters may leave out. Only
in the first norm each channel has its own h, close to 1: the first layers would else be given the embedding's integers
times one number, and many would lie on ties of their int8 form, where runtimes differ. What attention's heads pass on,
the weighted sums of their values, is turned as well, head by head (SpinQuant's R2): H^T W_v, W_o H.

The model stays what it was, with nothing added that runs, but where embedding and head share a table: g lies in the
head alone, so the last norm's output is turned once more for it (`turned`). A head with adapters gets its own table.

[1] https://arxiv.org/abs/2404.00456
[2] https://arxiv.org/abs/2405.16406
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qat_edge.errors import ModelError
from qat_edge.quant import fake, rotated_norm
from qat_edge.quant.scheme import Scheme

PROBE = 8  # tokens
SPREAD = 1 / 16  # of h around 1
SAME = 1e-3  # of the logits' standard deviation; float32 leaves 1e-5, a wrong place 0.1 and more
SAME_HEADS = 1e-2  # of what turning back alone changes; float32 leaves 1e-4 where attention adds little
ROWS = 8192  # rows turned at once, in float64


@dataclass(frozen=True)
class Norm:
    """A norm of the hidden states. neutral: the weight with which it only divides by the root mean square."""

    module: Any
    neutral: float
    readers: list[str]


@dataclass(frozen=True)
class Heads:
    """The layers before and behind attention: names of the scheme by the attention's. width: of one head."""

    width: int
    values: dict[str, str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class Stream:
    """Who makes, reads and adds to the hidden states: names of the scheme. width: of the hidden states; norms: in the
    order of execution."""

    width: int
    embedding: Any
    norms: list[Norm]
    writers: list[str]


def obstacle(model: Any, scheme: Scheme) -> str:
    """Why a model's hidden states cannot be turned; empty where they can. It is run on a few tokens and not changed."""
    try:
        find_stream(model, scheme)
    except ModelError as error:
        return str(error)
    return ""


def rotate(trained: Any, scheme: Scheme, seed: int) -> None:
    """Turn the hidden states of a float32 model by a random Hadamard matrix, in place: weights, norms and adapters.

    The heads of attention are turned by another one, where the model has layers of their values alone.

    trained: with adapters around its layers or not; their factors are turned along. A table that embedding and head
    share stays one where `scheme` has it so and the head has no adapter; else it becomes two.

    Raises:
        ModelError: its hidden states cannot be turned.
    """
    model = fake.base_of(trained)
    stream = find_stream(model, scheme)
    heads = find_heads(model, stream)
    device = stream.embedding.weight.device
    turn = random_hadamard(stream.width, seed).to(device)
    draws = torch.rand(stream.width, generator=torch.Generator().manual_seed(seed))
    first_gains = (1 + SPREAD * (2 * draws - 1)).to(turn)
    last = _norm_of_shared_table(model, scheme, stream)
    if last is None:
        untie(model)
    with torch.no_grad():
        _right(stream.embedding.weight, turn)
        for norm in stream.norms:
            gains = first_gains if norm is stream.norms[0] else torch.ones_like(first_gains)
            gained = (norm.module.weight.double() + (1 - norm.neutral))[:, None] * turn / gains
            if norm is last:
                rotated_norm.turn_output(norm.module, turn.T @ gained)
            else:
                for matrix in (m for name in norm.readers for m in _reading(model.get_submodule(name))):
                    _right(matrix, gained)
            norm.module.weight.copy_(gains - (1 - norm.neutral))
        for matrix in (m for name in stream.writers for m in _writing(model.get_submodule(name))):
            matrix.copy_(turn.T @ matrix.double())
        if heads is not None:
            _turn_heads(model, heads, random_hadamard(heads.width, seed).to(device))


def _turn_heads(model: Any, heads: Heads, turn: Tensor) -> None:
    for matrix in (m for name in heads.values.values() for m in _writing(model.get_submodule(name))):
        each = matrix.view(-1, heads.width, matrix.shape[1])
        each.copy_(turn.T @ each.double())
    for matrix in (m for name in heads.outputs.values() for m in _reading(model.get_submodule(name))):
        _right(matrix.view(-1, heads.width), turn)


def _norm_of_shared_table(model: Any, scheme: Scheme, stream: Stream) -> Norm | None:
    """The norm before a head that shares the embedding's table and can go on doing so; None where there is none."""
    head = model.get_output_embeddings()
    if not scheme.tied or isinstance(head, BaseTunerLayer) or head.weight is not stream.embedding.weight:
        return None
    return next((norm for norm in stream.norms if norm.readers == [scheme.head]), None)


def untie(model: Any) -> None:
    """Give a head that shares the embedding's table one of its own, with the same values."""
    head = model.get_output_embeddings()
    head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    if head.weight is not model.get_input_embeddings().weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False


def random_hadamard(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix (width, width) in float64 that spreads every channel evenly.

    A Hadamard matrix of the largest power of two in `width`, times a random rotation of the rest, with random signs.
    """
    generator = torch.Generator().manual_seed(seed)
    even = width & -width
    odd = torch.linalg.qr(torch.randn(width // even, width // even, generator=generator, dtype=torch.float64))[0]
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < even:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    signs = torch.randint(0, 2, (width, 1), generator=generator) * 2 - 1
    return torch.kron(odd.contiguous(), hadamard / even**0.5) * signs


def find_stream(model: Any, scheme: Scheme) -> Stream:
    """The hidden states' way through a model, found and tried out on a few tokens.

    Raises:
        ModelError: they are read or changed other than by what turns with them.
    """
    if not scheme.head:
        raise ModelError(f"{type(model).__name__} has no output head, whose logits would show that nothing changes.")
    embedding = model.get_input_embeddings()
    width = int(embedding.weight.shape[1])
    modules = {n: model.get_submodule(n) for n in (*scheme.linears, scheme.head)}
    norms = _norms_of(model, width)
    outputs: dict[int, tuple[Any, Tensor]] = {}  # holds the tensors, so that no storage is used twice
    sources: dict[str, Any] = {}

    def note(norm: Any, _: Any, output: Tensor) -> None:
        outputs[_storage(output)] = norm, output

    def look(name: str, given: tuple[Tensor, ...]) -> None:
        sources[name] = outputs.get(_storage(given[0]), (None, None))[0]

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(note).remove)
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda _, given, name=name: look(name, given))
            stack.callback(hook.remove)
        _logits(model)
    found = [
        Norm(norm, _neutral(norm, width), names)
        for norm, _ in outputs.values()
        if (names := [name for name, source in sources.items() if source is norm])
    ]
    reading = {name for norm in found for name in norm.readers}
    writers = [n for n, module in modules.items() if n not in reading and module.weight.shape[0] == width]
    stream = Stream(width, embedding, found, writers)
    _try_out(model, stream)
    return stream


def find_heads(model: Any, stream: Stream) -> Heads | None:
    """The layers that make the values of attention and read their weighted sums, found by trying; None without any."""
    readers = [name for norm in stream.norms for name in norm.readers]
    outputs = {parent: name for name in stream.writers if _head_width(model, parent := name.rpartition(".")[0])}
    outputs = {n: o for n, o in outputs.items() if model.get_submodule(o).weight.shape[1] % _head_width(model, n) == 0}
    beside: dict[str, dict[str, str]] = {}  # by their own names, then by what they lie in
    for name in readers:
        parent, _, own = name.rpartition(".")
        if parent in outputs and model.get_submodule(name).weight.shape[0] % _head_width(model, parent) == 0:
            beside.setdefault(own, {})[parent] = name
    expected = _logits(model)
    for values in beside.values():
        heads = Heads(_head_width(model, next(iter(values))), values, {parent: outputs[parent] for parent in values})
        changed = (_with_heads(model, replace(heads, values={})) - expected).abs().max()
        if (_with_heads(model, heads) - expected).abs().max() < SAME_HEADS * changed:
            return heads
    return None


def _head_width(model: Any, attention: str) -> int:
    """0 for what is no attention. Transformers' attention layers all have it."""
    return int(getattr(model.get_submodule(attention), "head_dim", 0))


def _with_heads(model: Any, heads: Heads) -> Tensor:
    """Logits of a model whose heads are turned where values are made, and turned back where they are read."""
    turn = random_hadamard(heads.width, 0).to(model.get_input_embeddings().weight.device, torch.float32)

    def turned(x: Tensor, by: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, heads.width)) @ by).flatten(-2)

    with ExitStack() as stack:
        for module in map(model.get_submodule, heads.values.values()):
            stack.callback(module.register_forward_hook(lambda _, __, output: turned(output, turn)).remove)
        for module in map(model.get_submodule, heads.outputs.values()):
            stack.callback(module.register_forward_pre_hook(lambda _, given: (turned(given[0], turn.T),)).remove)
        return _logits(model)


def _storage(tensor: Tensor) -> int:
    """The same for a tensor and a slice of it, which the head is given."""
    return tensor.untyped_storage().data_ptr()


def _norms_of(model: Any, width: int) -> list[Any]:
    weights = ((module, getattr(module, "weight", None)) for module in model.modules())
    return [m for m, weight in weights if isinstance(weight, nn.Parameter) and weight.shape == (width,)]


def _neutral(norm: Any, width: int) -> float:
    """The weight with which a norm gives x / rms(x).

    Raises:
        ModelError: it does something else, subtracting the mean for one.
    """
    x = torch.linspace(-1, 2, width, device=norm.weight.device)[None]
    kept = norm.weight.detach().clone()
    with torch.no_grad():
        for neutral in (1.0, 0.0):
            norm.weight.fill_(neutral)
            output = norm(x)
            norm.weight.copy_(kept)
            if torch.allclose(output, x / x.square().mean().sqrt(), rtol=1e-3):
                return neutral
    raise ModelError(f"{type(norm).__name__} is no root-mean-square norm, and does not turn with the hidden states.")


def _try_out(model: Any, stream: Stream) -> None:
    """See that the logits stay when everything written to the hidden states is turned, and turned back in each norm.

    What leaves a norm is doubled, too, and halved where it is read: nothing but linear layers may read it.

    Raises:
        ModelError: they do not.
    """
    turn = random_hadamard(stream.width, 0).to(stream.embedding.weight.device, torch.float32)
    expected = _logits(model)
    with ExitStack() as stack:
        for module in (stream.embedding, *(model.get_submodule(n) for n in stream.writers)):
            stack.callback(module.register_forward_hook(lambda _, __, output: output @ turn).remove)
        for norm in stream.norms:
            stack.callback(norm.module.register_forward_pre_hook(lambda _, given: (given[0] @ turn.T,)).remove)
            stack.callback(norm.module.register_forward_hook(lambda _, __, output: output * 2).remove)
            for name in norm.readers:
                hook = model.get_submodule(name).register_forward_pre_hook(lambda _, given: (given[0] / 2,))
                stack.callback(hook.remove)
        found = _logits(model)
    if not (found - expected).abs().max() < SAME * expected.std():
        raise ModelError(
            f"{type(model).__name__}: something beside linear layers behind norms reads its hidden states or adds to "
            "them, a norm after a layer for one."
        )


def _logits(model: Any) -> Tensor:
    """Of a few tokens, in evaluation mode: (tokens, vocabulary)."""
    device = model.get_input_embeddings().weight.device
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            logits: Tensor = model(input_ids=torch.arange(PROBE, device=device)[None], use_cache=False).logits[0]
    finally:
        model.train(training)
    return logits


def _reading(layer: Any) -> list[Tensor]:
    """What of a layer has its input's width: the weight (out, in), and A (rank, in) of an adapter."""
    return [layer.weight, *([layer.lora_A[fake.ADAPTER].weight] if isinstance(layer, fake.LoraFakeQuantLinear) else [])]


def _writing(layer: Any) -> list[Tensor]:
    """What of a layer has its output's width: the weight (out, in), B (out, rank) of an adapter, the bias (out, 1)."""
    found = [layer.weight]
    if isinstance(layer, fake.LoraFakeQuantLinear):
        found.append(layer.lora_B[fake.ADAPTER].weight)
    return found if layer.bias is None else [*found, layer.bias[:, None]]


def _right(matrix: Tensor, turn: Tensor) -> None:
    """matrix (rows, width) times turn (width, width), in place and in float64."""
    for begin in range(0, matrix.shape[0], ROWS):
        rows = matrix[begin : begin + ROWS]
        rows.copy_(rows.double() @ turn)
