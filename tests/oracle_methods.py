"""Every federated method straight from its paper: loops over clients, modules and layers, in float64.

It knows nothing of the package, and stands on `oracle`: same letters, same model. A method is a function
``(game, world, clients) -> (world, what each client trained)`` of one round. What chance decides (who trains which
components, fresh factors) is given, never drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
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


def ideal(g: Game, w: World, sent: list[Parameters], shares: list[float]) -> dict[At, np.ndarray]:
    """``sum_i p_i s B_i A_i``."""
    return {
        at: sum(
            share * g.s[at[0]] * y[(*at, "B")] @ y[(*at, "A")] for y, share in zip(sent, shares, strict=True)
        )
        for at in w.base.w
    }


def cut(g: Game, products: Mapping[At, np.ndarray]) -> Parameters:
    """The best factors of rank r."""
    x = {}
    for at, product in products.items():
        u, sizes, vt = np.linalg.svd(product)
        n = min(g.r, len(sizes))
        x[(*at, "B")], x[(*at, "A")] = np.zeros((len(u), g.r)), np.zeros((g.r, len(vt)))
        x[(*at, "B")][:, :n] = u[:, :n] * sizes[:n] / g.s[at[0]]
        x[(*at, "A")][:n] = vt[:n]
    return x


def moved_base(w: World, change: Mapping[At, np.ndarray]) -> Base:
    return w.base._replace(w={at: v + change[at] for at, v in w.base.w.items()})


def shares_of(clients: Sequence[Asked]) -> list[float]:
    return [c.weight for c in clients]


# --- Methods whose server averages factors ---------------------------------------------------------------------------


def fedit(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    return fedit_of(g, w, clients, every(g, w), every(g, w))


def ffa_lora(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    return fedit_of(g, w, clients, every(g, w, False), every(g, w))


def rolora(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    even = w.memory.get("round", 0) % 2 == 0
    w, moves = fedit_of(g, w, clients, every(g, w, not even), every(g, w, even))
    return w._replace(memory={"round": w.memory.get("round", 0) + 1}), moves


def fedit_of(g: Game, w: World, clients: Sequence[Asked], a: Mapping, b: Mapping) -> Round:
    moves = entries(w, a, b)
    ys = [locally(g, w, c, moves, every(g, w)) for c in clients]
    return w._replace(x=mean_of(w.x, ys, shares_of(clients))), [moves] * len(clients)


def fslora(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    held = [{at: np.isin(np.arange(g.r), c.drawn[at]) for at in w.base.w} for c in clients]
    moves = [entries(w, h, h) for h in held]
    ys = [
        locally(g, w, c, m, {at: v * g.r / c.k for at, v in h.items()})
        for c, m, h in zip(clients, moves, held, strict=True)
    ]
    return w._replace(x=mean_of(w.x, ys, shares_of(clients))), moves


def fed_plora(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    held = [{at: np.isin(np.arange(g.r), c.drawn[at]) for at in w.base.w} for c in clients]
    moves = [entries(w, h, h) for h in held]
    ys = [locally(g, w, c, m, every(g, w)) for c, m in zip(clients, moves, strict=True)]
    return w._replace(x=mean_of_trainers(w.x, ys, moves, shares_of(clients))), moves


def prefixes(g: Game, w: World, clients: Sequence[Asked]) -> tuple[list[Parameters], list[Parameters]]:
    """What each client has after training its first k components, and which entries those are."""
    held = [first(g, w, c.k) for c in clients]
    moves = [entries(w, h, h) for h in held]
    return [locally(g, w, c, m, h) for c, m, h in zip(clients, moves, held, strict=True)], moves


def zero_padding(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    ys, moves = prefixes(g, w, clients)
    shares = shares_of(clients)
    return w._replace(x=padded_mean(w.x, ys, moves, shares, shares)), moves


def raflora_of_factors(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    ys, moves = prefixes(g, w, clients)
    return w._replace(x=mean_of_trainers(w.x, ys, moves, shares_of(clients))), moves


def hafl(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    """Importance is ``|x dx|`` smoothed, times its smoothed spread."""
    blank = {p: 0.0 * v for p, v in w.x.items()}
    mean, spread = w.memory.get("mean", blank), w.memory.get("spread", blank)
    score = {p: mean[p] * spread[p] for p in w.x}
    held = []
    for c in clients:
        best = {at: score[(*at, "A")].mean(1) + score[(*at, "B")].mean(0) for at in w.base.w}
        held.append(
            {at: np.isin(np.arange(g.r), np.argsort(-v, kind="stable")[: c.k]) for at, v in best.items()}
        )
    moves = [entries(w, h, h) for h in held]
    gains = held if g.options["truncate"] else [every(g, w)] * len(clients)
    ys = [locally(g, w, c, m, gain) for c, m, gain in zip(clients, moves, gains, strict=True)]
    x = mean_of_trainers(w.x, ys, moves, shares_of(clients))
    anyone = {p: np.any([m[p] for m in moves], 0) for p in x}
    now = {p: np.abs(w.x[p] * (x[p] - w.x[p])) for p in x}
    mean = {p: np.where(anyone[p], 0.85 * mean[p] + 0.15 * now[p], mean[p]) for p in x}
    spread = {
        p: np.where(anyone[p], 0.85 * spread[p] + 0.15 * np.abs(now[p] - mean[p]), spread[p]) for p in x
    }
    return w._replace(x=x, memory={"mean": mean, "spread": spread}), moves


def fedsa_lora(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    """A client's own B and head are its memory; the server's are the cohort's averages, which nobody receives."""
    begin, moves, ys, memory = w.memory.get("first", w.x), entries(w, every(g, w), every(g, w)), [], {}
    for c in clients:
        own = w.memory.get(c.id, begin)
        x = {p: w.x[p] if p[-1] == "A" else own[p] for p in w.x}
        ys.append(locally(g, w, c, moves, every(g, w), x=x))
        memory[c.id] = ys[-1]
    x = mean_of(w.x, ys, shares_of(clients))
    sent = {p: m & (p[-1] == "A") for p, m in moves.items()}
    return w._replace(x=x, memory={"first": begin, **w.memory, **memory}), [sent] * len(clients)


def hetlora(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    gamma, weight, least = (g.options[name] for name in ("decay", "tail_penalty", "least_rank"))
    ys, moves, sizes, ranks = [], [], [], {}
    for c in clients:
        k = w.memory.get(c.id, c.k)
        held = first(g, w, k)
        tail = entries(w, *[{at: v & (np.arange(g.r) >= np.floor(gamma * k)) for at, v in held.items()}] * 2)
        y = locally(g, w, c, entries(w, held, held), held, lambda x, t=tail: tail_gradient(x, t, weight))
        if np.prod(tail_norms(y, tail)) < np.prod(tail_norms(w.x, tail)):
            k = min(k, max(min(least, k), int(np.floor(gamma * k))))
        left = first(g, w, k)
        ranks[c.id], ys = k, [*ys, y]
        moves.append(entries(w, left, left))
        sent = only_moved(y, moves[-1])
        sizes.append(
            np.sqrt(sum(np.linalg.norm(sent[(*at, "B")] @ sent[(*at, "A")]) ** 2 for at in w.base.w))
        )
    shares = [size / sum(sizes) for size in sizes]
    return w._replace(x=padded_mean(w.x, ys, moves, shares, shares), memory={**w.memory, **ranks}), moves


def tail_norms(x: Parameters, tail: Parameters) -> tuple[float, float]:
    """Of the tail's B and of its A, over all modules."""
    squares = {f: sum((x[p][tail[p]] ** 2).sum() for p in x if p[-1] == f) for f in "BA"}
    return np.sqrt(squares["B"]), np.sqrt(squares["A"])


def tail_gradient(x: Parameters, tail: Parameters, weight: float) -> Parameters:
    b, a = tail_norms(x, tail)
    other = {"A": b / a, "B": a / b}
    return {p: weight * other[p[-1]] * np.where(tail[p], x[p], 0.0) for p in x if p[0] != "head"}


# --- Methods whose server works on products --------------------------------------------------------------------------


def flexlora(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    ys, moves = prefixes(g, w, clients)
    sent = [only_moved(y, m) for y, m in zip(ys, moves, strict=True)]
    head = mean_of(w.x, ys, shares_of(clients))
    return w._replace(x=head | cut(g, ideal(g, w, sent, shares_of(clients)))), moves


def raflora(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    """Partition by partition between the sorted ranks; one that nobody trained keeps its old product."""
    ys, moves = prefixes(g, w, clients)
    levels = [0, *sorted({*g.ranks, g.r})]
    products = {}
    for at in w.base.w:
        total = 0.0
        for low, high in pairwise(levels):
            part, who = (
                slice(low, high),
                [(c.weight, y) for c, y in zip(clients, ys, strict=True) if c.k >= high],
            )
            all_of_it = sum(weight for weight, _ in who)
            for weight, y in who or [(1.0, w.x)]:
                share = weight / (all_of_it or 1.0)
                total = total + share * g.s[at[0]] * y[(*at, "B")][:, part] @ y[(*at, "A")][part]
        products[at] = total
    return w._replace(x=mean_of(w.x, ys, shares_of(clients)) | cut(g, products)), moves


def lora_fair(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    """The correction as a least-squares problem with the penalty as further rows."""
    w_next, moves = fedit(g, w, clients)
    ys = [locally(g, w, c, moves[0], every(g, w)) for c in clients]
    wanted, x = ideal(g, w, ys, shares_of(clients)), dict(w_next.x)
    for at in w.base.w:
        a, b = x[(*at, "A")], x[(*at, "B")]
        size = np.sqrt(g.options["penalty"] * np.trace(a @ a.T) / g.r)
        rows = np.vstack([a.T, size * np.eye(g.r)])
        right = np.vstack([(wanted[at] / g.s[at[0]] - b @ a).T, np.zeros((g.r, len(b)))])
        x[(*at, "B")] = b + np.linalg.lstsq(rows, right, rcond=None)[0].T
    return w_next._replace(x=x), moves


def flora(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    """Stacks: ``[B_1 .. B_C]`` times ``[p_1 A_1; ..]``."""
    ys, moves = prefixes(g, w, clients)
    sent = [only_moved(y, m) for y, m in zip(ys, moves, strict=True)]
    merged = {}
    for at in w.base.w:
        b = np.hstack([y[(*at, "B")] for y in sent])
        a = np.vstack([c.weight * y[(*at, "A")] for c, y in zip(clients, sent, strict=True)])
        merged[at] = g.s[at[0]] * b @ a
    return World(moved_base(w, merged), mean_of(w.x, ys, shares_of(clients)) | g.fresh), moves


def fedex_lora(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    moves = entries(w, every(g, w), every(g, w))
    ys = [locally(g, w, c, moves, every(g, w)) for c in clients]
    x, wanted = mean_of(w.x, ys, shares_of(clients)), ideal(g, w, ys, shares_of(clients))
    missed = {at: wanted[at] - g.s[at[0]] * x[(*at, "B")] @ x[(*at, "A")] for at in w.base.w}
    return World(moved_base(w, missed), x), [moves] * len(clients)


def xgblora(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    """``layers`` says which are boosted in this round."""
    on = {at: np.full(g.r, bool(g.options["layers"][at[1]])) for at in w.base.w}
    moves, ridge = entries(w, on, on), g.options["ridge"]

    def shrink(x: Parameters) -> Parameters:
        return {p: 2 * ridge * v for p, v in x.items() if p[0] != "head"}

    ys = [locally(g, w, c, moves, on, shrink) for c in clients]
    boost = ideal(g, w, [only_moved(y, moves) for y in ys], shares_of(clients))
    boost = {at: g.options["step"] * v for at, v in boost.items()}
    return World(moved_base(w, boost), mean_of(w.x, ys, shares_of(clients)) | g.fresh), [moves] * len(clients)


def rac_lora(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    still = g.options["sketch"]
    moves = entries(w, every(g, w, still != "A"), every(g, w, still != "B"))
    ys = [locally(g, w, c, moves, every(g, w)) for c in clients]
    x = mean_of(w.x, ys, shares_of(clients))
    link = {at: g.s[at[0]] * x[(*at, "B")] @ x[(*at, "A")] for at in w.base.w}
    return World(moved_base(w, link), x | g.fresh), [moves] * len(clients)


def fed_sb(g: Game, w: World, clients: Sequence[Asked]) -> Round:
    """``W0 + s B R A``: R is stored as "A" here, B and A are in the memory; ``grad_R = B^T G A^T``."""
    ys = []
    for c in clients:
        x, mine = dict(w.x), g.optimizer()
        for h, batch in enumerate(c.minibatches):
            full = {p: v for p, v in x.items() if p[0] == "head"}
            for at in w.base.w:
                full[(*at, "B")], full[(*at, "A")] = (
                    w.memory[(*at, "B")],
                    x[(*at, "A")] @ w.memory[(*at, "A")],
                )
            ones = {at: np.eye(g.r) for at in w.base.w}
            _, grads = oracle.loss_and_gradients(w.base, full, g.s, ones, batch)
            for at in w.base.w:
                grads[(*at, "A")] = grads[(*at, "A")] @ w.memory[(*at, "A")].T
                grads[(*at, "B")] = np.zeros_like(x[(*at, "B")])
            x = mine.step(x, grads, {p: np.ones_like(v, dtype=bool) for p, v in x.items()}, g.first_step + h)
        ys.append(x)
    moves = {p: np.ones_like(v, dtype=bool) for p, v in w.x.items()}
    return w._replace(x=mean_of(w.x, ys, shares_of(clients))), [moves] * len(clients)
