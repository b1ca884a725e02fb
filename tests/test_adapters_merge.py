"""A merged model is the base with its adapter: under transformers alone, and read back here."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import LABELS, Case, global_logits, jax_logits, make_case, merge, torch_base, torch_logits
from safetensors.torch import load_file

from fslora_jax.errors import UserError
from fslora_jax.federation.results import MODEL_OF
from fslora_jax.models import load_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers


@pytest.fixture(scope="module", params=["bert-patterns", "bert-mean", "roberta", "llama-causal"])
def case(request, tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
def test_transformers_loads_it_and_computes_the_same(tmp_path, case, shard_bytes):
    folder = merge(tmp_path / "merged", case, shard_bytes)
    loaded, info = type(torch_base(case)).from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if case.head:
        assert list(loaded.config.id2label.values()) == list(LABELS)
    assert loaded.config.architectures == [case.model.naming.architecture]
    logits = torch_logits(loaded.eval(), case.model.naming.task_type)
    np.testing.assert_allclose(logits, global_logits(case), rtol=1e-4, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(folder)("a film")["input_ids"]
    if shard_bytes == 5000:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        shards = sorted(set(index["weight_map"].values()))
        assert len(shards) > 2 and not (folder / "model.safetensors").exists()
        total = 0
        for shard in shards:
            sizes = [value.nbytes for value in load_file(folder / shard).values()]
            assert len(sizes) == 1 or sum(sizes) <= 5000
            total += sum(sizes)
        assert index["metadata"]["total_size"] == total


def test_it_is_read_back_as_a_base_model(tmp_path, case):
    folder = merge(tmp_path / "merged", case)
    options = MODEL_OF[case.model.naming.task_type]
    model, base = load_model(folder, num_labels=len(LABELS), **options)
    again = case._replace(model=model, base=base)
    nothing = {m: jnp.zeros(pair.a.shape[:2]) for m, pair in case.adapter.items()}
    np.testing.assert_allclose(
        jax_logits(again, case.adapter, nothing), global_logits(case), rtol=1e-4, atol=1e-4
    )


def test_bfloat16_is_merged_in_float32_and_stays_bfloat16(tmp_path):
    case = make_case(tmp_path / "base", "bert-patterns")
    torch_model = transformers.AutoModel.from_pretrained(case.folder, dtype=torch.bfloat16)
    torch_model.save_pretrained(case.folder)
    folder = merge(tmp_path / "merged", case)
    module, layer = "attention.self.query", 1
    name = case.model.naming.layer_prefix.format(layer=layer) + module
    before = torch_model.get_submodule(name.removeprefix("bert.")).weight.detach().float().numpy()
    pair = jax.tree.map(lambda x: np.asarray(x[layer]), case.adapter[module])
    expected = torch.tensor(before + case.spec.scales()[module] * pair.b.T @ pair.a).bfloat16()
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors[f"{name}.weight"], expected)
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_nothing_but_a_model_is_replaced_and_never_the_base(tmp_path, case):
    with pytest.raises(UserError, match="the folder of the base model"):
        merge(case.folder, case)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="exists and is no model"):
        merge(tmp_path, case)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]
