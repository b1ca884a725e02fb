"""The typed config: what is accepted, what is refused in which words, and the way to YAML and back."""

from pathlib import Path

import optax
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fslora_jax.config import Config, dump_config, load_config, make_config
from fslora_jax.errors import UserError
from fslora_jax.settings import known_fields, suggest

MINIMAL = {"model": {"name": "m"}, "data": {"name": "d.csv"}}


def changed(**changes: object) -> dict:
    """The minimal config with ``section__field=value`` changed."""
    values: dict = {section: dict(fields) for section, fields in MINIMAL.items()}
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            values.setdefault(section, {})[field] = value
        else:
            values[section] = value
    return values


def refusal(**changes: object) -> str:
    with pytest.raises(UserError) as caught:
        make_config(changed(**changes), "c.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("c.yaml: ")
    return str(caught.value)


def test_the_defaults_are_the_papers():
    config = make_config(MINIMAL, "c.yaml")
    assert (config.lora.r, config.lora.use_rslora) == (64, True)
    assert config.federation.sketching_ratios == (0.125, 0.25, 0.5, 0.75)
    assert config.server_optimizer.name == "sgd"
    assert config.server_optimizer.learning_rate == 1
    assert config.clients_per_round == config.federation.num_clients == 20


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"federation__num_roundz": 3},
            "unknown setting federation.num_roundz; did you mean federation.num_rounds?",
        ),
        ({"federatoin": {}}, "unknown setting federatoin; did you mean federation?"),
        ({"zzz": 1}, "unknown setting zzz; expected one of model"),
        ({"model": {}}, "model.name: missing"),
        ({"lora__r": 0}, "lora.r: found 0; input should be greater than or equal to 1"),
        ({"lora__r": "eight"}, "lora.r: found 'eight'"),
        ({"lora__r": 2.5}, "lora.r: found 2.5"),
        ({"lora__lora_dropout": 1}, "lora.lora_dropout: found 1"),
        ({"lora__target_modules": True}, "lora.target_modules.str: found True"),
        ({"federation__sketching_ratios": [0]}, "federation.sketching_ratios.0: found 0"),
        ({"federation__sketching_ratios": [0.5, 1.5]}, "federation.sketching_ratios.1: found 1.5"),
        ({"federation__sketching_ratios": [-0.5]}, "federation.sketching_ratios.0: found -0.5"),
        ({"federation__sketching_ratios": []}, "federation.sketching_ratios: found []"),
        ({"federation__sketching_ratios": [0.005]}, "0.005 of rank 64 rounds to k = 0, expected k >= 1"),
        ({"federation__clients_per_round": 21}, "federation.clients_per_round: found 21, expected at most"),
        ({"federation__num_clients": 0}, "federation.num_clients: found 0"),
        ({"federation__min_local_steps": 11}, "federation.min_local_steps: found 11, expected at most"),
        ({"federation__failure_rate": 1.0}, "federation.failure_rate: found 1.0"),
        (
            {"federation__devices": {"phone": {"memory_gb": 8, "gflop": 1, "down_mbps": 1, "up_mbps": 1}}},
            "unknown setting federation.devices.phone.gflop; did you mean federation.devices.phone.gflops?",
        ),
        (
            {"federation__clients_asked": 9},
            "federation.clients_asked: found 9 without federation.clients_per_round",
        ),
        (
            {"federation__clients_asked": 9, "federation__clients_per_round": 5},
            "federation.clients_asked: found 9 without federation.devices",
        ),
        ({"mesh__clients": 0}, "mesh.clients: found 0, expected -1 (all that are left) or at least 1"),
        ({"mesh__cpu_devices": 0}, "mesh.cpu_devices: found 0, expected -1 (one for each core) or 1 to 128"),
        ({"mesh__cpu_devices": 1000}, "mesh.cpu_devices: found 1000, expected -1"),
        ({"data__row_length": 64}, "data.row_length: found 64, expected at least data.max_length = 128"),
        ({"client_optimizer__learning_rate": 0}, "client_optimizer.learning_rate: found 0"),
        ({"client_optimizer__learning_rate": float("nan")}, "client_optimizer.learning_rate: found nan"),
        ({"client_optimizer__learning_rate": float("inf")}, "client_optimizer.learning_rate: found inf"),
        ({"client_optimizer__momentum": 1}, "client_optimizer.momentum: found 1"),
        ({"server_optimizer__name": "sdg"}, "server_optimizer.name: 'sdg' is no optimiser of optax"),
        ({"server_optimizer__name": "global_norm"}, "server_optimizer."),
        ({"server_optimizer__name": "Schedule"}, "server_optimizer."),
        (
            {"server_optimizer__options": {"b3": 0.9}},
            "server_optimizer.optax.sgd does not take these options",
        ),
        ({"server_optimizer__options": {"momentum": "much"}}, "server_optimizer.options.momentum"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 2**31}, "seed: found 2147483648"),
        ({"loggers": ["mlflow"]}, "loggers.0: found 'mlflow'"),
        ({"model__dtype": "float64"}, "model.dtype: found 'float64'"),
        ({"model__products": "bfloat16", "model__quantization": "int8"}, "set products: same"),
        ({"model__products": "bfloat16", "model__dtype": "bfloat16"}, "found bfloat16 with dtype bfloat16"),
        ({"partition__dirichlet_alpha": 0}, "partition.dirichlet_alpha: found 0"),
    ],
    ids=str,
)
def test_what_is_refused_is_named_in_one_line(changes, words):
    assert words in refusal(**changes)


def test_several_mistakes_are_counted():
    assert refusal(seed=-1, lora__r=0, evaluate_every=0).endswith("(and 2 more)")


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_a_config_is_a_mapping(values):
    with pytest.raises(UserError, match=r"c.yaml: found .*, expected a mapping of settings"):
        make_config(values, "c.yaml")


def test_numbers_are_read_as_yaml_users_write_them():
    """YAML 1.1 takes 5e-4 for a text, and columns and labels for numbers."""
    values = yaml.safe_load("{client_optimizer: {learning_rate: 5e-4}, data: {name: d, label_names: [0, 1]}}")
    values["data"] |= {"text_columns": [3], "label_column": 1}
    config = make_config(MINIMAL | values, "c.yaml")
    assert config.client_optimizer.learning_rate == 5e-4
    assert config.data.label_names == ("0", "1")
    assert (config.data.text_columns, config.data.label_column) == (("3",), "1")


def test_the_server_optimiser_is_optaxs():
    config = make_config(
        changed(server_optimizer={"name": "adam", "learning_rate": 0.1, "options": {"b1": 0.5}}), "c.yaml"
    )
    gradient, weights = optax.adam(0.1, b1=0.5), {"a": 1.0}
    for step in range(2):
        del step
        ours, theirs = config.server_optimizer.build(), gradient
        assert ours.update(weights, ours.init(weights)) == theirs.update(weights, theirs.init(weights))


# Words of any script; YAML's own line breaks inside a column's name are beyond PyYAML.
words = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=8)
configs = st.builds(
    changed,
    seed=st.integers(0, 2**31 - 1),
    data__label_names=st.none() | st.lists(words, min_size=2, max_size=4),
    data__text_columns=st.lists(words, min_size=1, max_size=2),
    client_optimizer__learning_rate=st.floats(1e-30, 1e30),
    client_optimizer__max_grad_norm=st.none() | st.floats(1e-9, 1e9),
    federation__sketching_ratios=st.lists(st.floats(0.01, 1), min_size=1, max_size=5),
    federation__clients_per_round=st.none() | st.integers(1, 20),
    server_optimizer__options=st.sampled_from([{}, {"momentum": 0.9}, {"nesterov": True, "momentum": 0.1}]),
    loggers=st.lists(st.sampled_from(["tensorboard", "wandb"]), max_size=2),
)


@hypothesis_settings(max_examples=60, deadline=None)
@given(configs)
def test_a_dumped_config_loads_equal(values):
    config = make_config(values, "c.yaml")
    assert make_config(yaml.safe_load(dump_config(config)), "dumped") == config


def test_a_dumped_config_is_a_config_file(tmp_path):
    config = make_config(changed(data__label_names=["schön", "naïve", "悪い"]), "c.yaml")
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == config
    assert "schön" in dump_config(config)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: {name: m\n", "no valid YAML"),
        (b"a: b: c\n", "no valid YAML"),
        (b"\xff\xfe", "not UTF-8 text at byte 0"),
        (b"", "found NoneType, expected a mapping"),
        (b"!!python/object/apply:os.system ['true']", "no valid YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, words):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "reason"), [("none.yaml", "No such file"), (".", "Is a directory")])
def test_no_file_to_read(tmp_path, name, reason):
    with pytest.raises(UserError, match=f"cannot be read: {reason}"):
        load_config(tmp_path / name)


def test_every_setting_is_described():
    def undescribed(model, prefix=""):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from undescribed(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    assert list(undescribed(Config)) == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("num_rounds", "federation.num_rounds"),
        ("lora.rank", "lora.r"),
        ("federation.rounds", "federation.num_rounds"),
    ],
)
def test_a_suggestion_is_the_setting_that_was_meant(name, meant):
    assert suggest(name, known_fields(Config)) == f"; did you mean {meant}?"
    assert meant in known_fields(Config)


def test_the_configs_of_the_project_load():
    paths = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        load_config(path)
