"""A model where all of the theory has a closed form: ``loss_i = sum_n |W_in + Z_n - s A_n^T S_n B_n|^2 / 2``.

In the package's orientation: a is ``(N, r, i)``, b is ``(N, r, o)``, a kernel ``(i, o)``; ``Z`` is a minibatch's noise
with entries of standard deviation ``TAU``. Every layer has a sketch of its own. Truths are means over all k-subsets of
the rank components; layers are independent, so they add up.
"""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np

from fslora_jax.methods.fslora import in_place
from fslora_jax.sketch import Sketch, draw
from fslora_jax.types import Pair

N, R, I, O, S, TAU = 6, 4, 5, 3, 0.7, 0.6
KS = np.array([2, 3, 4])
RNG = np.random.default_rng(0)
TARGETS = jnp.float32(RNG.normal(size=(len(KS), N, I, O)))
AT = Pair(jnp.float32(RNG.normal(size=(N, R, I)) / 2), jnp.float32(RNG.normal(size=(N, R, O)) / 2))


def loss(pair: Pair, diagonal, target):
    """Of one client under one sketch, given as the diagonals ``(N, r)``."""
    return jnp.square(S * jnp.einsum("nri,nr,nro->nio", pair.a, diagonal, pair.b) - target).sum() / 2


def diagonals(key, k):
    """The package's draws."""
    return in_place(Sketch(*jax.vmap(lambda key: draw(key, R, k, R))(jax.random.split(key, N))))


def noise(key):
    """A minibatch."""
    return TAU * jax.random.normal(key, (N, I, O))


def subsets(k: int) -> np.ndarray:
    """All sketches of rank k, one for all layers at a time."""
    each = [R / k * np.isin(np.arange(R), chosen) for chosen in combinations(range(R), k)]
    return np.repeat(np.array(each, np.float32)[:, None], N, 1)


def expected(pair: Pair, k: int, target):
    """A client's part of f_S without the noise's constant."""
    return jax.vmap(loss, (None, 0, None))(pair, jnp.array(subsets(k)), target).mean()


def flat(pair: Pair) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in pair])


def slopes(pair: Pair, k: int, target) -> np.ndarray:
    """The gradients under all sketches."""
    each = jax.vmap(jax.grad(loss), (None, 0, None))(pair, jnp.array(subsets(k)), target)
    return np.concatenate([np.reshape(x, (len(x), -1)) for x in each], axis=1)


def variance(pair: Pair, k: int, target) -> float:
    """The sketch's, of a gradient: components of different layers are in no inner product, so layers add up."""
    return float(slopes(pair, k, target).var(0).sum())


def truths(pair: Pair = AT, ks=KS, targets=TARGETS) -> dict[str, float]:
    """Every quantity of ``moments``, by enumeration and closed forms."""
    clients = [(k, target) for k, target in zip(ks.tolist(), targets, strict=True)]
    constant = TAU**2 * N * I * O / 2
    squares = float(O * jnp.square(pair.a).sum() + I * jnp.square(pair.b).sum())
    means = np.array([slopes(pair, *client).mean(0) for client in clients])
    plain = np.mean([loss(pair, jnp.ones((N, R)), target) for _, target in clients])
    sketched = np.mean([expected(pair, *client) for client in clients])
    return {
        "f": plain + constant,
        "f_S": sketched + constant,
        "f_S - f": sketched - plain,
        "grad_f_S^2": np.square(means.mean(0)).sum(),
        "sigma_s^2": np.mean([variance(pair, *client) for client in clients]),
        "sigma_g^2": np.mean([TAU**2 * S**2 * R / k * squares for k, _ in clients]),
        "sigma_h^2": means.var(0).sum(),
    }
