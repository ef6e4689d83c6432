"""Cache the outputs of layers that are already quantized, so that a block is not recomputed from its input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


class ActivationCache:
    """Outputs of those modules of a block whose linear layers are all finished, by batch.

    Layers are finished in the order they run, so that the inputs of a finished one do not change either. Once a module
    has an output, the outputs inside it are dropped: attention as a whole is cached instead of its four layers.

    Attributes:
        finished: Names of the layers whose weights, as rounded, do not change any more.
    """

    def __init__(self, block: nn.Module, linears: Mapping[str, nn.Module]) -> None:
        self.finished: list[str] = []
        self._block, self._linears = block, linears
        self._modules: dict[str, nn.Module] = {}  # cached modules by name in the block
        self._outputs: dict[tuple[int | None, str, int], Any] = {}  # (batch, module, number of the call in a pass)
        self._enabled: dict[nn.Module, str] = {}  # names of the modules that return cached outputs at present
        self._batch: int | None = None
        self._calls: Counter[str] = Counter()

    def mark_finished(self, names: Iterable[str]) -> None:
        """Cache from now on what depends only on finished layers. `names` are the next layers to run."""
        self.finished += names
        done, every = {self._linears[name] for name in self.finished}, set(self._linears.values())
        for name, module in self._block.named_modules():
            inside = every.intersection(module.modules())
            # Lists and dictionaries of modules are never called themselves.
            is_called = module is not self._block and not isinstance(module, nn.ModuleList | nn.ModuleDict)
            if is_called and inside and inside <= done:
                self._modules[name] = module

    def start_pass(self, batch: object | None) -> None:
        """Begin a pass of `batch`; None for one with other hidden states, which neither reads nor fills the cache."""
        self._batch = None if batch is None else id(batch)
        self._calls.clear()

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Let cached modules return their outputs. Only for passes with the finished weights rounded."""
        with ExitStack() as stack:
            for name, module in self._modules.items():
                vars(module)["forward"] = self._cached(name, module.forward)
                stack.callback(vars(module).pop, "forward")
                self._enabled[module] = name
            stack.callback(self._enabled.clear)
            yield

    def returns_cached(self, module: nn.Module) -> bool:
        """Return whether the next call of a module returns an output of an earlier pass, whatever its input."""
        name = self._enabled.get(module)
        return name is not None and (self._batch, name, self._calls[name]) in self._outputs

    def _cached(self, name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            batch, call = self._batch, self._calls[name]
            if batch is None:
                return compute(*arguments, **keywords)
            self._calls[name] += 1  # a module may run several times in one pass

            if (batch, name, call) not in self._outputs:
                self._outputs[batch, name, call] = compute(*arguments, **keywords)
                # What is inside this module will not run again.
                for key in [k for k in self._outputs if k[0] == batch and k[1].startswith(f"{name}.")]:
                    del self._outputs[key]
            return self._outputs[batch, name, call]

        return forward
