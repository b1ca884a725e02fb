"""What every federated method by hand is made of: loops over clients, modules and layers, in float64.

It knows nothing of the package, and stands on `oracle`: same letters, same model. A method is a function
``(game, world, clients) -> (world, what each client trained)`` of one round, in `oracle_factors` or `oracle_products`.
What chance decides (who trains which components, fresh factors) is given, never drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import oracle
from oracle import Base, Minibatch, Parameters

At = tuple[str, int]


class Game(NamedTuple):
    """What does not change, the round's first step, and what chance gives at its end.

    ``r`` is the rank of all modules, ``s`` the scale of each; ``ranks`` are those of all clients.
    """

    r: int
    s: Mapping[str, float]
    ranks: Sequence[int]
    optimizer: Callable[[], Any]
    first_step: int = 0
    fresh: Parameters = {}
    options: Mapping[str, float] = {}


class Asked(NamedTuple):
    """A client of a round: its share, its data, and the components that it drew where a method draws."""

    id: int
    k: int
    weight: float
    minibatches: Sequence[Minibatch]
    drawn: Mapping[At, np.ndarray] = {}


class World(NamedTuple):
    """The frozen weights, the global parameters, and what a method remembers."""

    base: Base
    x: Parameters
    memory: Mapping[Any, Any] = {}


Round = tuple[World, list[Parameters]]


# --- One client ------------------------------------------------------------------------------------------------------


def entries(w: World, a: Mapping[At, np.ndarray], b: Mapping[At, np.ndarray]) -> Parameters:
    """Which entries may move: rows of A, columns of B, and the head."""
    moves = {p: np.ones_like(v, dtype=bool) for p, v in w.x.items()}
    for at in w.base.w:
        moves[(*at, "A")] &= a[at][:, None]
        moves[(*at, "B")] &= b[at][None, :]
    return moves


def every(g: Game, w: World, held: bool = True) -> dict[At, np.ndarray]:
    return {at: np.full(g.r, held) for at in w.base.w}


def first(g: Game, w: World, k: int) -> dict[At, np.ndarray]:
    return {at: np.arange(g.r) < k for at in w.base.w}


def locally(
    g: Game,
    w: World,
    client: Asked,
    moves: Parameters,
    gain: Mapping[At, np.ndarray],
    extra: Callable[[Parameters], Parameters] = lambda x: {},
    x: Parameters | None = None,
) -> Parameters:
    """The parameters after the client's steps; ``extra`` is the gradient of what joins the loss."""
    x, mine = dict(w.x if x is None else x), g.optimizer()
    sketches = {at: np.diag(gain[at].astype(float)) for at in w.base.w}
    for h, batch in enumerate(client.minibatches):
        _, grads = oracle.loss_and_gradients(w.base, x, g.s, sketches, batch)
        more = extra(x)
        grads = {p: np.where(moves[p], v + more.get(p, 0.0), 0.0) for p, v in grads.items()}
        x = mine.step(x, grads, moves, g.first_step + h)
    return x


def only_moved(y: Parameters, moves: Parameters) -> Parameters:
    """What a client sends: zero where it could not train."""
    return {p: np.where(moves[p], v, 0.0) for p, v in y.items()}


def prefixes(g: Game, w: World, clients: Sequence[Asked]) -> tuple[list[Parameters], list[Parameters]]:
    """What each client has after training its first k components, and which entries those are."""
    held = [first(g, w, c.k) for c in clients]
    moves = [entries(w, h, h) for h in held]
    return [locally(g, w, c, m, h) for c, m, h in zip(clients, moves, held, strict=True)], moves


# --- Averages --------------------------------------------------------------------------------------------------------


def mean_of(x: Parameters, ys: list[Parameters], shares: list[float]) -> Parameters:
    """Over all clients, of the changes."""
    return {p: v + sum(share * (y[p] - v) for y, share in zip(ys, shares, strict=True)) for p, v in x.items()}


def mean_of_trainers(
    x: Parameters, ys: list[Parameters], moves: list[Parameters], shares: list[float]
) -> Parameters:
    """Entry by entry over those that could train it; what nobody could stays."""
    new = {}
    for p, v in x.items():
        total = sum(share * m[p] for m, share in zip(moves, shares, strict=True))
        gained = sum(share * m[p] * y[p] for y, m, share in zip(ys, moves, shares, strict=True))
        new[p] = np.where(total > 0, gained / np.where(total > 0, total, 1.0), v)
    return new


def padded_mean(
    x: Parameters, ys: list[Parameters], moves: list[Parameters], shares: list[float], head: list[float]
) -> Parameters:
    """Of the factors with zeros where a client did not train; what nobody trained stays."""
    new = mean_of(x, ys, head)
    for p, v in x.items():
        if p[0] != "head":
            total = sum(share * m[p] * y[p] for y, m, share in zip(ys, moves, shares, strict=True))
            new[p] = np.where(np.any([m[p] for m in moves], 0), total, v)
    return new


def shares_of(clients: Sequence[Asked]) -> list[float]:
    return [c.weight for c in clients]
