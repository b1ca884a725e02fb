"""Names of modules mean what they mean in the real PEFT, or are refused."""

import warnings
from typing import Any

import pytest
from contract import SIZES

from fslora_jax.errors import UserError
from fslora_jax.models import FAMILIES, build_model
from fslora_jax.targets import DEFAULT_TARGETS, match_pattern, select_targets

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS

# PEFT uses a name of transformers that is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

BERT = build_model(transformers.BertConfig(**SIZES).to_dict(), num_labels=3, pooling="mean")
MODULES, PREFIX = BERT.modules, BERT.naming.layer_prefix
QUERY, KEY = "attention.self.query", "attention.self.key"


def in_peft(**changes: Any) -> dict[str, list[tuple[int, float]]]:
    """Module path -> (rank, alpha) in each layer that PEFT adapts, in a BERT without head and pooler."""
    model = transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False)
    found: dict[str, list[tuple[int, float]]] = {}
    for name, module in peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, **changes)
    ).named_modules():
        if hasattr(module, "lora_A"):
            path = name.removeprefix("base_model.model.encoder.layer.").partition(".")[2]
            found.setdefault(path, []).append((module.r["default"], module.lora_alpha["default"]))
    return found


@pytest.mark.parametrize(
    "target_modules",
    [
        ["query"],
        ["dense"],
        ["output.dense", "key"],
        [QUERY],
        r".*layer\.\d+\.(attention\.self|output)\.(query|key|dense)",
        r".*\.attention\..*(query|dense)",
    ],
)
def test_names_select_what_peft_selects(target_modules):
    expected = in_peft(target_modules=target_modules)
    assert list(select_targets("lora.target_modules", MODULES, PREFIX, target_modules)) == sorted(expected)
    assert all(len(layers) == SIZES["num_hidden_layers"] for layers in expected.values())


def test_all_linear_is_every_linear_module_of_the_layers():
    expected = in_peft(target_modules="all-linear")
    assert (
        list(select_targets("lora.target_modules", MODULES, PREFIX, "all-linear"))
        == sorted(expected)
        == sorted(MODULES)
    )


@pytest.mark.parametrize(
    "pattern",
    [
        {"query": 4},
        {"output.dense": 2, "attention.output.dense": 4},
        {"attention.output.dense": 4, "output.dense": 2},
        {r"self\.(query|key)": 3, "dense": 5},
        {r"encoder.layer.\d+.output.dense": 6},
        {".*uery": 7, "query": 4},
    ],
)
def test_patterns_give_what_peft_gives(pattern):
    expected = in_peft(target_modules=list(MODULES), rank_pattern=pattern, alpha_pattern=pattern)
    found = match_pattern("lora.rank_pattern", MODULES, PREFIX, pattern)
    for path in MODULES:
        assert {(found.get(path, 8), found.get(path, 16))} == set(expected[path]), path


def test_defaults_are_pefts():
    ours_alone = {"distilbert", "mpnet", "modernbert"}
    assert set(FAMILIES) <= set(DEFAULT_TARGETS)
    for model_type, names in DEFAULT_TARGETS.items():
        assert (model_type in PEFT_DEFAULTS) == (model_type not in ours_alone)
        assert list(names) == PEFT_DEFAULTS.get(model_type, list(names)), model_type


@pytest.mark.parametrize(
    "name", ["uery", "quer", "lora_B", "self", "bert.encoder.layer.7.attention.self.query"]
)
@pytest.mark.parametrize("form", [str, lambda name: ["query", name]])
def test_a_target_that_matches_nothing_is_refused(name, form):
    with pytest.raises(UserError, match=rf"lora.target_modules: '{name}' matches no module; expected"):
        select_targets("lora.target_modules", MODULES, PREFIX, form(name))


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        ([PREFIX.format(layer=1) + QUERY], f"takes {QUERY} in layer 1, but not in layer 0"),
        (r".*layer\.[01]\..*key", f"takes {KEY} in layer 0, but not in layer 2"),
        ("(query", "no regular expression"),
    ],
)
def test_targets_of_some_layers_are_refused(target_modules, message):
    with pytest.raises(UserError, match=rf"lora.target_modules: .*{message}"):
        select_targets("lora.target_modules", MODULES, PREFIX, target_modules)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"layer.0.attention.self.query": 4}, f"takes {QUERY} in layer 0, but not in layer 1"),
        ({"key": 4, "q_proj": 4}, "'q_proj' matches no adapted module"),
        ({"[": 4}, "no regular expression"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(pattern, message):
    with pytest.raises(UserError, match=rf"lora.rank_pattern: .*{message}"):
        match_pattern("lora.rank_pattern", MODULES, PREFIX, pattern)
