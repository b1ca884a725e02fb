"""All engines of the benchmark do the same round."""

import json
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from fslora_jax.adapters.write import named_tensors
from fslora_jax.bench import command, limits, worker
from fslora_jax.bench.compare import compare, record_of
from fslora_jax.bench.engines import ENGINES, engine_round
from fslora_jax.bench.torch_loop import wrapped_model
from fslora_jax.bench.work import fill_of, parts_of, work_of
from fslora_jax.config import make_config
from fslora_jax.errors import UserError
from fslora_jax.federation.setup import initial_server, set_up

PLAIN = {"lora__lora_dropout": 0.0, "federation__clients_per_round": None, "server_optimizer": {}}
"""Nothing random but the sketches, and everybody takes part."""

UNEVEN = {
    "seed": 1,
    "federation__failure_rate": 0.4,
    "federation__min_local_steps": 1,
    "federation__client_weights": "examples",
}
"""Some clients fail, some do fewer steps, and they weigh differently."""

FACTS = {
    "work": {"tokens": 10, "clients": 2, "examples": 3, "flops": 60e12},
    "fill": 1.0,
    "device": "cpu",
    "peak_flops_per_second": None,
}
"""What an engine's process says of the round."""

FULL = {"federation__sketching_ratios": [1.0]}


def prepare(world, **changes):
    config = make_config(runs.settings(world, **(PLAIN | changes)), "test")
    return config, set_up(config)


@pytest.fixture(scope="module")
def tiered(world):
    config, federation = prepare(world, federation__cohort_chunks=2)
    return config, federation, ENGINES["tiered"](config, federation)().weights


drjax_warns = pytest.mark.filterwarnings(
    "ignore:jax.interpreters.pxla.thread_resources:DeprecationWarning"  # drjax 0.2's
)


@drjax_warns
@pytest.mark.parametrize("engine", ["masked", "unchunked", "chunked", "loop", "drjax"])
def test_engines_in_jax_do_the_same_round(tiered, engine):
    config, federation, expected = tiered
    found = ENGINES[engine](config, federation)().weights
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@drjax_warns
@pytest.mark.parametrize(
    ("engines", "changes"),
    [
        (["masked", "chunked", "loop", "drjax"], {"federation__rows_per_pass": 1}),
        (["loop", "drjax"], {"federation__method": "raflora"}),
        (["loop"], {"federation__method": "fed_sb", "data__packing": False, **FULL}),
        (
            ["loop", "drjax"],
            {
                "federation__method": "xgblora",
                "federation__method_options": {"ridge": 0.1},
                **FULL,
            },
        ),
        (
            ["loop", "drjax"],
            {
                "lora__lora_dropout": 0.3,
                "federation__method_options": {"redraw": True},
                "federation__wrappers": {"over_the_air": {}},
            },
        ),
    ],
    ids=str,
)
def test_engines_in_jax_do_what_the_config_says(world, engines, changes):
    """Weights, failures, dropout; what a method announces, changes in a step, trains instead, merges, penalises."""
    config, federation = prepare(world, **(UNEVEN | changes))
    expected = ENGINES["tiered"](config, federation)()
    for engine in engines:
        found = ENGINES[engine](config, federation)()
        both = found.weights.adapter, expected.weights.adapter
        assert both[0].keys() == both[1].keys()
        for module in both[0]:  # as products: an SVD turns factors
            a, b = (jnp.einsum("nro,nri->noi", of[module].b, of[module].a) for of in both)
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=f"{engine} {module}")
        jax.tree.map(
            partial(np.testing.assert_allclose, atol=1e-5), found.weights.head, expected.weights.head
        )


def test_the_parts_of_a_round_are_uneven(world):
    """What `UNEVEN` shall bring to the tests."""
    _, federation = prepare(world, **UNEVEN)
    parts = list(parts_of(federation))
    assert len(parts) < 5
    assert len({part.weight for part in parts}) > 1
    assert sum(part.weight for part in parts) == pytest.approx(1)
    assert {(part.examples >= 0).all() for part in parts} == {True, False}


def changes_under(world, engine, **changes):
    """What round 0 changes, in an engine in torch and in this package, at ratio 1, where every client draws all."""
    config, federation = prepare(world, federation__sketching_ratios=[1.0], **changes)
    before = initial_server(config, federation).weights
    after = ENGINES["tiered"](config, federation)().weights
    change = jax.device_get(jax.tree.map(lambda a, b: a - b, after, before))
    expected = dict(named_tensors(change.adapter, change.head, federation.task.model.naming))
    changed: Any = ENGINES[engine](config, federation)()
    found = {name: value.numpy() for name, value in changed.items()}
    assert set(found) == set(expected)
    return found, expected


@pytest.mark.parametrize(
    ("engine", "optimizer", "rate"), [("torch", "sgd", 1.0), ("torch-padded", "adamw", 0.02)]
)
def test_torch_does_the_same_round_where_nothing_is_random(world, engine, optimizer, rate):
    client = {"name": optimizer, "learning_rate": rate, "head_learning_rate": 0.1, "eps": 1e-3}
    found, expected = changes_under(world, engine, client_optimizer=client)
    for name, value in expected.items():
        largest = abs(value).max()
        assert largest > 1e-4
        np.testing.assert_allclose(found[name], value, atol=2e-3 * largest, err_msg=name)


def test_torch_does_the_same_uneven_round_with_clipping_and_a_schedule(world):
    """A schedule over one round of two steps, so that the second is half as long, with gradients above the norm."""
    client = {
        "name": "sgd",
        "learning_rate": 1.0,
        "momentum": 0.5,
        "max_grad_norm": 0.3,
        "schedule": "linear",
    }
    changes = UNEVEN | {"client_optimizer": client, "federation__num_rounds": 1}
    found, expected = changes_under(world, "torch", **changes)
    for name, value in expected.items():
        largest = abs(value).max()
        assert largest > 1e-4
        np.testing.assert_allclose(found[name], value, atol=2e-3 * largest, err_msg=name)


def test_torch_drops_inputs_of_adapters_alone(world):
    config, federation = prepare(world, lora__lora_dropout=0.3)
    model = wrapped_model(config, federation, "cpu")
    found = {name: m.p for name, m in model.named_modules() if hasattr(m, "p") and m.training}
    assert set(found.values()) == {0.3}
    assert all("lora_dropout" in name for name in found)
    assert len(found) == 2 * 2 * 2  # modules, layers, ranks


def test_torch_under_autocast_does_the_same_round_in_bfloat16(world):
    """As far as bfloat16 goes: torch also narrows what is between products, so single values differ by more."""
    client = {"name": "sgd", "learning_rate": 0.1, "head_learning_rate": 0.1}
    exact, _ = changes_under(world, "torch", client_optimizer=client)
    found, expected = changes_under(world, "torch", client_optimizer=client, model__products="bfloat16")
    exact, found, expected = (
        np.concatenate([values[name].ravel() for name in sorted(expected)])
        for values in (exact, found, expected)
    )
    size = np.linalg.norm(exact)
    assert 1e-3 * size < np.linalg.norm(found - exact) < 0.1 * size
    assert np.linalg.norm(found - expected) < 0.1 * size


def test_work_counts_real_tokens_and_the_models_products(world):
    config, federation = prepare(world)
    work, population = work_of(federation), federation.task.population
    assert work.clients == 5
    assert work.examples == 5 * 2 * 4
    assert work.examples < work.tokens < work.examples * config.data.max_length
    d, wide, layers = 16, 24, 2
    frozen = 2 * 2 * (4 * d * d + 2 * d * wide) * layers * work.tokens
    assert frozen < work.flops < 2 * frozen
    assert len(population.ranks) == 5


def test_work_leaves_out_what_is_not_done(world):
    _, federation = prepare(world, **UNEVEN)
    work, parts, store = work_of(federation), list(parts_of(federation)), federation.task.population.store
    done = np.concatenate([part.examples[part.examples >= 0] for part in parts])
    assert work[:3] == (len(parts), len(done), store.lengths_of(done).sum())
    assert 0 < work.flops < work_of(prepare(world, seed=UNEVEN["seed"])[1]).flops


def test_the_fill_is_of_all_rows_without_passes_and_of_those_needed_with_them(world):
    config, federation = prepare(world)
    shape, work = federation.feed.shape, work_of(federation)
    steps = config.federation.local_steps
    assert fill_of(federation) == work.tokens / (5 * steps * shape.rows * shape.row_length)
    _, passes = prepare(world, federation__rows_per_pass=1, federation__cohort_chunks=5)
    assert fill_of(passes) > fill_of(federation)


def test_a_comparison_takes_turns_in_processes_of_their_own(world):
    config, _ = prepare(world)
    told = []
    early, record = compare(config, ["tiered", "loop"], repeats=2, device="cpu", tell=told.append)
    for engine, row in early["engines"].items():
        assert row["seconds"] == record["engines"][engine]["seconds"][:1]
    assert json.loads(json.dumps(record)) == record
    assert set(record["engines"]) == {"tiered", "loop"}
    assert 0.25 < record["fill"] <= 1
    for row in record["engines"].values():
        assert len(row["seconds"]) == 2
        assert row["peak_bytes"] > 1e7
    assert record["engines"]["tiered"]["time_over"]["tiered"] == 1.0
    assert [text.split(": ")[1] for text in told[2:]] == ["tiered", "loop"] * 2


def test_an_engine_starts_when_the_one_before_it_is_ready(world, monkeypatch):
    """Else its seconds of compilation are those of a machine that loads the others."""
    happened = []

    class Recorded:
        def __init__(self, engine):
            self.engine = engine
            happened.append(f"{engine} starts")

        def answer(self):
            return FACTS

        def ask(self, command):
            happened.append(f"{self.engine} {command}")
            return {"seconds": 1.0, "flops_per_second": 1.0, "peak_bytes": 1}

        def close(self):
            happened.append(f"{self.engine} ends")

    monkeypatch.setattr("fslora_jax.bench.compare.engine_worker", lambda engine, *_: Recorded(engine))
    config = make_config(runs.settings(world), "test")
    list(compare(config, ["tiered", "loop"], repeats=1, device=None, tell=lambda _: None))
    assert happened[:5] == ["tiered starts", "tiered run", "loop starts", "loop run", "tiered rate"]
    assert happened[-2:] == ["loop ends", "tiered ends"]


def test_ratios_are_medians_of_pairs_between_all_rows():
    """Not ratios of medians: c takes three times as long as a, though their medians are 4 and 2."""
    facts = dict.fromkeys("abc", FACTS)
    seconds = {"a": [1.0, 2.0, 4.0], "b": [2.0, 6.0, 4.0], "c": [4.0, 2.0, 12.0]}
    rows = record_of(facts, dict.fromkeys("abc", 5.0), seconds, dict.fromkeys("abc", 1), 1.0)
    found = {engine: row["time_over"] for engine, row in rows["engines"].items()}
    assert found["a"] == {"a": 1.0, "b": 0.5, "c": 1 / 3}
    assert found["c"] == {"a": 3.0, "b": 2.0, "c": 1.0}


def test_mfu_is_of_the_data_sheet_where_there_is_one(capsys):
    facts = {"a": FACTS | {"peak_flops_per_second": 200e12}, "b": FACTS}
    seconds, ones = {"a": [1.0, 3.0, 1.0], "b": [2.0, 2.0, 2.0]}, dict.fromkeys("ab", 1)
    record = record_of(facts, dict.fromkeys("ab", 5.0), seconds, ones, 100e12)
    assert {engine: row["mfu"] for engine, row in record["engines"].items()} == {"a": 0.3, "b": None}
    assert record["engines"]["a"]["of_best_matmul"] == 0.6
    command.print_table(record)
    assert "MFU" in (shown := capsys.readouterr().out)
    assert "30%" in shown
    command.print_table(record_of({"b": FACTS}, {"b": 5.0}, {"b": [2.0]}, {"b": 1}, 100e12))
    assert "MFU" not in capsys.readouterr().out


def test_what_devices_promise(world, monkeypatch):
    """All devices of the mesh together; PyTorch's only where it computes on the GPU that JAX sees."""
    device = SimpleNamespace(device_kind="NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(worker.jax, "devices", lambda: [device])
    config = make_config(runs.settings(world, model__dtype="bfloat16"), "test")
    spread: Any = SimpleNamespace(mesh=SimpleNamespace(size=4))
    alone: Any = SimpleNamespace(mesh=None)
    assert worker.peak_of("tiered", config, spread) == 4 * 312e12
    assert worker.peak_of("loop", config, alone) == 312e12
    for there, promised in ((True, 312e12), (False, None)):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert worker.peak_of("torch", config, alone) == promised
    assert worker.peak_of("tiered", make_config(runs.settings(world), "test"), spread) is None
    device.device_kind = "NVIDIA A100-SXM4-80GB MIG 1g.10gb"
    assert worker.peak_of("tiered", config, spread) is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("Unable to initialize backend 'cuda'\nand more"), "Unable to .*'cuda'"),
        (AssertionError(), "it finds none"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, error, words):
    def fails():
        raise error

    monkeypatch.setattr(worker.jax, "devices", fails)
    with pytest.raises(UserError, match=f"--device: JAX cannot use what it names: {words}; choose"):
        worker.devices_here()


def compared(monkeypatch, *argv: object) -> SimpleNamespace:
    """What a command would compare."""
    asked = SimpleNamespace()

    def note(config, engines, **options):
        asked.__dict__.update(config=config, engines=engines, **options)
        yield record_of(
            dict.fromkeys(engines, FACTS),
            *(dict.fromkeys(engines, value) for value in (5.0, [1.0], 1)),
            1e12,
        )

    monkeypatch.setattr(command, "compare", note)
    command.bench_command([str(arg) for arg in argv])
    return asked


def test_a_plain_command_compares_all_that_can_do_the_config(world, monkeypatch, capsys):
    asked = compared(monkeypatch, world.config)
    assert asked.engines == ["tiered", "masked", "chunked", "loop", "drjax"]
    assert "without engine 'torch': server_optimizer: found" in " ".join(capsys.readouterr().err.split())
    plain = runs.write_config(world.folder / "plain.yaml", world, **PLAIN, federation__cohort_chunks=2)
    monkeypatch.setitem(limits.PACKAGES, "drjax", ("not_installed",))
    asked = compared(monkeypatch, plain)
    assert asked.engines == ["tiered", "masked", "unchunked", "loop", "torch", "torch-padded"]
    assert "not_installed not found" in " ".join(capsys.readouterr().err.split())


def test_short_names(world, monkeypatch):
    short = ["--model", "some/model", "--task", "sst2", "--clients", 8, "--engines", "loop", "loop"]
    asked = compared(monkeypatch, world.config, *short)
    assert (asked.config.model.name, asked.config.data.task) == ("some/model", "sst2")
    assert (asked.config.clients_per_round, asked.config.population) == (8, 8)
    assert asked.engines == ["loop"]
    chunks = "--federation.cohort-chunks", 3
    fewer = compared(monkeypatch, world.config, "--clients", 2, "--engines", "loop", *chunks).config
    assert (fewer.clients_per_round, fewer.population, fewer.federation.cohort_chunks) == (2, 5, 2)


def test_what_was_measured_stays_when_the_rest_fails(world, tmp_path, monkeypatch):
    """A folder that is not there is made."""

    def fails(*_, **options):
        yield {"engines": {}}
        raise UserError("engine 'torch' died")

    monkeypatch.setattr(command, "compare", fails)
    with pytest.raises(UserError, match="died"):
        command.bench_command([str(world.config), "--json", str(tmp_path / "made" / "found.json")])
    record = json.loads((tmp_path / "made" / "found.json").read_text())
    assert record["engines"] == {}
    assert record["config"]["seed"] == 0


def test_clients_that_remember(world):
    """In a first round HetLoRA's clients remember nothing yet, and its layouts do the same."""
    config = make_config(runs.settings(world, **PLAIN, federation__method="hetlora"), "test")
    found, expected = (engine_round(engine, config)[1]().weights for engine in ("masked", "tiered"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.parametrize(
    ("engine", "changes", "message"),
    [
        ("loop", {"federation__method": "hetlora"}, "federation.method: found hetlora, expected one whose"),
        (
            "drjax",
            {"federation__wrappers": {"personalise": {}}},
            "federation.method: found fslora in personalise",
        ),
        (
            "torch",
            {"federation__method": "flexlora"},
            "federation.method: found flexlora, expected fslora or",
        ),
        ("torch", {"federation__method_options": {"redraw": True}}, "federation.method_options: found"),
        ("torch", {"federation__wrappers": {"observe": {}}}, "federation.wrappers: found observe"),
        ("torch", {"server_optimizer": {"name": "adam"}}, "server_optimizer: found adam, expected plain"),
        (
            "torch-padded",
            {"client_optimizer": {"momentum": 0.9, "weight_decay": 0.1}},
            "client_optimizer.weight_decay: found 0.1, expected 0",
        ),
        ("torch", {"model__quantization": "int8"}, "model.quantization: found int8, expected none"),
        ("torch", {"data__task": "regression"}, "data.task: found regression"),
        ("tiered", {"federation__failure_rate": 0.999}, "federation.failure_rate: found 0.999"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_before_anything_is_loaded(
    world, monkeypatch, engine, changes, message
):
    monkeypatch.setattr("fslora_jax.hub.resolve_model", None)
    config = make_config(runs.settings(world, **(PLAIN | changes)), "test")
    with pytest.raises(UserError, match=re.escape(f"engine '{engine}': {message}")) as refused:
        engine_round(engine, config)
    assert "\n" not in str(refused.value)


def test_an_engine_whose_packages_are_not_there_is_refused(world, monkeypatch):
    monkeypatch.setitem(limits.PACKAGES, "loop", ("jax", "not_installed"))
    with pytest.raises(UserError, match="engine 'loop': not_installed not found; pip install"):
        engine_round("loop", make_config(runs.settings(world, **PLAIN), "test"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--engines tired", "--engines: unknown engine 'tired'; did you mean tiered?"),
        ("--engines tiered torch", "engine 'torch': server_optimizer: found sgd, expected plain averaging"),
        ("--repeats 0", "--repeats: found 0, expected at least 1"),
        ("--clients 0", "--clients: federation.clients_per_round: found 0"),
        ("--device gpus", "--device: unknown kind 'gpus'; did you mean gpu?"),
        ("--json FILE/found.json", "--json: FILE/found.json cannot be written: "),
        ("--json FOLDER", "--json: FOLDER cannot be written: Is a directory; choose another file"),
    ],
)
def test_bad_input_is_told_before_anything_starts(world, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(command, "compare", None)
    places = {"FILE": str(world.config), "FOLDER": str(world.folder)}
    for name, place in places.items():
        arguments, message = arguments.replace(name, place), message.replace(name, place)
    assert message in runs.mistake(world, capsys, "bench", world.config, *arguments.split())


def test_what_a_process_finds_is_told_in_one_line(world, capsys):
    arguments = ("--model.name", "nowhere/at-all", "--engines", "tiered")
    assert "was found nowhere" in runs.mistake(world, capsys, "bench", world.config, *arguments)
