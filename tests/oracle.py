"""A federated round straight from the equations: loops over clients and steps, dense r x r sketches, no autodiff.

It knows nothing of the package. Letters are the paper's: ``W (m, n)``, ``B (m, r)``, ``A (r, n)``, ``S (r, r)``; all
arithmetic is NumPy in float64. The model is `toy`'s: mean of embeddings, then for each layer the modules ``up`` and
``down``, each followed by tanh, then a dense head. Parameters are one flat dict: ``(module, layer, "A")`` and
``(module, layer, "B")`` -> factor, ``("head", "kernel")`` and ``("head", "bias")``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Parameters = dict[tuple, np.ndarray]


class Base(NamedTuple):
    """Frozen weights: embeddings ``(V, D)``; W of each (module, layer), in the order of the forward pass."""

    embed: np.ndarray
    w: dict[tuple[str, int], np.ndarray]


class Minibatch(NamedTuple):
    """The token ids of each example, its label, and its weight."""

    texts: Sequence[np.ndarray]
    labels: np.ndarray
    weights: np.ndarray


class Participant(NamedTuple):
    """One client of a round: the components drawn for each (module, layer), its share, its minibatches."""

    drawn: dict[tuple[str, int], np.ndarray]
    weight: float
    minibatches: Sequence[Minibatch]


class Sgd:
    """``m <- mu m + g``, ``x <- x - lr m``, both where x may move."""

    def __init__(self, rate: Callable[[int], float], momentum: float = 0.0):
        self.rate, self.momentum, self.m = rate, momentum, None

    def step(self, x: Parameters, g: Parameters, moves: Parameters, t: int) -> Parameters:
        m = self.m or dict.fromkeys(x, 0.0)
        self.m = {p: np.where(moves[p], self.momentum * m[p] + g[p], m[p]) for p in x}
        return {p: np.where(moves[p], x[p] - self.rate(t) * self.m[p], x[p]) for p in x}


class AdamW:
    """Adam with bias correction and decoupled weight decay; moments and x change where x may move."""

    def __init__(self, rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, decay: float = 0.0):
        self.rate, self.b1, self.b2, self.eps, self.decay = rate, b1, b2, eps, decay
        self.m, self.v, self.count = None, None, 0

    def step(self, x: Parameters, g: Parameters, moves: Parameters, t: int) -> Parameters:
        m, v = self.m or dict.fromkeys(x, 0.0), self.v or dict.fromkeys(x, 0.0)
        self.count += 1
        self.m = {p: np.where(moves[p], self.b1 * m[p] + (1 - self.b1) * g[p], m[p]) for p in x}
        self.v = {p: np.where(moves[p], self.b2 * v[p] + (1 - self.b2) * g[p] ** 2, v[p]) for p in x}

        def move(p: tuple) -> np.ndarray:
            m = self.m[p] / (1 - self.b1**self.count)
            v = self.v[p] / (1 - self.b2**self.count)
            return self.rate(t) * (m / (np.sqrt(v) + self.eps) + self.decay * x[p])

        return {p: np.where(moves[p], x[p] - move(p), x[p]) for p in x}


def sketch(drawn: np.ndarray, r: int) -> np.ndarray:
    """``S = (r/k) sum_{j in I} e_j e_j^T``."""
    return (r / len(drawn)) * np.sum([np.outer(np.eye(r)[j], np.eye(r)[j]) for j in drawn], axis=0)


def loss_and_gradients(
    base: Base,
    x: Parameters,
    s: Mapping[str, float],
    sketches: dict[tuple[str, int], np.ndarray],
    batch: Minibatch,
) -> tuple[float, Parameters]:
    """Weighted mean cross-entropy at ``W0 + s B S A``; ``grad_B = s G A^T S`` and ``grad_A = s S B^T G``."""
    h = np.stack([base.embed[t].mean(0) if len(t) else np.zeros(base.embed.shape[1]) for t in batch.texts])
    inputs, outputs, effective = {}, {}, {}
    for at, w in base.w.items():
        effective[at] = w + s[at[0]] * x[(*at, "B")] @ sketches[at] @ x[(*at, "A")]
        inputs[at] = h
        h = outputs[at] = np.tanh(h @ effective[at].T)

    logits = h @ x["head", "kernel"] + x["head", "bias"]
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    share = batch.weights / max(batch.weights.sum(), 1.0)
    loss = -(share * logp[np.arange(len(logp)), batch.labels]).sum()

    g = share[:, None] * (np.exp(logp) - np.eye(logits.shape[1])[batch.labels])
    grads: Parameters = {("head", "kernel"): h.T @ g, ("head", "bias"): g.sum(0)}
    g = g @ x["head", "kernel"].T
    for at in reversed(base.w):
        g = g * (1 - outputs[at] ** 2)
        G = g.T @ inputs[at]
        grads[(*at, "B")] = s[at[0]] * G @ x[(*at, "A")].T @ sketches[at]
        grads[(*at, "A")] = s[at[0]] * sketches[at] @ x[(*at, "B")].T @ G
        g = g @ effective[at]
    return loss, grads


def moving(x: Parameters, components: dict[tuple[str, int], np.ndarray], r: Mapping[str, int]) -> Parameters:
    """Which entries may move: columns of B and rows of A at ``components``, and the head."""
    moves = {p: np.ones_like(v, dtype=bool) for p, v in x.items()}
    for at, chosen in components.items():
        held = np.isin(np.arange(r[at[0]]), chosen)
        moves[(*at, "B")] &= held[None, :]
        moves[(*at, "A")] &= held[:, None]
    return moves


def run_round(
    base: Base,
    x: Parameters,
    participants: Sequence[Participant],
    *,
    r: Mapping[str, int],
    s: Mapping[str, float],
    optimizer: Callable[[], Sgd | AdamW],
    server: Sgd | AdamW,
    first_step: int = 0,
) -> tuple[Parameters, list[np.ndarray]]:
    """New global parameters, and each participant's loss before each step. ``server`` keeps its own state.

    ``r`` and ``s`` are rank and scale of each module.
    """
    mean = {p: np.zeros_like(v) for p, v in x.items()}
    losses = []
    for client in participants:
        sketches = {at: sketch(drawn, r[at[0]]) for at, drawn in client.drawn.items()}
        moves, local, mine = moving(x, client.drawn, r), dict(x), optimizer()
        before_steps = []
        for h, batch in enumerate(client.minibatches):
            loss, grads = loss_and_gradients(base, local, s, sketches, batch)
            local = mine.step(local, grads, moves, first_step + h)
            before_steps.append(loss)
        losses.append(np.array(before_steps))
        for p in x:
            mean[p] += client.weight * (local[p] - x[p])
    anyone = {at: np.concatenate([c.drawn[at] for c in participants]) for at in base.w}
    gradient = {p: -v for p, v in mean.items()}
    new = server.step(x, gradient, moving(x, anyone, r), 0)
    return new, losses
