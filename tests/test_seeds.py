"""One seed decides everything, and reaches every purpose of randomness."""

import sys
from pathlib import Path

import pytest
import runs

from fslora_jax import random as sources
from fslora_jax.federation import round
from fslora_jax.random import Purpose

USED = (
    *("INIT", "SPLIT", "PARTITION", "HELD_OUT", "COHORT", "SKETCH", "BATCH", "DROPOUT", "RESOURCES"),
    "PARTICIPATION",
)

# Shapes that no draw can change: one program serves every run here.
FIXED = {
    "data__packing": False,
    "data__row_length": 12,
    "federation__layout": "masked",
    "partition__held_out": 0.2,
    "evaluate_every": 4,
    "federation__ranks": "random",
    "federation__min_local_steps": 1,
    "federation__failure_rate": 0.2,
}


@pytest.fixture(scope="module")
def quick(world, no_figures, programs_kept):
    return lambda run, **changes: runs.train(world, run, **FIXED, **changes)


@pytest.fixture(autouse=True)
def keys_made_anew():
    """The program that makes them is kept in a process, with whatever source of keys it was traced with."""
    round._maker.cache_clear()
    yield
    round._maker.cache_clear()


@pytest.fixture(scope="module")
def first(quick, world) -> Path:
    return quick(world.folder / "seed-0")


def outcome(run: Path) -> tuple[bytes, bytes]:
    return (run / "metrics.jsonl").read_bytes(), (run / "adapter" / "adapter_model.safetensors").read_bytes()


def replace_everywhere(patch: pytest.MonkeyPatch, name: str, function) -> None:
    for module in [m for n, m in sys.modules.items() if n.startswith("fslora_jax") and hasattr(m, name)]:
        patch.setattr(module, name, function)


def test_the_same_seed_gives_the_same_bytes(quick, first, tmp_path):
    assert outcome(quick(tmp_path / "run")) == outcome(first)


@pytest.mark.parametrize("purpose", USED)
def test_another_seed_for_one_purpose_alone_changes_the_run(quick, first, tmp_path, monkeypatch, purpose):
    chosen, changed = Purpose[purpose], []

    def reseeded(source):
        def draw(seed, purpose, *path):
            changed.extend([purpose] if purpose == chosen else [])
            return source(seed + 1 if purpose == chosen else seed, purpose, *path)

        return draw

    for name in ("host_rng", "device_key"):
        replace_everywhere(monkeypatch, name, reseeded(getattr(sources, name)))
    metrics, adapter = outcome(quick(tmp_path / "run"))
    assert changed
    assert metrics != outcome(first)[0]
    assert adapter != outcome(first)[1]


def test_the_configs_seed_reaches_every_purpose_and_no_other_seed_does(quick, first, tmp_path, monkeypatch):
    asked = set()

    def recording(source):
        def draw(seed, purpose, *path):
            asked.add((int(seed), Purpose(purpose).name))
            return source(seed, purpose, *path)

        return draw

    for name in ("host_rng", "device_key"):
        replace_everywhere(monkeypatch, name, recording(getattr(sources, name)))
    run = quick(tmp_path / "run", seed=7)
    # A shape is asked with a fixed key; keys of the network and the server are made for methods that use them.
    assert asked - {(0, "INIT")} == {(7, name) for name in (*USED, "NETWORK", "SERVER")}
    assert outcome(run)[0] != outcome(first)[0]
