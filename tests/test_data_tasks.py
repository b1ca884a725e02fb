"""Each task against its data: GLUE as the hub has it and as its own files have it, prompts to the letter, chats."""

import json
import os
from pathlib import Path
from typing import get_args

import datasets
import numpy as np
import pytest
import transformers
from runs import make_tokenizer

from fslora_jax.data.chat import chat_prompts
from fslora_jax.data.prompts import alpaca, commonsense
from fslora_jax.data.tasks import TASKS
from fslora_jax.data_config import DataConfig, TaskName
from fslora_jax.errors import UserError
from fslora_jax.federation.examples import find_examples, load_examples
from fslora_jax.metrics import METRICS

NOWHERE = Path("no model")
DATA = os.environ.get("FSLORA_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="FSLORA_DATA names no folder with GLUE and commonsense")
GLUE = [name for name, task in TASKS.items() if task.home]


def flat(annotation) -> set[str]:
    return set().union(*(flat(x) if get_args(x) else {x} for x in get_args(annotation)))


def test_the_config_knows_every_task():
    assert flat(TaskName) == set(TASKS)
    assert all(metric in METRICS for task in TASKS.values() for metric in task.metrics)


def texts_and_label(task: str, i: int) -> tuple[list[str], int | float]:
    """A made example of a task, as the hub has it: its label is a number."""
    names = TASKS[task].label_names
    return [f'text {i} "', f"other {i}"][: len(TASKS[task].home.columns.texts)], i % len(
        names
    ) if names else i / 2


def write_original(folder: Path, task: str) -> None:
    """The task's own files: columns that nobody reads are there as well, and some have the labels' names."""
    folder.mkdir()
    home, names = TASKS[task].home, TASKS[task].label_names
    for number, file in zip((6, 4), TASKS[task].files, strict=True):
        rows = []
        for i in range(number):
            texts, label = texts_and_label(task, i)
            shown = names[label] if task in ("rte", "qnli", "mnli", "mnli_mismatched") else label
            row = {"0": "extra"} | dict(zip(home.original.texts, texts, strict=True))
            rows.append(row | {home.original.label: str(shown), "2": "extra"})
        headerless = home.original.label.isdigit()
        lines = ["\t".join(row[name] for name in (sorted(row) if headerless else row)) for row in rows]
        (folder / file).write_text("\n".join(lines if headerless else ["\t".join(rows[0]), *lines]) + "\n")


@pytest.mark.parametrize("task", GLUE)
def test_original_files_and_the_hub_give_the_same(task, tmp_path, monkeypatch):
    home, names = TASKS[task].home, TASKS[task].label_names
    write_original(tmp_path / "glue", task)
    train, test = load_examples(DataConfig(task=task, name=str(tmp_path / "glue")), 0, NOWHERE)
    assert (len(train.labels), len(test.labels)) == (6, 4)
    assert train.label_names == (names or ())

    def load_dataset(repository, config, split):
        assert f"{repository}:{config}" == home.hub
        found = [texts_and_label(task, i) for i in range({home.splits[0]: 6, home.splits[1]: 4}[split])]
        columns = {name: [texts[n] for texts, _ in found] for n, name in enumerate(home.columns.texts)}
        data = datasets.Dataset.from_dict(columns | {"label": [label for _, label in found]})
        return data.cast_column("label", datasets.ClassLabel(names=list(names))) if names else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("fslora_jax.hub._ask_hub", lambda *args: None)
    for mine, theirs in zip((train, test), load_examples(DataConfig(task=task), 0, NOWHERE), strict=True):
        assert mine.texts == theirs.texts
        assert mine.labels.tolist() == theirs.labels.tolist()
        assert mine.label_names == theirs.label_names


def test_a_local_copy_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "glue"
    (folder / "rte").mkdir(parents=True)
    for split, count in (("train", 6), ("validation", 4)):
        columns = {
            "sentence1": ["a"] * count,
            "sentence2": ["b"] * count,
            "label": [i % 2 for i in range(count)],
        }
        data = datasets.Dataset.from_dict(columns)
        data = data.cast_column("label", datasets.ClassLabel(names=list(TASKS["rte"].label_names)))
        data.to_parquet(folder / "rte" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: rte\n  data_files:\n"
        + "".join(f"  - {{split: {s}, path: rte/{s}-*}}\n" for s in ("train", "validation"))
        + "---\n"
    )
    train, test = load_examples(DataConfig(task="rte", name=str(folder)), 0, NOWHERE)
    assert (len(train.labels), test.labels.tolist()) == (6, [0, 1, 0, 1])


def test_damaged_rows_of_qqp_are_passed_over(tmp_path):
    write_original(tmp_path / "qqp", "qqp")
    with (tmp_path / "qqp" / "train.tsv").open("a") as file:
        file.write("half a row\n")
    assert len(find_examples(DataConfig(task="qqp", name=str(tmp_path / "qqp")), NOWHERE).labels) == 6


def test_data_without_a_place():
    with pytest.raises(UserError, match=r"^data\.name: missing; expected a file"):
        find_examples(DataConfig(), NOWHERE)


@needs_data
@pytest.mark.parametrize(
    ("task", "folder", "train", "dev"),
    [
        ("sst2", "SST-2", 67_349, 872),
        ("cola", "CoLA", 8_551, 1_043),
        ("mrpc", "MRPC", 3_667, 408),
        ("rte", "RTE", 2_490, 277),
    ],
)
def test_real_glue(task, folder, train, dev):
    found = load_examples(DataConfig(task=task, name=f"{DATA}/glue/{folder}"), 0, NOWHERE)
    for examples, count in zip(found, (train, dev), strict=True):
        assert [len(texts) for texts in examples.texts] == [count] * len(examples.texts)
        assert examples.label_names == TASKS[task].label_names
        assert all(np.bincount(examples.labels) > count / 5)
        assert all(text.strip() for texts in examples.texts for text in texts)


PAPER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
    "\n                ### Instruction:\n                {instruction}\n                "
    "\n                ### Response:\n                {output}"
)


def test_the_paper_s_prompt():
    record = {
        "instruction": "Is it?\n\nAnswer format: true/false",
        "input": "",
        "output": "the correct answer is false",
        "answer": "false",
    }
    found = commonsense("here", record)
    assert found.prompt + found.completion == PAPER.format(**record)
    assert found.options == (" the correct answer is true", " the correct answer is false")
    assert found.completion == found.options[1]
    assert (
        "\n                ### Input:\n                More.\n"
        in commonsense("here", record | {"input": "More."}).prompt
    )


@pytest.mark.parametrize("change", [{"answer": "maybe"}, {"output": "no"}, {"instruction": "Is it?"}])
def test_an_answer_that_is_no_option(change):
    record = {"instruction": "?\nAnswer format: yes/no", "input": "", "output": "It is yes", "answer": "yes"}
    assert commonsense("here", record).names == ("yes", "no")
    with pytest.raises(UserError, match=r"^here: the answer is .*; expected one of the options"):
        commonsense("here", record | change)


@needs_data
def test_all_real_commonsense_records():
    counts = {"ARC-Challenge": 1172, "ARC-Easy": 2376, "boolq": 3270, "openbookqa": 500}
    counts |= {"piqa": 1838, "social_i_qa": 1954, "winogrande": 1267}
    data = DataConfig(task="commonsense", name=f"{DATA}/commonsense", parts=tuple(counts))
    found = find_examples(data, NOWHERE, held_out=True)
    assert {name: found.groups.count(name) for name in counts} == counts
    for completion, options, label in zip(found.texts[1], found.options, found.labels, strict=True):
        assert completion in options
        assert completion.endswith(found.label_names[label])


def test_parts_need_their_files(tmp_path):
    data = DataConfig(task="commonsense", name=str(tmp_path), parts=("ARC-Easy",))
    (tmp_path / "ARC-Easy").mkdir()
    with pytest.raises(UserError, match=r"ARC-Easy/train\.json: cannot read it \(No such file"):
        find_examples(data, NOWHERE)


def write_records(folder: Path, records: list) -> str:
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def test_alpaca_records(tmp_path):
    path = write_records(
        tmp_path,
        [{"instruction": "Add.", "input": "1 1", "output": "2"}, {"instruction": "Hi", "output": "Ho"}],
    )
    found = find_examples(DataConfig(task="alpaca", name=path), NOWHERE)
    assert found.texts[1] == ["2", "Ho"]
    assert "### Input:\n1 1\n" in found.texts[0][0]
    assert "Input" not in found.texts[0][1]
    assert found.texts[0][0] == alpaca("", {"instruction": "Add.", "input": "1 1", "output": "2"}).prompt
    with pytest.raises(UserError, match=r"data\.jsonl, line 1: the answer is empty"):
        find_examples(
            DataConfig(task="alpaca", name=write_records(tmp_path, [{"instruction": "a", "output": " "}])),
            NOWHERE,
        )


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "tschüß {{ 7 * 7 }}"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "c"},
]


def save_chat(folder: Path, template: str, **config) -> Path:
    make_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]"]).save(str(folder / "tokenizer.json"))
    content = {
        "chat_template": template,
        "bos_token": {"__type": "AddedToken", "content": "[CLS]"},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content | config))
    return folder


def test_chats_are_rendered_as_by_transformers(tmp_path):
    folder = save_chat(tmp_path, TEMPLATE)
    found = chat_prompts(folder)("here", {"messages": TURNS})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert found.prompt == theirs.apply_chat_template(TURNS[:-1], tokenize=False, add_generation_prompt=True)
    assert found.prompt + found.completion == theirs.apply_chat_template(TURNS, tokenize=False)
    assert found.completion == "c<|end|>\n"
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    assert chat_prompts(folder)("here", {"messages": TURNS}).completion == "c;"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "the chat template is damaged"),
        (
            "{{ raise_exception('no system turns') }}",
            r"here: the model's chat template refuses it \(no system turns\)",
        ),
        ("{{ messages.__class__.__mro__ }}", "refuses it"),
        ("{{ messages | length }}", "changes what was said before"),
        (None, "no chat template"),
    ],
)
def test_templates_that_are_refused(tmp_path, template, message):
    with pytest.raises(UserError, match=message):
        chat_prompts(save_chat(tmp_path, template))("here", {"messages": TURNS})


@pytest.mark.parametrize(
    "messages",
    [[], "hi", [{"role": "boss", "content": "a"}], TURNS[:2], [{"role": "assistant", "content": None}]],
)
def test_conversations_that_are_refused(tmp_path, messages):
    with pytest.raises(UserError, match=r"^here: "):
        chat_prompts(save_chat(tmp_path, TEMPLATE))("here", {"messages": messages})
