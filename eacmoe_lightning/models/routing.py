"""What a router decides, the hooks that show it and let others change it, and how a forward pass is replaced."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LARGEST_SHARE = 0.9999  # of a cap that the inverse of a capped logit takes for its largest


@dataclass
class Routing:
    """One router's output for N tokens."""

    logits: Tensor  # [N, E] float32, before any softmax
    ids: Tensor  # [N, K] int64, the experts that ran
    weights: Tensor  # [N, K], their weights

    def of(self, tokens: slice) -> Routing:
        """The same of some tokens."""
        return Routing(self.logits[tokens], self.ids[tokens], self.weights[tokens])

    def by_pair(self) -> Routing:
        """The same with a row for each pair of a token and one of its experts, [N * K, ...]."""
        logits = self.logits.repeat_interleave(self.ids.shape[1], 0)
        return Routing(logits, self.ids.reshape(-1, 1), self.weights.reshape(-1, 1))


@dataclass(frozen=True)
class LogitMap:
    """What a router makes of the products of its input with its matrix before they are its logits.

    Attributes:
        scale: factor of the products (Muse Spark).
        cap: logits stay between -cap and cap, as cap * tanh(product / cap) (Laguna); 0: they are not bounded.
    """

    scale: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, router: nn.Module) -> LogitMap:
        """The map of a router, from the options that transformers' routers keep."""
        scale, cap = getattr(router, "output_multiplier", 1.0), getattr(router, "router_logit_softcapping", 0.0)
        return cls(float(scale), max(float(cap or 0.0), 0.0))

    def __call__(self, products: Tensor) -> Tensor:
        """Products [N, E] -> logits [N, E], differentiable."""
        logits = products if self.scale == 1.0 else products * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    def products(self, logits: Tensor) -> Tensor:
        """The products [N, E] that give these logits; of logits next to the cap, large ones."""
        if self.cap:
            logits = torch.atanh((logits / self.cap).clamp(-LARGEST_SHARE, LARGEST_SHARE)) * self.cap
        return logits if self.scale == 1.0 else logits / self.scale


# Gets a routing and, if it is known, the router's input. A routing that it returns runs instead.
Watcher = Callable[[Routing, Tensor | None], Routing | None]


class Products(threading.local):
    """What a router's matrix gave in the forward pass that runs in a thread; copies and pickles have none.

    Attributes:
        logits: [..., E], until the router's own hook takes them.
    """

    logits: Tensor | None = None

    def __reduce__(self) -> tuple:
        return Products, ()


def keep_logits(products: Products, linear: nn.Module, args: tuple, output: Tensor) -> None:
    """The forward hook of a router's matrix that is a layer of its own."""
    products.logits = output


def show_routing(
    watcher: Watcher, products: Products, router: nn.Module, args: tuple, kwargs: dict, output: tuple
) -> tuple | None:
    """A router's forward hook, bound to a watcher by `partial` so that a model with it can be copied and pickled."""
    routing = _routing_of(output, products.logits)
    products.logits = None
    changed = watcher(routing, args[0] if args else kwargs.get("hidden_states"))
    return None if changed is None else (output[0], changed.weights, changed.ids, *output[3:])


def _routing_of(output: tuple[Tensor, ...], logits: Tensor | None = None) -> Routing:
    """A router's output as a `Routing`; `logits` take the place of the first item, which may be probabilities."""
    first, weights, ids, *_ = output
    logits = first if logits is None else logits
    return Routing(logits.reshape(-1, logits.shape[-1]).float(), ids, weights)


class Handles(list):
    """The handles of several hooks, removed together."""

    def remove(self) -> None:
        for handle in self:
            handle.remove()


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Gives a module another forward pass inside the `with` block."""
    before = vars(module).get("forward")
    module.forward = forward  # an attribute of the instance shadows the method
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class Reached(BaseException):
    """Ends a forward pass at the module whose input is recorded."""
