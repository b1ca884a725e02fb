"""The real lm-eval harness on a model with an adapter: its three calls as transformers and peft answer them."""

import json
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import runs
import torch
import transformers

lm_eval = pytest.importorskip("lm_eval", reason="pip install -e .[lm-eval]")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

WORDS = ["yes", "no", "is", "it", "the", "cat", "dog", "?", "a", "film"]
END, LONGEST = 3, 24


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The harness's model, and the same in torch."""
    from fslora_jax.harness import HarnessLM

    folder, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    sizes = {"vocab_size": len(vocabulary), "max_position_embeddings": LONGEST, "eos_token_id": END}
    config = transformers.LlamaConfig(**runs.SIZES | sizes | {"num_key_value_heads": 1})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    runs.make_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    hf = peft.get_peft_model(base, settings).eval()
    hf.save_pretrained(adapter)
    return HarnessLM(adapter=str(adapter)), hf


def requests(*args):
    return [SimpleNamespace(args=one) for one in args]


def logp(hf, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(hf(torch.tensor([ids])).logits[0], -1)


def test_log_likelihoods(pair):
    lm, hf = pair
    asked = [("is it the cat ?", " yes"), ("is it", " the dog ? no"), ("", "a film"), ("the " * 30, "cat")]
    for (context, answer), (value, greedy) in zip(asked, lm.loglikelihood(requests(*asked)), strict=True):
        before = lm.tok_encode(context) or [END]
        new = lm.tok_encode(answer)
        ids = (before + new)[-LONGEST:]
        table = logp(hf, ids)[-len(new) - 1 : -1]
        assert value == pytest.approx(float(table[range(len(new)), new].sum()), abs=1e-3)
        assert greedy == (table.argmax(-1).tolist() == new)


def test_rolling_log_likelihoods(pair):
    """A text longer than the context: windows that follow one another, each token once."""
    lm, hf = pair
    text = " ".join(WORDS * 4)
    ids = lm.tok_encode(text)
    size = LONGEST - 1
    expected = float(logp(hf, [END, *ids[: size - 1]])[range(size), ids[:size]].sum())
    left = len(ids) - size
    window = logp(hf, ids[-size - 1 : -1])
    expected += float(window[-left:][range(left), ids[-left:]].sum())
    assert size < len(ids) < 2 * size
    assert lm.loglikelihood_rolling(requests((text,), ("",))) == pytest.approx([expected, 0.0], abs=1e-3)


def test_generation(pair):
    lm, hf = pair
    prompts = ["is it the cat ?", "a film", "the dog " * 20]
    found = lm.generate_until(requests(*((p, {"until": ["dog"], "max_gen_toks": 6}) for p in prompts)))
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([lm.tok_encode(prompt)[-(LONGEST - 6) :]])
        given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        new = hf.generate(input_ids=ids, **given, max_new_tokens=6, do_sample=False)[
            0, ids.shape[1] :
        ].tolist()
        new = new[: new.index(END)] if END in new else new
        assert text == lm._tokens.decode(new).split("dog")[0]
    assert len(set(found)) > 1


def test_a_whole_local_task(pair, tmp_path):
    lm, hf = pair
    questions = [
        {"question": f"is it the {w} ?", "choices": ["yes", "no"], "gold": n % 2} for n, w in enumerate(WORDS)
    ]
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    found = lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)["results"]["tiny"]["acc,none"]
    hits = []
    for question in questions:
        table = logp(hf, lm.tok_encode(question["question"]))[-1]
        values = [float(table[lm.tok_encode(choice)[0]]) for choice in question["choices"]]
        hits.append(np.argmax(values) == question["gold"])
    assert found == pytest.approx(np.mean(hits))
