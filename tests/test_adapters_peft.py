"""The real PEFT reads what is written here, to the last tensor and logit."""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import (
    LABELS,
    ROWS,
    Case,
    global_logits,
    jax_logits,
    make_case,
    merge,
    torch_base,
    torch_logits,
    write,
)
from safetensors.numpy import load_file

from fslora_jax.adapters.schema import CARD, WEIGHTS
from fslora_jax.lora import product
from fslora_jax.sketch import gather

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import torch

# PEFT uses a name of transformers that is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module", params=ROWS)
def case(request, tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp(request.param), request.param)


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


def test_peft_and_the_merged_model_compute_w_plus_scale_b_a_and_our_head(tmp_path, case):
    naming, scales = case.model.naming, case.spec.scales()
    merged = torch_base(case)
    weights = merged.state_dict()
    before = torch_logits(merged, naming.task_type)
    for module, pair in case.adapter.items():
        for layer, change in enumerate(np.asarray(product(pair, scales[module]))):
            weights[naming.layer_prefix.format(layer=layer) + module + ".weight"] += torch.tensor(change)
    for module, leaves in case.head.items():
        for name, value in leaves.items():
            torch_name = {"kernel": "weight", "bias": "bias"}[name]
            weights[f"{module}.{torch_name}"].copy_(torch.tensor(value.T))
    loaded = peft.PeftModel.from_pretrained(torch_base(case), write(tmp_path / "adapter", case)).eval()
    expected = torch_logits(merged, naming.task_type, precise=True)
    theirs = torch_logits(loaded, naming.task_type, precise=True)
    np.testing.assert_allclose(theirs, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(theirs, global_logits(case), rtol=1e-4, atol=1e-4)
    ours = type(merged).from_pretrained(merge(tmp_path / "merged", case)).eval()
    np.testing.assert_allclose(
        torch_logits(ours, naming.task_type, precise=True), expected, rtol=1e-5, atol=1e-5
    )
    assert np.abs(expected - before).max() > 0.1


def test_peft_computes_our_logits_for_one_clients_sketch(tmp_path, case):
    """What the client trained: B S A with S = r / k on its components, at each module's scale and rank."""
    full, scales, rng = case.spec.ranks(), case.spec.scales(), np.random.default_rng(2)
    held = case.spec.ranks(3)
    index = {
        m: np.stack([rng.permutation(full[m])[: held[m]] for _ in range(len(pair.a))])
        for m, pair in case.adapter.items()
    }
    mine = {m: gather(pair, jnp.asarray(index[m])) for m, pair in case.adapter.items()}
    folder = write(tmp_path / "adapter", case, k=3, adapter=mine)
    loaded = peft.PeftModel.from_pretrained(torch_base(case), folder).eval()
    scale = {
        m: scales[m] * full[m] / held[m] * jax.nn.one_hot(chosen, full[m]).sum(1)
        for m, chosen in index.items()
    }
    theirs = torch_logits(loaded, case.model.naming.task_type)
    np.testing.assert_allclose(theirs, jax_logits(case, case.adapter, scale), rtol=1e-4, atol=1e-4)


def test_the_model_card_runs_as_it_stands(tmp_path, case):
    folder = write(tmp_path / "adapter", case)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / CARD).read_text(), re.DOTALL)
    code = code.replace("path/of/this/folder", str(folder))
    code = code.replace("The first text.", "a film that I will see again").replace(
        "Another one.", "I will never see"
    )
    names: dict[str, Any] = {}
    exec(code, names)
    if case.model.naming.task_type == "CAUSAL_LM":
        prompt, tokens = names["batch"]["input_ids"], names["tokens"]
        assert tokens.shape[1] > prompt.shape[1] and (tokens[:, : prompt.shape[1]] == prompt).all()
        return
    np.testing.assert_allclose(names["logits"].numpy(), global_logits(case), rtol=1e-4, atol=1e-4)
    assert names["labels"] == list(LABELS)
