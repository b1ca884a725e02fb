"""Ranks of clients: in range, by the seed, and distributed as said."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fslora_jax.config import Config, DataConfig, FederationConfig, ModelConfig
from fslora_jax.federation.resources import client_ranks, draw_ranks

DISTRIBUTIONS = ("uniform", "normal", "heavy_tail")


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 40), st.integers(0, 99))
def test_ranks_are_in_their_range(name, n, least, width, seed):
    ranks = draw_ranks(name, n, least, least + width, np.random.default_rng(seed))
    assert ranks.shape == (n,)
    assert least <= ranks.min() <= ranks.max() <= least + width


def test_ranks_are_distributed_as_said():
    by_name = {name: draw_ranks(name, 20_000, 1, 32, np.random.default_rng(0)) for name in DISTRIBUTIONS}
    assert by_name["uniform"].mean() == pytest.approx(16.5, abs=0.2)
    assert by_name["uniform"].std() == pytest.approx(31 / 12**0.5, abs=0.2)
    assert by_name["normal"].mean() == pytest.approx(16.5, abs=0.2)
    assert by_name["normal"].std() == pytest.approx(31 / 6, abs=0.2)
    assert np.median(by_name["heavy_tail"]) <= 2
    assert by_name["heavy_tail"].max() == 32


@pytest.mark.parametrize("ranks", ["random", *DISTRIBUTIONS])
def test_draws_are_a_function_of_the_seed(ranks):
    federation = FederationConfig(num_clients=50, ranks=ranks, sketching_ratios=(0.25, 0.5))
    made = Config(model=ModelConfig(name="m"), data=DataConfig(name="d"), federation=federation)
    first, again, other = (client_ranks(made.model_copy(update={"seed": s})).tolist() for s in (0, 0, 1))
    assert first == again != other
    assert ranks != "random" or set(first) == {16, 32}
