"""Methods whose server averages factors, straight from their papers; see `oracle_methods`."""

from collections.abc import Mapping, Sequence

import numpy as np
from oracle import Parameters
from oracle_methods import (
    Asked,
    Game,
    Round,
    World,
    entries,
    every,
    first,
    locally,
    mean_of,
    mean_of_trainers,
    only_moved,
    padded_mean,
    prefixes,
    shares_of,
)


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
