"""A whole run of a language model on two tasks: it learns, and its adapter says the same in transformers and peft."""

import json

import numpy as np
import peft
import pytest
import runs
import torch
import transformers
import yaml

from fslora_jax.config import DataConfig
from fslora_jax.data.examples import Examples
from fslora_jax.data.prompts import PLAIN
from fslora_jax.errors import UserError
from fslora_jax.federation.examples import tokenise_prompts
from fslora_jax.models import build_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

WORDS = [
    "yes",
    "no",
    "true",
    "false",
    "is",
    "it",
    "the",
    "correct",
    "answer",
    "instruction",
    "response",
    "cat",
    "dog",
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
NEW = 12
OPTIONS = {"animals": ("yes", "no"), "facts": ("true", "false")}


def record(task: str, i: int) -> dict[str, str]:
    right = OPTIONS[task][i % 2]
    listed = "/".join(OPTIONS[task])
    question = f"is it the {('cat', 'dog')[i % 2]}?\nAnswer format: {listed}"
    return {"instruction": question, "input": "", "output": f"the correct answer is {right}", "answer": right}


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> tuple:
    """A world with a tiny Llama, two tasks in files, and a finished run on them."""
    folder = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 1, "eos_token_id": 3, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**runs.SIZES | {"vocab_size": len(VOCABULARY)} | sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    runs.make_tokenizer(VOCABULARY).save(str(folder / "model" / "tokenizer.json"))
    for task in OPTIONS:
        (folder / "data" / task).mkdir(parents=True)
        for split, number in (("train", 24), ("test", 6)):
            records = [record(task, i) for i in range(number)]
            (folder / "data" / task / f"{split}.json").write_text(json.dumps(records))
    world = runs.World(folder, folder / "model", folder / "data", folder / "cache", folder / "tiny.yaml")
    run = runs.train(
        world,
        folder / "run",
        data__task="commonsense",
        data__parts=list(OPTIONS),
        data__max_length=48,
        lora__target_modules=["q_proj", "v_proj", "down_proj"],
        partition__by="task",
        client_optimizer__learning_rate=0.05,
        federation__num_rounds=20,
        evaluate_every=20,
    )
    return world, run


def test_it_learns_and_says_how_well_by_task(causal):
    _, run = causal
    records = [r for r in runs.records(run) if "eval/loss" in r]
    assert records[-1]["eval/loss"] < 0.8 * records[0]["eval/loss"]
    for name in (
        "option_accuracy",
        "option_accuracy_per_token",
        "token_accuracy",
        "animals/loss",
        "facts/loss",
    ):
        assert f"eval/{name}" in records[-1]
    counts = json.loads((run / "partition.json").read_text())["clients"]
    assert {task: sum(c[task] for c in counts) for task in OPTIONS} == {"animals": 24, "facts": 24}


def test_minibatches_in_passes_learn_the_same(causal, tmp_path):
    """Two rounds with one row at a time: the same losses."""
    world, run = causal
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["federation"] |= {"num_rounds": 2}
    config["lora"] |= {"lora_dropout": 0.0}  # whose masks are of a pass
    found = {}
    for rows in (None, 1):
        config["federation"]["rows_per_pass"] = rows
        path, out = tmp_path / f"{rows}.yaml", tmp_path / str(rows)
        path.write_text(yaml.safe_dump(config))
        runs.call(world, "train", path, "--run-dir", out)
        found[rows] = [r["train/loss"] for r in runs.records(out)[1:]]
    assert found[1] == pytest.approx(found[None], rel=1e-4)


def test_the_adapter_says_the_same_in_peft(causal):
    """Loss and option accuracy of the held-out records, one text at a time through transformers and peft."""
    world, run = causal
    base = transformers.AutoModelForCausalLM.from_pretrained(world.model)
    model = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    tokenizer = runs.make_tokenizer(VOCABULARY)

    def losses(text: str, completion: str) -> np.ndarray:
        """Of the completion's tokens and the end; the tokenizer writes [CLS] and [SEP] itself."""
        ids = torch.tensor([tokenizer.encode(text + completion).ids])
        learned = len(tokenizer.encode(completion).ids) - 1
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()[-learned:]

    right, hits = [], []
    intro = f"{PLAIN} ### Instruction:"
    for task, options in OPTIONS.items():
        for i in range(6):
            said = record(task, i)
            prompt = f"{intro} {said['instruction']} ### Response:"
            found = [losses(prompt, f" the correct answer is {option}") for option in options]
            right.append(found[i % 2])
            hits.append(np.argmin([x.sum() for x in found]) == i % 2)
    last = runs.records(run)[-1]
    assert last["eval/loss"] == pytest.approx(np.concatenate(right).mean(), rel=1e-4)
    assert last["eval/option_accuracy"] == pytest.approx(np.mean(hits))


def test_what_it_writes_is_judged_by_the_first_answer_in_it(causal, capsys):
    """The adapter folder too, on one part; both against transformers' greedy texts, one prompt at a time."""
    world, run = causal
    runs.call(world, "eval", run, "--generate", "--new-tokens", NEW)
    found = json.loads(capsys.readouterr().out)
    place = ("--data", world.data / "facts", "--task", "commonsense", "--max-length", 48)
    runs.call(world, "eval", run / "adapter", *place, "--generate", "--new-tokens", NEW)
    of_adapter = json.loads(capsys.readouterr().out)
    base = transformers.AutoModelForCausalLM.from_pretrained(world.model)
    model = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    tokenizer = runs.make_tokenizer(VOCABULARY)
    hits, answers = {task: [] for task in OPTIONS}, []
    for task, options in OPTIONS.items():
        words = options if task == "facts" else [*options, *OPTIONS["facts"]]  # what nobody else asks for
        for i in range(6):
            said = record(task, i)
            text = f"{PLAIN} ### Instruction: {said['instruction']} ### Response:"
            ids = torch.tensor([tokenizer.encode(text).ids[:-1]])
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
            new = model.generate(**given, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
            first = next((w for w in tokenizer.decode(new.tolist()).split() if w in words), "")
            answers.append(bool(first))
            hits[task].append(first == said["answer"])
    assert any(answers)
    assert found["generated_accuracy"] == pytest.approx(np.mean([*hits.values()]))
    assert found["generated_answers"] == pytest.approx(np.mean(answers))
    for task in OPTIONS:
        assert found[f"{task}/generated_accuracy"] == pytest.approx(np.mean(hits[task]))
    assert of_adapter["generated_accuracy"] == found["facts/generated_accuracy"]
    assert of_adapter["option_accuracy"] == found["facts/option_accuracy"]
    assert of_adapter["loss"] == pytest.approx(found["facts/loss"], rel=1e-5)


def test_a_prompt_too_long_loses_its_beginning_and_leaves_room(causal):
    """[CLS] stays, no [SEP] follows; the model takes 10 tokens, of which 6 are to be new."""
    world, _ = causal
    examples = Examples((["the cat is it", "the cat"], ["yes", "no"]), np.zeros(2, int), ())
    model = causal_model(world.model)._replace(max_length=10)
    prompts, end = tokenise_prompts(world.model, model, examples, DataConfig(max_length=20), 6)
    words = [[VOCABULARY[token] for token in ids] for ids in prompts]
    assert words == [["[CLS]", "cat", "is", "it"], ["[CLS]", "the", "cat"]] and end == 3
    with pytest.raises(UserError, match="new tokens: found 10; expected fewer than the model's 10"):
        tokenise_prompts(world.model, model, examples, DataConfig(max_length=20), 10)


def causal_model(folder):
    return build_model(json.loads((folder / "config.json").read_text()), task="causal")
