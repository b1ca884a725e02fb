"""Methods whose server works on products of factors, straight from their papers; see `oracle_methods`."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import oracle
from oracle import Base, Parameters
from oracle_factors import fedit
from oracle_methods import (
    Asked,
    At,
    Game,
    Round,
    World,
    entries,
    every,
    locally,
    mean_of,
    only_moved,
    prefixes,
    shares_of,
)


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
