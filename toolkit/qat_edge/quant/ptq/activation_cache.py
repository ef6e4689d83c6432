"""Passes through a block most of which will not change any more: what it said before is handed out again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


class Replay:
    """Outputs of a block's modules by batch, for those whose linear layers are all finished.

    Layers are finished in the order they run, so that what a finished one is given stays as it is too. Once a module
    has answered, what lies in it is forgotten: attention as a whole is kept rather than its four layers.
    finished: names of the layers whose weights, as rounded, stay as they are.
    """

    def __init__(self, block: nn.Module, linears: Mapping[str, nn.Module]) -> None:
        self.finished: list[str] = []
        self._block, self._linears = block, linears
        self._modules: dict[str, nn.Module] = {}
        self._outputs: dict[tuple[int, str, int], Any] = {}
        self._batch: int | None = None
        self._calls: Counter[str] = Counter()

    def finish(self, names: Iterable[str]) -> None:
        """These layers, the next to run, stay as they are from now on."""
        self.finished += names
        done, every = {self._linears[name] for name in self.finished}, set(self._linears.values())
        for name, module in self._block.named_modules():
            inside = every.intersection(module.modules())
            called = module is not self._block and not isinstance(module, nn.ModuleList | nn.ModuleDict)
            if called and inside and inside <= done:
                self._modules[name] = module

    def begin(self, batch: object | None) -> None:
        """A pass of this batch begins; None for one of other hidden states, of which nothing is replayed."""
        self._batch = None if batch is None else id(batch)
        self._calls.clear()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Finished modules hand out what they said. For passes with their weights rounded, and no others."""
        with ExitStack() as stack:
            for name, module in self._modules.items():
                vars(module)["forward"] = self._replaying(name, module.forward)
                stack.callback(vars(module).pop, "forward")
            yield

    def _replaying(self, name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            batch, call = self._batch, self._calls[name]
            if batch is None:
                return compute(*arguments, **keywords)
            self._calls[name] += 1
            if (batch, name, call) not in self._outputs:
                self._outputs[batch, name, call] = compute(*arguments, **keywords)
                for key in [k for k in self._outputs if k[0] == batch and k[1].startswith(f"{name}.")]:
                    del self._outputs[key]
            return self._outputs[batch, name, call]

        return forward
