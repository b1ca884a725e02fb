"""Adapter folders are read strictly, and given back as they were; nothing is half-written."""

import dataclasses
import shutil
import warnings

import jax
import numpy as np
import pytest
from adapter_cases import LABELS, ROWS, Case, R, edit_config, make_case, torch_base, write
from safetensors.numpy import load_file, save_file

from fslora_jax.adapters import write as writing
from fslora_jax.adapters.read import check_fits, read_adapter
from fslora_jax.adapters.schema import CARD, CONFIG, WEIGHTS
from fslora_jax.adapters.write import write_adapter
from fslora_jax.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

# PEFT uses a name of transformers that is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module", params=ROWS)
def case(request, tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp("bert"), "bert")


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_written_is_read_and_written_again_to_the_byte(tmp_path, case):
    folder = write(tmp_path / "adapter", case)
    saved = read_adapter(folder)
    jax.tree.map(np.testing.assert_array_equal, (saved.adapter, saved.head), (case.adapter, case.head))
    assert saved.spec.targets == case.spec.targets
    assert (saved.spec.ranks(), saved.spec.scales()) == (case.spec.ranks(), case.spec.scales())
    assert saved.label_names == LABELS
    check_fits(saved, case.model)
    naming = case.model.naming
    write_adapter(
        tmp_path / "again",
        saved.adapter,
        saved.head,
        saved.config,
        naming=naming,
        label_names=saved.label_names,
    )
    assert files(tmp_path / "again") == files(folder)


PEFTS = {
    "defaults": {"target_modules": ["query", "value"]},
    "dropout and rsLoRA": {"target_modules": ["key"], "lora_dropout": 0.1, "use_rslora": True, "r": 4},
    "patterns": {
        "target_modules": r".*\.encoder\..*(query|key|dense)",
        "rank_pattern": {"key": 2, r"output\.dense": 3},
        "alpha_pattern": {"query": 5},
        "modules_to_save": ["classifier"],
        "init_lora_weights": False,
    },
}


@pytest.mark.parametrize("settings", PEFTS.values(), ids=PEFTS)
def test_what_peft_wrote_is_read_and_written_again(tmp_path, bert, settings):
    config = peft.LoraConfig(task_type="SEQ_CLS", **settings)
    model = peft.get_peft_model(torch_base(bert), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT would ask the hub about the base model
        model.save_pretrained(tmp_path / "theirs")
    saved = read_adapter(tmp_path / "theirs")
    check_fits(saved, bert.model)
    for m, target in saved.spec.targets.items():
        module = model.get_submodule("base_model.model.bert.encoder.layer.1." + m)
        assert saved.spec.ranks()[m] == module.r["default"]
        assert saved.spec.scales()[m] == pytest.approx(module.scaling["default"])
        assert saved.adapter[m].b.shape == (target.layers, module.r["default"], target.o)
    assert saved.label_names == ()
    write_adapter(
        tmp_path / "ours",
        saved.adapter,
        saved.head,
        saved.config,
        naming=bert.model.naming,
        label_names=[],
    )
    theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[key], ours[key]) for key in theirs)
    known = [peft.LoraConfig.from_pretrained(tmp_path / name) for name in ("theirs", "ours")]
    first, second = (dataclasses.asdict(config) | {"init_lora_weights": None} for config in known)
    assert {k: v for k, v in first.items() if v != second[k]} == {}


@pytest.mark.parametrize("row", ["xlm-roberta", "mpnet", "distilbert"])
def test_what_peft_saves_by_default_fits_every_family(tmp_path, row):
    case = make_case(tmp_path / "base", row)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=list(case.spec.targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT would ask the hub about the base model
        peft.get_peft_model(torch_base(case), config).save_pretrained(tmp_path / "theirs")
    check_fits(read_adapter(tmp_path / "theirs"), case.model)


QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"base_model.model.bert.pooler.dense.weight": np.ones((2, 2), np.float32)},
            "unknown tensor",
        ),
        (lambda t: t | {QUERY + "lora_magnitude_vector": np.ones(2, np.float32)}, "unknown tensor"),
        (
            lambda t: {k: v for k, v in t.items() if k != QUERY + "lora_A.weight"},
            "query.lora_A.weight of layer 1",
        ),
        (lambda t: {k: v for k, v in t.items() if "query.lora_B" not in k}, "query.lora_B.weight of layer 0"),
        (
            lambda t: t | {QUERY + "lora_A.weight": np.ones((R + 1, 16), np.float32)},
            "expected matrices of one shape",
        ),
        (
            lambda t: {k: v[:-1] if "lora_A" in k else v for k, v in t.items()},
            r"query has rank \(7, 8\) in A and B; expected 8",
        ),
        (
            lambda t: t | {QUERY + "lora_B.weight": np.ones((17, R), np.float32)},
            "expected matrices of one shape",
        ),
        (
            lambda t: {k.replace("layer.1", "block.1"): v for k, v in t.items()},
            "expected one stack of layers",
        ),
        (lambda t: {k: v for k, v in t.items() if "lora" not in k}, "expected one stack of layers"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(tmp_path, bert, change, message):
    folder = write(tmp_path / "adapter", bert)
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(UserError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_pattern", {"query": 3}),
        ("rank_pattern", {"qu": 3}),
        ("alpha_pattern", {"layer.0.attention.self.query": 3}),
        ("target_modules", ["value"]),
        ("target_modules", ["q_proj"]),
        ("task_type", "CAUSAL"),
        ("revision", "a1b2c3"),
        ("velocity", None),
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("peft_type", "LOHA"),
        ("r", "8"),
        ("lora_alpha", None),
        ("base_model_name_or_path", None),
    ],
)
def test_variants_of_lora_are_refused_by_name(tmp_path, bert, field, value):
    folder = write(tmp_path / "adapter", bert)
    edit_config(folder, **{field: value})
    with pytest.raises(UserError, match=rf"adapter_.*{'rank' if field == 'rank_pattern' else field}"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "no such file; expected the folder of a PEFT adapter"),
        (lambda folder: (folder / CONFIG).write_text("{"), "not JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "found list"),
        (
            lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
            r"adapter_model.bin: pickled, .*save_pretrained",
        ),
        (lambda folder: (folder / WEIGHTS).write_bytes(bytes(20)), "damaged"),
    ],
)
def test_spoilt_folders_are_refused(tmp_path, bert, spoil, message):
    folder = write(tmp_path / "adapter", bert)
    spoil(folder)
    with pytest.raises(UserError, match=message):
        read_adapter(folder)


def test_an_adapter_of_another_model_is_refused(tmp_path, bert):
    saved = read_adapter(write(tmp_path / "adapter", bert))
    with pytest.raises(UserError, match="task_type is SEQ_CLS, but the model has TOKEN_CLS"):
        check_fits(saved, make_case(tmp_path / "mean", "bert-mean").model)
    with pytest.raises(UserError, match=r"layers is bert\.encoder.*has roberta\.encoder"):
        check_fits(saved, make_case(tmp_path / "roberta", "roberta").model)
    with pytest.raises(UserError, match=r"query is .*has None"):
        modules = {k: v for k, v in bert.model.modules.items() if "query" not in k}
        check_fits(saved, bert.model._replace(modules=modules))
    deeper = {k: v._replace(layers=4) for k, v in bert.model.modules.items()}
    with pytest.raises(UserError, match=r"query is Target\(.*layers=3\), but .*layers=4"):
        check_fits(saved, bert.model._replace(modules=deeper))
    with pytest.raises(UserError, match="head is "):
        check_fits(saved._replace(head={"classifier": {"kernel": np.ones((16, 3))}}), bert.model)


# Files


def test_a_failed_write_leaves_the_earlier_adapter(tmp_path, bert, monkeypatch):
    folder = write(tmp_path / "adapter", bert)
    other = bert._replace(lora=bert.lora.model_copy(update={"lora_alpha": 1.0}))
    before = files(folder)

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "model_card", full)
        with pytest.raises(UserError, match="No space left"):
            write(folder, other)
    assert files(folder) == before
    assert list(tmp_path.iterdir()) == [folder]
    write(folder, other)
    assert read_adapter(folder).config.lora_alpha == 1.0
    assert list(tmp_path.iterdir()) == [folder]


def test_only_an_adapter_is_replaced(tmp_path, bert):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="exists and is no adapter"):
        write(tmp_path, bert)
    with pytest.raises(UserError, match="exists and is no adapter"):
        write(tmp_path / "thesis.tex", bert)
    (tmp_path / "new" / "empty").mkdir(parents=True)
    assert {path.name for path in write(tmp_path / "new" / "empty", bert).iterdir()} == {
        CARD,
        CONFIG,
        WEIGHTS,
    }


def test_a_rank_that_is_not_the_configs_is_refused(tmp_path, bert):
    with pytest.raises(UserError, match=r"query has rank \(8, 8\) in A and B; expected 4"):
        write(tmp_path / "adapter", bert._replace(lora=bert.lora.model_copy(update={"r": 4})))
    assert not (tmp_path / "adapter").exists()


def test_a_copied_folder_stands_alone(tmp_path, bert):
    folder = write(tmp_path / "adapter", bert)
    shutil.move(folder, tmp_path / "moved")
    assert read_adapter(tmp_path / "moved").config.r == R
