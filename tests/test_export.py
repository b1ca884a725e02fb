import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from fslora_jax import export
from fslora_jax.errors import UserError
from fslora_jax.export import CARD, CONFIG, WEIGHTS, client_alpha, write_adapter
from fslora_jax.lora import lora_scale, product
from fslora_jax.models import Model, load_model
from fslora_jax.reload import check_fits, read_adapter
from fslora_jax.sketch import gather
from fslora_jax.targets import select_targets
from fslora_jax.types import Adapter, Batch, Head, Local, Pair, Trainable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import torch
    import transformers

# PEFT uses a name of transformers that is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

R, ALPHA, LABELS = 8, 12.0, ("bad", "so so", "good")
WORDS = ["[PAD]", "[UNK]", "a", "film", "that", "I", "will", "see", "again", "never"]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
}
CASES = {
    "bert": ("bert", "native", ["query", "value"]),
    "bert-mean": ("bert", "mean", ["query", "attention.output.dense"]),
    # PEFT's own matching would also take the pooler's, the classifier's and the attention's "dense".
    "bert-dense": ("bert", "native", ["dense"]),
    "roberta": ("roberta", "native", ["query", "intermediate.dense"]),
    "roberta-mean": ("roberta", "mean", ["key"]),
}


class Case(NamedTuple):
    base_folder: Path
    model: Model
    base: dict[str, Any]
    adapter: Adapter
    head: Head
    target_modules: list[str]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp(request.param), *CASES[request.param])


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp("bert"), *CASES["bert"])


def make_case(folder: Path, family: str, pooling: str, target_modules: list[str]) -> Case:
    """A tiny random base model with a tokenizer in ``folder``, and a random adapter and head for it."""
    torch.manual_seed(0)
    kinds = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
    }
    make_config, make_model = kinds[family]
    make_model(make_config(**SIZES, initializer_range=0.4)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    model, base = load_model(folder, num_labels=len(LABELS), pooling=pooling)
    rng = np.random.default_rng(1)
    adapter = {
        module: Pair(
            *(jnp.asarray(0.2 * rng.standard_normal((t.layers, R, d)), "float32") for d in (t.i, t.o))
        )
        for module, t in select_targets(model.modules, model.naming.layer_prefix, target_modules).items()
    }
    shapes = jax.eval_shape(model.init_head, jax.random.key(0))
    head = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    return Case(folder, model, base, adapter, head, target_modules)


def write(folder: Path, case: Case, *, use_rslora: bool = True, **changes: Any) -> Path:
    given = {
        "adapter": case.adapter,
        "head": case.head,
        "naming": case.model.naming,
        "base_model": str(case.base_folder),
        "r": R,
        "lora_alpha": ALPHA,
        "use_rslora": use_rslora,
        "target_modules": case.target_modules,
        "label_names": LABELS,
    }
    write_adapter(folder, **(given | changes))
    return folder


def torch_base(case: Case):
    auto = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    }[case.model.naming.task_type]
    return auto.from_pretrained(case.base_folder, num_labels=len(LABELS)).eval()


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of two texts, the second one shorter."""
    tokens = np.array([[2, 3, 4, 5, 6, 7, 8], [5, 6, 9, 7, 0, 0, 0]])
    return tokens, (tokens > 0).astype(int)


def torch_logits(model: Any, task_type: str) -> np.ndarray:
    tokens, mask = map(torch.tensor, texts())
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask).logits
    if task_type == "TOKEN_CLS":
        logits = (logits * mask[..., None]).sum(1) / mask[..., None].sum(1)
    return logits.numpy()


def jax_logits(case: Case, adapter: Adapter, scale: dict[str, Any]) -> np.ndarray:
    tokens, mask = map(jnp.asarray, texts())
    batch = Batch(
        tokens=tokens,
        segments=mask * jnp.array([[1], [2]]),
        positions=mask * jnp.arange(tokens.shape[1]),
        types=jnp.zeros_like(tokens),
        labels=jnp.zeros(2, int),
        weights=jnp.ones(2),
        places=tokens[:, :0],
    )
    local = Local(Trainable(adapter, case.head), scale, trains={}, index={})
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (local, batch))
    return np.asarray(case.model.apply(case.base, [one[0]], one[1])[0])


def same_scale(adapter: Adapter, scale: float) -> dict[str, Any]:
    return {module: jnp.full(pair.a.shape[:2], scale) for module, pair in adapter.items()}


# The real consumer


def test_peft_finds_every_tensor_and_no_other(tmp_path, case):
    folder = write(tmp_path / "adapter", case)
    loaded = peft.PeftModel.from_pretrained(torch_base(case), folder)
    tensors = load_file(folder / WEIGHTS)
    state = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert state.keys() == tensors.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(value.numpy(), tensors[key])
    result = peft.set_peft_model_state_dict(
        loaded, {key: torch.tensor(value) for key, value in tensors.items()}
    )
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]


@pytest.mark.parametrize("use_rslora", [True, False])
def test_peft_computes_w_plus_scale_b_a_and_our_head(tmp_path, case, use_rslora):
    folder = write(tmp_path / "adapter", case, use_rslora=use_rslora)
    naming = case.model.naming
    merged = torch_base(case)
    weights = merged.state_dict()
    before = torch_logits(merged, naming.task_type)
    for module, pair in case.adapter.items():
        for layer, change in enumerate(np.asarray(product(pair, lora_scale(R, ALPHA, use_rslora)))):
            weights[naming.layer_prefix.format(layer=layer) + module + ".weight"] += torch.tensor(change)
    for module, leaves in case.head.items():
        weights[module + ".weight"].copy_(torch.tensor(leaves["kernel"].T))
        weights[module + ".bias"].copy_(torch.tensor(leaves["bias"]))
    loaded = peft.PeftModel.from_pretrained(torch_base(case), folder).eval()
    expected = torch_logits(merged, naming.task_type)
    np.testing.assert_allclose(torch_logits(loaded, naming.task_type), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - before).max() > 0.1


def test_peft_computes_our_logits_for_the_global_adapter(tmp_path, case):
    loaded = peft.PeftModel.from_pretrained(torch_base(case), write(tmp_path / "adapter", case)).eval()
    ours = jax_logits(case, case.adapter, same_scale(case.adapter, lora_scale(R, ALPHA, True)))
    theirs = torch_logits(loaded, case.model.naming.task_type)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_rslora", [True, False])
def test_peft_computes_our_logits_for_one_clients_sketch(tmp_path, case, use_rslora):
    k, rng = 3, np.random.default_rng(2)
    index = {
        module: np.stack([rng.permutation(R)[:k] for _ in range(pair.a.shape[0])])
        for module, pair in case.adapter.items()
    }
    mine = {module: gather(pair, jnp.asarray(index[module])) for module, pair in case.adapter.items()}
    alpha = client_alpha(R, ALPHA, use_rslora)
    folder = write(tmp_path / "adapter", case, adapter=mine, r=k, lora_alpha=alpha, use_rslora=False)
    loaded = peft.PeftModel.from_pretrained(torch_base(case), folder).eval()
    # What the client trained: B S A with S = (r/k) on its components, at the global scale.
    gain = lora_scale(R, ALPHA, use_rslora) * R / k
    scale = {module: gain * jax.nn.one_hot(chosen, R).sum(1) for module, chosen in index.items()}
    ours = jax_logits(case, case.adapter, scale)
    theirs = torch_logits(loaded, case.model.naming.task_type)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)


def test_the_model_card_runs_as_it_stands(tmp_path, case):
    folder = write(tmp_path / "adapter", case)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / CARD).read_text(), re.DOTALL)
    code = code.replace("path/of/this/folder", str(folder))
    code = code.replace("The first text.", "a film that I will see again").replace(
        "Another one.", "I will never see"
    )
    names: dict[str, Any] = {}
    exec(code, names)
    ours = jax_logits(case, case.adapter, same_scale(case.adapter, lora_scale(R, ALPHA, True)))
    np.testing.assert_allclose(names["logits"].numpy(), ours, rtol=1e-4, atol=1e-4)
    assert names["labels"] == list(LABELS)


# Reading back


def test_what_was_written_is_read(tmp_path, case):
    adapter, head, config = read_adapter(write(tmp_path / "adapter", case))
    jax.tree.map(np.testing.assert_array_equal, (adapter, head), (case.adapter, case.head))
    naming = case.model.naming
    expected = (str(case.base_folder), naming.task_type, R, ALPHA, True, naming.layer_prefix, LABELS)
    assert config == expected
    check_fits(adapter, head, config, case.model)


def test_what_peft_wrote_is_read(tmp_path, case):
    loaded = peft.PeftModel.from_pretrained(torch_base(case), write(tmp_path / "ours", case))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT would ask the hub about the base model
        loaded.save_pretrained(tmp_path / "theirs")
    adapter, head, config = read_adapter(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, (adapter, head), (case.adapter, case.head))
    check_fits(adapter, head, config, case.model)
    assert config.label_names == ()


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
            "expected one shape of rank 8",
        ),
        (
            lambda t: {k: v[:-1] if "lora_A" in k else v for k, v in t.items()},
            "expected one shape of rank 8",
        ),
        (
            lambda t: t | {QUERY + "lora_B.weight": np.ones((17, R), np.float32)},
            "expected one shape of rank 8",
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
        ("alpha_pattern", {"query": 3}),
        ("rank_pattern", {"query": 3}),
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
    config = json.loads((folder / CONFIG).read_text()) | {field: value}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=field):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "no such file; expected the folder of a PEFT adapter"),
        (lambda folder: (folder / CONFIG).write_text("{"), "not JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "found list"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "not pickled"),
        (lambda folder: (folder / WEIGHTS).write_bytes(bytes(20)), "damaged"),
    ],
)
def test_spoilt_folders_are_refused(tmp_path, bert, spoil, message):
    folder = write(tmp_path / "adapter", bert)
    spoil(folder)
    with pytest.raises(UserError, match=message):
        read_adapter(folder)


def test_an_adapter_of_another_model_is_refused(tmp_path, bert):
    adapter, head, config = read_adapter(write(tmp_path / "adapter", bert))
    other = make_case(tmp_path / "mean", "bert", "mean", ["query"])
    with pytest.raises(UserError, match="task_type is SEQ_CLS, but the model has TOKEN_CLS"):
        check_fits(adapter, head, config, other.model)
    other = make_case(tmp_path / "roberta", "roberta", "native", ["query"])
    with pytest.raises(UserError, match=r"layers is bert\.encoder.*has roberta\.encoder"):
        check_fits(adapter, head, config, other.model)
    with pytest.raises(UserError, match=r"query is .*has None"):
        modules = {k: v for k, v in bert.model.modules.items() if "query" not in k}
        check_fits(adapter, head, config, bert.model._replace(modules=modules))
    deeper = {k: v._replace(layers=3) for k, v in bert.model.modules.items()}
    with pytest.raises(UserError, match=r"query is \(\(2, 8, 16\).*has \(\(3, 8, 16\)"):
        check_fits(adapter, head, config, bert.model._replace(modules=deeper))
    with pytest.raises(UserError, match="head is "):
        del head["classifier"]["bias"]
        check_fits(adapter, head, config, bert.model)


# Files


def test_a_failed_write_leaves_the_earlier_adapter(tmp_path, bert, monkeypatch):
    folder = write(tmp_path / "adapter", bert)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "_card", full)
        with pytest.raises(UserError, match="No space left"):
            write(folder, bert, lora_alpha=1.0)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
    write(folder, bert, lora_alpha=1.0)
    assert read_adapter(folder)[2].lora_alpha == 1.0
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
    with pytest.raises(UserError, match="query has rank 8; expected r = 4"):
        write(tmp_path / "adapter", bert, r=4)


def test_a_copied_folder_stands_alone(tmp_path, bert):
    folder = write(tmp_path / "adapter", bert)
    shutil.move(folder, tmp_path / "moved")
    assert read_adapter(tmp_path / "moved")[2].r == R
