"""The contract of every method: its oracle, one program, stable state, any layout and order, frozen bits, bytes.

`oracle_methods` computes each method by hand. The masked round runs with SGD and the tiered one, in chunks, with AdamW
and decay, both against the oracle; `on_devices` does the same on eight devices with momentum.
"""

import jax
import numpy as np
import pytest
import toy
from compare import close, flat
from contract_methods import (
    CASES,
    WAYS,
    effective,
    effective_by_hand,
    layout_of,
    method_of,
    played,
    population_of,
    replayed,
    rounds_by_hand,
)

from fslora_jax.methods import METHODS

every_case = pytest.mark.parametrize("case", CASES)


def test_every_method_has_its_row():
    assert {case.name for case in CASES.values()} == set(METHODS)


@every_case
@pytest.mark.parametrize("way", ["masked", "chunks"])
def test_a_round_is_the_equations(case, way):
    found = played(case, way)
    for step in rounds_by_hand(case, found, WAYS[way].optimizer):
        close(effective(case, step.after), effective_by_hand(step.world), 1e-4 if CASES[case].svd else 2e-5)
        if not CASES[case].svd:
            close(flat(step.after.weights), step.world.x)
