"""The power of the suite: the comparison with the oracle must see each of these faults."""

import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
import toy
from compare import check_with_oracle, played

from fslora_jax.federation import local
from fslora_jax.methods import Combined, Server, fslora, parts
from fslora_jax.sketch import Sketch, draw, gather
from fslora_jax.types import Pair

# --- Broken copies: the comparison with the oracle must see each ------------------------------------------------


def without_gain(monkeypatch) -> None:
    def broken(*args) -> Sketch:
        index, gain = draw(*args)
        return Sketch(index, (gain > 0).astype(jnp.float32))

    monkeypatch.setattr(importlib.import_module("fslora_jax.methods.fslora"), "draw", broken)


def two_sketches(monkeypatch) -> None:
    def broken(pair: Pair, index) -> Pair:
        return Pair(gather(pair, index).a, gather(pair, (index + 1) % toy.R).b)

    monkeypatch.setattr(parts, "gather", broken)


def over_contributors(monkeypatch) -> None:
    honest = parts.weighted_sum

    def broken(ranks, payloads, weights) -> Combined:
        combined = honest(ranks, payloads, weights)
        return combined._replace(delta=parts.per_contributor(combined))

    monkeypatch.setattr(parts, "weighted_sum", broken)


def decay_everywhere(monkeypatch) -> None:
    monkeypatch.setattr(local, "masked", lambda updates, trains: updates)


def server_moves_everything(monkeypatch) -> None:
    honest = parts.take_step

    def broken(optimizer, server, delta, mass) -> Server:
        return honest(optimizer, server, delta, jax.tree.map(jnp.ones_like, mass))

    monkeypatch.setattr(parts, "take_step", broken)


@pytest.mark.parametrize(
    ("broken", "optimizer", "server", "layout"),
    [
        (without_gain, "sgd", "average", "masked"),
        (two_sketches, "sgd", "average", "masked"),
        (over_contributors, "sgd", "average", "masked"),
        (decay_everywhere, "adamw", "average", "masked"),
        (server_moves_everything, "sgd", "momentum", "tiered"),
    ],
)
def test_the_oracle_sees_a_broken_round(
    monkeypatch, broken: Callable, optimizer: str, server: str, layout: str
):
    check_with_oracle(played(optimizer, server, layout), optimizer, server)
    broken(monkeypatch)
    method = fslora(toy.SPEC, toy.SERVERS[server][0])
    found = toy.play(method, toy.OPTIMIZERS[optimizer][0], tiered=layout == "tiered")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_with_oracle(found, optimizer, server)
