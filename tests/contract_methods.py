"""Every method on the toy, beside its oracle: the table that `test_methods_contract` and `on_devices` go through."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle_factors
import oracle_methods as by_hand
import oracle_products
import toy
from compare import client_batches, client_key, close, flat, oracle_base, oracle_minibatches

from fslora_jax.federation.cohort import Layout, plan_layout
from fslora_jax.federation.round import constants_of
from fslora_jax.lora import product
from fslora_jax.methods import METHODS, Client, Method, Server

R = 4
SPEC = toy.SPEC._replace(r=R)
SHARES = np.array([1.0, 2, 3, 4, 5, 6, 7])
MIXED = toy.make_population(np.array([1, 2, 4, 2, 1, 1, 2]), SHARES)
FULL = toy.make_population(np.full(7, R), SHARES)


class Case(NamedTuple):
    """A method with options; its oracle, and the oracle's options; what it sends beside what it trained.

    ``svd``: factors are known only up to sign, so that products alone can be compared.
    """

    name: str
    hand: Callable[..., by_hand.Round]
    options: Mapping[str, Any] = {}
    known: Mapping[str, Any] = {}
    svd: bool = False


HETLORA = {"decay": 0.7, "tail_penalty": 0.1, "least_rank": 1}
CASES = {
    "fslora": Case("fslora", oracle_factors.fslora),
    "fedit": Case("fedit", oracle_factors.fedit),
    "ffa_lora": Case("ffa_lora", oracle_factors.ffa_lora),
    "rolora": Case("rolora", oracle_factors.rolora),
    "fedsa_lora": Case("fedsa_lora", oracle_factors.fedsa_lora),
    "zero_padding": Case("zero_padding", oracle_factors.zero_padding),
    "hetlora": Case("hetlora", oracle_factors.hetlora, HETLORA, HETLORA),
    "flexlora": Case("flexlora", oracle_products.flexlora, svd=True),
    "flora": Case("flora", oracle_products.flora),
    "fedex_lora": Case("fedex_lora", oracle_products.fedex_lora),
    "fed_sb": Case("fed_sb", oracle_products.fed_sb),
    "lora_fair": Case("lora_fair", oracle_products.lora_fair, {"penalty": 0.1}, {"penalty": 0.1}),
    "hafl": Case("hafl", oracle_factors.hafl, known={"truncate": False}),
    "hafl of truncation": Case("hafl", oracle_factors.hafl, {"freeze": False}, {"truncate": True}),
    "raflora": Case("raflora", oracle_products.raflora, svd=True),
    "raflora of factors": Case("raflora", oracle_factors.raflora_of_factors, {"factors": True}),
    "fed_plora": Case("fed_plora", oracle_factors.fed_plora),
    "xgblora": Case(
        "xgblora", oracle_products.xgblora, {"ridge": 0.1, "step": 0.8}, {"ridge": 0.1, "step": 0.8}
    ),
    "rac_lora": Case("rac_lora", oracle_products.rac_lora, known={"sketch": "B"}),
    "rac_lora drawing A": Case("rac_lora", oracle_products.rac_lora, {"sketch": "a"}, {"sketch": "A"}),
}
"""A new method is a new row here, and a function in `oracle_factors` or `oracle_products`."""


class Way(NamedTuple):
    """A layout and an optimiser to play with."""

    tiered: bool
    chunks: int
    optimizer: str


WAYS = {"masked": Way(False, 1, "sgd"), "chunks": Way(True, 2, "adamw"), "devices": Way(False, 1, "momentum")}


@cache
def method_of(case: str) -> Method:
    """The same object each time, so that it compiles once."""
    name, _, options, *_ = CASES[case]
    return METHODS[name].make(SPEC, toy.SERVERS["average"][0], **options)


def population_of(case: str) -> Any:
    """Clients of mixed ranks, or all of full rank where the method wants that."""
    return FULL if method_of(case).traits.full_rank else MIXED


def layout_of(case: str, way: str, groups: int = 1) -> Layout:
    tiered = WAYS[way].tiered and not method_of(case).traits.holds_all
    ranks, cohorts = population_of(case).ranks, toy.COHORTS
    return plan_layout(ranks, cohorts, r=R, tiered=tiered, groups=groups, chunks=WAYS[way].chunks)


def replayed(case: str, way: str, mesh: Any = None, **changes: Any) -> toy.Played:
    """Rounds of a method."""
    optimizer = WAYS[way].optimizer
    layout = layout_of(case, way, 1 if mesh is None else mesh.devices.size)
    options = {"population": population_of(case), "layout": layout, "mesh": mesh} | changes
    return toy.play(method_of(case), toy.OPTIMIZERS[optimizer][0], **options)


played = cache(replayed)


class Step(NamedTuple):
    """One round by hand: what the package had before and after it, and the oracle's world and moves."""

    t: int
    before: Server
    after: Server
    world: by_hand.World
    moves: list[by_hand.Parameters]


def rounds_by_hand(
    case: str, found: toy.Played, optimizer: str, cohorts: Sequence[np.ndarray] = toy.COHORTS
) -> Iterator[Step]:
    """The oracle's rounds from the package's first server on; of later ones only what chance gave."""
    method, population, known = method_of(case), population_of(case), dict(CASES[case].known)
    first = found.servers[0]
    world = by_hand.World(oracle_base(), flat(first.weights), fixed_factors(first))
    for t, ids in enumerate(cohorts):
        before, after = found.servers[t : t + 2]
        shares = population.shares[ids] / population.shares[ids].sum()
        clients = [
            by_hand.Asked(
                int(c),
                int(population.ranks[c]),
                share,
                oracle_minibatches(client_batches(population, int(c), t)),
                drawn_by(case, before, int(c)) if case in ("fslora", "fed_plora") else {},
            )
            for c, share in zip(ids, shares, strict=True)
        ]
        if case == "xgblora":
            known["layers"] = np.asarray(before.memory["xgblora"])
        game = by_hand.Game(
            r=R,
            s=SPEC.scales(),
            ranks=population.ranks.tolist(),
            optimizer=toy.OPTIMIZERS[optimizer][1],
            first_step=t * toy.STEPS.local_steps,
            fresh=factors(after) if method.traits.moves_base and case != "fedex_lora" else {},
            options=known,
        )
        world, moves = CASES[case].hand(game, world, clients)
        yield Step(t, before, after, world, moves)


def factors(server: Server) -> by_hand.Parameters:
    return {p: v for p, v in flat(server.weights).items() if p[0] != "head"}


def fixed_factors(server: Server) -> by_hand.Parameters:
    """Of Fed-SB."""
    fixed = server.memory.get("fed_sb", {})
    return {
        at: value
        for m, pair in fixed.items()
        for n in range(toy.LAYERS)
        for at, value in (
            ((m, n, "A"), np.asarray(pair.a[n], np.float64)),
            ((m, n, "B"), np.asarray(pair.b[n], np.float64).T),
        )
    }


@cache
def download_of(case: str) -> Callable[..., Any]:
    return jax.jit(method_of(case).download, static_argnums=3)


def drawn_by(case: str, server: Server, client: int) -> dict[tuple[str, int], np.ndarray]:
    """The components that a client trains by a draw of the package."""
    who = Client(jnp.int32(client), jnp.int32(population_of(case).ranks[client]), jnp.float32(1))
    key = client_key(constants_of(5).keys.sketch, int(server.round), client)
    held = download_of(case)(key, server, who, R)
    return {
        (m, n): np.asarray(held.index[m][n])[np.asarray(held.trains[m].a[n]) > 0]
        for m in toy.TARGETS
        for n in range(toy.LAYERS)
    }


def effective(case: str, server: Server) -> dict[tuple, np.ndarray]:
    """``W0`` with all that the method has put on it, and the head: what is evaluated."""
    weights = method_of(case).adapter(server)
    found = {p: v for p, v in flat(weights).items() if p[0] == "head"}
    for m, pair in weights.adapter.items():
        sums = np.asarray(product(pair, SPEC.scales()[m]), np.float64)
        if m in server.base_delta:
            sums += np.swapaxes(server.base_delta[m], 1, 2)
        found |= {(m, n): oracle_base().w[m, n] + sums[n] for n in range(toy.LAYERS)}
    return found


def effective_by_hand(world: by_hand.World) -> dict[tuple, np.ndarray]:
    """The same of the oracle; ``world.memory`` has Fed-SB's factors."""
    found = {p: v for p, v in world.x.items() if p[0] == "head"}
    for at, w in world.base.w.items():
        a, b = world.x[(*at, "A")], world.x[(*at, "B")]
        if (*at, "B") in world.memory:
            a, b = a @ world.memory[(*at, "A")], world.memory[(*at, "B")]
        found[at] = w + SPEC.scales()[at[0]] * b @ a
    return found


def check_with_hand(
    case: str, found: toy.Played, optimizer: str, cohorts: Sequence[np.ndarray] = toy.COHORTS
) -> None:
    """Every round: what is evaluated, and the factors where they are unique."""
    for step in rounds_by_hand(case, found, optimizer, cohorts):
        svd = CASES[case].svd
        close(effective(case, step.after), effective_by_hand(step.world), 1e-4 if svd else 2e-5)
        if not svd:
            close(flat(step.after.weights), step.world.x)
