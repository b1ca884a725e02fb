"""The compiled round of a real encoder: every frozen weight meets the whole cohort once, uncopied and without gradient.

Sizes are chosen so that no two arrays share a shape by chance. Each check has a program that it must refuse.
"""

from collections.abc import Callable
from functools import cache, partial

import hlo
import jax
import jax.numpy as jnp
import optax
from hlo import Product

from fslora_jax.federation import round as round_module
from fslora_jax.federation.cohort import Layout
from fslora_jax.federation.local import ClientOptimizer, Rates, train
from fslora_jax.federation.round import Cohort, make_round
from fslora_jax.methods import Client, Spec, fedit, fslora
from fslora_jax.models import Model, build_model
from fslora_jax.models.kernels import ROOM, laid_out
from fslora_jax.models.stack import REMAT
from fslora_jax.targets import select_targets
from fslora_jax.types import Batch

C, H, B, L, E, N, D, F, V, R = 5, 2, 3, 11, 4, 3, 34, 58, 47, 8
CONFIG = {
    "model_type": "bert",
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": N,
    "num_attention_heads": 2,
    "intermediate_size": F,
    "max_position_embeddings": 19,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "hidden_act": "gelu",
}
HEAD = D // CONFIG["num_attention_heads"]
KERNELS = {(D, D), (D, F), (F, D)}
ROWS = C * B * L

# Six products forward and, for the gradient at the activations, six backward; query, key, value and output are (D, D).
EXPECTED = {
    Product((ROWS, D), (D, D), 0): 4,
    Product((ROWS, D), (D, F), 0): 1,
    Product((ROWS, F), (F, D), 0): 1,
    Product((ROWS, D), (D, D), 1): 4,
    Product((ROWS, F), (D, F), 1): 1,
    Product((ROWS, D), (F, D), 1): 1,
}


@cache
def model(wide: int = F, remat: str = "frozen", pooling: str = "mean") -> Model:
    config = CONFIG | {"intermediate_size": wide}
    return build_model(config, num_labels=3, pooling=pooling, lora_dropout=0.1, remat=remat)


def compiled(
    score: Callable | None = None,
    *,
    method=fedit,
    caps: tuple[int, ...] = (R,) * C,
    dropout: bool = False,
    stack: int = 0,
    wide: int = F,
    remat: str = "frozen",
    pooling: str = "mean",
    ready: Callable = lambda base: base,
) -> str:
    """The optimised program of a round; ``stack`` gives the base a leading axis. Nothing is run."""
    made = model(wide, remat, pooling)
    targets = select_targets("targets", made.modules, "{layer}.", ["query", "value", "output.dense"])
    federated = method(Spec(targets, R, 1.0), optax.sgd(1.0))
    one_round = make_round(
        score or made.score,
        federated,
        ClientOptimizer(optax.trace(0.9), lambda step: jnp.float32(0.1)),
        Layout(caps),
        local_steps=H,
        dropout=dropout,
    )

    def arguments():
        key = jax.random.key(0)
        base = made.init_base(key)
        if stack:
            base = jax.tree.map(lambda x: jnp.stack([x] * stack), base)
        rows, examples = jnp.ones((C, H, B, L), jnp.int32), jnp.ones((C, H, E))
        batch = Batch(rows, rows, rows, rows, examples.astype(jnp.int32), examples, rows[..., :0])
        clients = Client(jnp.arange(C), jnp.array(caps), jnp.full(C, 1 / C))
        cohort = jax.tree.map(lambda x: x[None, None], Cohort(clients, batch))
        return (
            base,
            federated.init(key, made.init_head(key)),
            round_module.Constants(round_module.Keys(key, key, key, key), Rates()),
            cohort,
        )

    shapes = jax.eval_shape(arguments)
    return jax.jit(one_round).lower(jax.eval_shape(ready, shapes[0]), *shapes[1:]).compile().as_text()


def check(text: str) -> None:
    """Every frozen weight meets the whole cohort once, no client has a copy of one, and none has a gradient."""
    assert hlo.frozen_products(text, KERNELS) == EXPECTED
    assert hlo.copies(text, {*KERNELS, (V, D)}, N) == set()
    assert hlo.kernel_gradients(text, KERNELS) == []


def test_frozen_weights_in_tiers_with_dropout():
    check(compiled(method=fslora, caps=(8, 4, 4, 2, 2), dropout=True))


def test_frozen_weights_in_the_masked_layout():
    check(compiled())


def test_frozen_weights_laid_out_for_a_cpu():
    """Products with the transposes are as many; 512 columns of four bytes have room behind them."""
    wide, roomy = 512, 512 + ROOM
    text = compiled(method=fslora, caps=(8, 4, 4, 2, 2), dropout=True, wide=wide, ready=laid_out)
    assert hlo.frozen_products(text, {(D, D), (D, roomy), (wide, D)}) == {
        Product((ROWS, D), (D, D), 0): 8,
        Product((ROWS, D), (D, roomy), 0): 2,
        Product((ROWS, wide), (wide, D), 0): 2,
    }


def test_layers_with_arrays_of_their_own():
    """No kernel is copied in a loop, and no gradient goes below the first layer's query, key and value."""
    caps = (8, 4, 4, 2, 2)
    text = compiled(method=fslora, caps=caps, remat="none", ready=partial(laid_out, remat="none"))
    assert hlo.frozen_products(text, KERNELS) == {
        Product((ROWS, D), (D, D), 0): 8 * N - 3,
        Product((ROWS, D), (D, F), 0): 2 * N,
        Product((ROWS, F), (F, D), 0): 2 * N,
    }
    assert cut_in_loops(text) == set()
    logarithms = [i.shapes[0][-2:] for i in hlo.instructions(text) if i.kind == "log"]
    assert logarithms.count((L, L)) == 1, "who sees whom is worked out more than once"
    exponentials = [i.shapes[0][-2:] for i in hlo.instructions(text) if i.kind == "exponential"]
    assert exponentials.count((L, L)) == N, "a softmax is computed more than once"
    factors = {shape[-2:] for _, *operands in hlo.dots(text) for shape in operands}
    assert (L, HEAD) in factors, "products of attention have another shape than this test knows"
    assert (HEAD, L) not in factors, "queries, keys, values or their gradients are copied transposed"


def test_the_last_layer_computes_only_what_is_asked():
    """A classifier on first tokens: keys and values of all, and all else of the layer for a place for each example."""
    asked, pooled = C * B * E, C * E
    text = compiled(remat="none", pooling="native", ready=partial(laid_out, remat="none"))
    assert hlo.frozen_products(text, KERNELS) == {
        Product((ROWS, D), (D, D), 0): 8 * (N - 1) - 3 + 4,
        Product((ROWS, D), (D, F), 0): 2 * (N - 1),
        Product((ROWS, F), (F, D), 0): 2 * (N - 1),
        Product((asked, D), (D, D), 0): 4,
        Product((asked, D), (D, F), 0): 2,
        Product((asked, F), (F, D), 0): 2,
        Product((pooled, D), (D, D), 0): 1,
        Product((pooled, D), (D, D), 1): 1,
    }


def test_the_check_sees_kernels_cut_in_a_loop():
    assert cut_in_loops(compiled(method=fslora, caps=(8, 4, 4, 2, 2), ready=laid_out)) == KERNELS


def cut_in_loops(text: str) -> set[hlo.Shape]:
    """Kernels that a loop cuts out of an array of all layers."""
    cut = (shape for i in hlo.instructions(text) if i.kind == "dynamic-slice" for shape in i.shapes)
    return {shape[-2:] for shape in cut} & KERNELS


def test_the_checks_see_a_base_stacked_over_clients():
    def score(base, tiers, batch, keys):
        def alone(base, tier, batch):
            tier, batch = jax.tree.map(lambda x: x[None], (tier, batch))
            return jax.tree.map(lambda x: x[0], model().score(base, [tier], batch))

        return jax.vmap(alone)(base, tiers[0], batch)

    text = compiled(score, stack=C)
    assert hlo.frozen_products(text, KERNELS) != EXPECTED
    assert (C, D, F) in hlo.copies(text, KERNELS, N)


def test_the_checks_see_a_cohort_in_two_parts():
    def score(base, tiers, batch, keys):
        def part(clients: slice):
            tier, mine = jax.tree.map(lambda x: x[clients], (tiers[0], batch))
            return model().score(base, [tier], mine)

        return jax.tree.map(lambda *x: jnp.concatenate(x), part(slice(2)), part(slice(2, C)))

    found = hlo.frozen_products(compiled(score), KERNELS)
    assert found[Product((2 * B * L, D), (D, F), 0)] == 1
    assert found[Product((ROWS, D), (D, F), 0)] == 0


def test_the_checks_see_a_second_forward_pass(monkeypatch):
    monkeypatch.setitem(REMAT, "frozen", REMAT["full"])
    found = hlo.frozen_products(compiled(), KERNELS)
    assert found[Product((ROWS, D), (D, F), 0)] == 2


def test_the_checks_see_a_gradient_of_the_base(monkeypatch):
    def wasteful(score, optimizer, base, tiers, batches, first_step, keys, **options):
        after, losses = train(score, optimizer, base, tiers, batches, first_step, keys, **options)
        batch = jax.tree.map(lambda x: x[:, 0], batches)
        gradient = jax.grad(lambda base: score(base, after, batch, keys).loss.sum())(base)
        return after, losses + sum(abs(g).sum() for g in jax.tree.leaves(gradient))

    monkeypatch.setattr(round_module, "train", wasteful)
    assert len(hlo.kernel_gradients(compiled(), KERNELS)) >= 6
