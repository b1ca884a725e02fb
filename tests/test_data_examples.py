"""Every format gives the same examples; every fault is one line that names the file and the place."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fslora_jax.data.examples import Columns, Examples, labelled, measured, split_examples
from fslora_jax.data.records import read_file, read_hub
from fslora_jax.errors import UserError

TEXTS = ['a "stray quote', "two, with a comma", "tschüß \u2028 and \x85 inside", "last"]
LABELS = ["10", "9", "9", "10"]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(path: Path, text_columns=("text",), label_column="label", label_names=None) -> Examples:
    columns = Columns(tuple(text_columns), label_column)
    return labelled(read_file(path, columns.all), columns, label_names)


def load_hub(name: str, split: str, text_columns, label_column: str) -> Examples:
    columns = Columns(tuple(text_columns), label_column)
    return labelled(read_hub(name, split, columns.all), columns)


def error_of(path: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message.removeprefix(str(path))


def contents() -> dict[str, str]:
    quoted = [text.replace('"', '""') for text in TEXTS]
    records = [{"text": t, "label": int(x)} for t, x in zip(TEXTS, LABELS, strict=True)]
    pairs = list(zip(TEXTS, LABELS, strict=True))
    return {
        "x.tsv": "text\tlabel\n" + "".join(f"{t}\t{x}\n" for t, x in pairs),
        "windows.tsv": "\ufefftext\tlabel\r\n" + "".join(f"{t}\t{x}\r\n" for t, x in pairs),
        "x.csv": "text,label\n" + "".join(f'"{t}",{x}\n' for t, x in zip(quoted, LABELS, strict=True)),
        "x.jsonl": "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n",
        "X.JSON": json.dumps(records, indent=1),
    }


@pytest.mark.parametrize("name", contents())
def test_every_format_gives_the_same_examples(tmp_path, name):
    examples = load(write(tmp_path, name, contents()[name]))
    assert examples.texts == (TEXTS,)
    assert examples.label_names == ("9", "10")
    assert examples.labels.tolist() == [1, 0, 0, 1]
    assert examples.labels.dtype == np.int32


def test_columns_without_a_header_are_positions(tmp_path):
    path = write(tmp_path, "x.tsv", "gj04\t1\t\tfirst\ngj04\t0\t*\tsecond")
    examples = load(path, text_columns=["3"], label_column="1")
    assert examples.texts == (["first", "second"],)
    assert examples.labels.tolist() == [1, 0]


def test_pairs_and_given_label_names(tmp_path):
    path = write(tmp_path, "x.csv", 'a,b,label\np,"q\nr",yes\ns,t,no\n')
    examples = load(path, text_columns=["b", "a"], label_names=["yes", "no", "never"])
    assert examples.texts == (["q\nr", "t"], ["p", "s"])
    assert examples.label_names == ("yes", "no", "never")
    assert examples.labels.tolist() == [0, 1]


FAULTS = {
    "empty": ("x.csv", "", ": holds no examples"),
    "only a header": ("x.csv", "text,label\n", ": holds no examples"),
    "no records": ("x.json", "\n", ": holds no examples"),
    "format": ("x.xml", "<a/>", ": unknown format '.xml'"),
    "encoding": ("x.csv", b"\xef\xbb\xbftext,label\nok,1\n\xff,0\n", ", line 3: not UTF-8 at byte 19"),
    "text column": (
        "x.tsv",
        "body\tlabel\na\t1\n",
        ", line 1: no columns named 'text'; the columns are",
    ),
    "label column": (
        "x.csv",
        "text,y\na,1\n",
        ", line 1: no columns named 'label'; the columns are",
    ),
    "twice": ("x.csv", "text,label,text\na,1,b\n", ", line 1: 2 columns named 'text'"),
    "key": ("x.jsonl", '{"text":"a","label":1}\n{"text":"b"}', ", line 2: no columns named 'label'"),
    "short row": ("x.tsv", "text\tlabel\na\t1\nb\n", ", line 3: found 1 fields; expected 2"),
    "long row": ("x.csv", 'text,label\n"a\nb",1\nc,d,0\n', ", line 4: found 3 fields; expected 2"),
    "open quote": ("x.csv", 'text,label\na,1\n"b,0\nc,1\n', ", line 3: malformed row"),
    "json line": ("x.jsonl", '{"text":"a","label":1}\n\n{"text":\n', ", line 3, column 9: malformed JSON"),
    "json": ("x.json", '\n[{"text": "a",\n  "label": }]', ", line 3, column 12: malformed JSON"),
    "no list": ("x.json", '{"data": []}', ", line 1: found {'data': []}; expected a list"),
    "no object": (
        "x.jsonl",
        '{"text":"a","label":1}\n["b",0]',
        ", line 2: found ['b', 0]; expected an",
    ),
    "null text": (
        "x.jsonl",
        '{"text":null,"label":1}',
        ", line 1: column 'text' holds None; expected",
    ),
    "null label": ("x.json", '[{"text":"a","label":null}]', ", record 1: column 'label' holds None"),
    "float label": ("x.jsonl", '{"text":"a","label":1.5}', ", line 1: column 'label' holds 1.5"),
    "blank label": ("x.csv", "text,label\na,1\nb,\n", ", line 3: column 'label' holds ''"),
    "half a character": ("x.json", '[{"text":"\\ud800","label":1}]', ", record 1: column 'text' has half a"),
    "nested": ("x.json", "[" * 100_000, ", line 1: nested too deeply"),
    "one label": ("x.csv", "text,label\na,1\nb,1\n", ": every label is '1'; expected at least two"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_the_file_and_the_place(tmp_path, fault):
    name, content, expected = FAULTS[fault]
    assert error_of(write(tmp_path, name, content)).startswith(expected)


def test_a_label_outside_label_names(tmp_path):
    path = write(tmp_path, "x.csv", "text,label\na,1\nb,2\n")
    assert error_of(path, label_names=["0", "1"]) == ", line 3: label '2' is not among label_names ('0', '1')"


def test_a_missing_file_and_a_folder(tmp_path):
    assert "No such file" in error_of(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "Is a directory" in error_of(tmp_path / "folder.csv")


def test_a_missing_position_lists_those_there_are(tmp_path):
    path = write(tmp_path, "x.tsv", "a\t1\nb\t0\n")
    expected = ", line 1: no columns named '3'; the columns are '0', '1'"
    assert error_of(path, text_columns=["3"], label_column="1") == expected


@pytest.mark.parametrize("options", [{"text_columns": []}, {"label_names": ["1", "2", "1"]}])
def test_bad_arguments(tmp_path, options):
    path = write(tmp_path, "x.csv", "text,label\na,1\nb,2\n")
    with pytest.raises(UserError, match=r"text_columns has 0 names|label_names repeats a name"):
        load(path, **options)


@given(n=st.integers(2, 40), data=st.data())
def test_a_holdout_divides_the_examples(n, data):
    num_test = data.draw(st.integers(1, n - 1))
    examples = Examples(
        ([str(i) for i in range(n)],), np.arange(n, dtype=np.int32), tuple(map(str, range(n)))
    )
    train, test = split_examples(examples, num_test, np.random.default_rng(0))
    again, _ = split_examples(examples, num_test, np.random.default_rng(0))
    assert len(test.labels) == num_test
    assert train.texts == again.texts
    for part in (train, test):
        assert part.texts[0] == [str(i) for i in part.labels] == sorted(part.texts[0], key=int)
    assert sorted([*train.labels, *test.labels]) == list(range(n))


@pytest.mark.parametrize("num_test", [-1, 0, 4, 5])
def test_a_holdout_out_of_range(num_test):
    examples = Examples((["a"] * 4,), np.arange(4, dtype=np.int32), ("0", "1"))
    with pytest.raises(UserError, match=f"test_examples is {num_test}; expected 1 to 3"):
        split_examples(examples, num_test, np.random.default_rng(0))


def hub(monkeypatch, columns: dict, names: list[str] | None = None) -> list:
    calls = []
    data = datasets.Dataset.from_dict(columns)
    if names:
        data = data.cast_column("label", datasets.ClassLabel(names=names))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: calls.append((args, options)) or data
    )
    return calls


def test_the_hub_declares_label_names(monkeypatch):
    calls = hub(monkeypatch, {"text": ["a", "b"], "label": [1, 0], "idx": [0, 1]}, ["pos", "neg", "none"])
    found = load_hub("owner/name:sst2", split="train", text_columns=["text"], label_column="label")
    assert calls == [(("owner/name", "sst2"), {"split": "train"})]
    assert found.texts == (["a", "b"],)
    assert found.label_names == ("pos", "neg", "none")
    assert found.labels.tolist() == [1, 0]


def test_the_hub_without_label_names(monkeypatch):
    calls = hub(monkeypatch, {"text": ["a", "b", "c"], "label": [10, 9, 10]})
    found = load_hub("name", split="dev", text_columns=["text"], label_column="label")
    assert calls == [(("name", None), {"split": "dev"})]
    assert (found.label_names, found.labels.tolist()) == (("9", "10"), [1, 0, 1])


def test_an_unlabelled_split_of_the_hub_is_refused(monkeypatch):
    hub(monkeypatch, {"text": ["a", "b"], "label": [-1, 0]}, ["neg", "pos"])
    with pytest.raises(UserError, match=r"data set name, split test, row 0: label '-1' is not among"):
        load_hub("name", split="test", text_columns=["text"], label_column="label")


def test_the_hub_names_a_missing_column(monkeypatch):
    hub(monkeypatch, {"sentence": ["a", "b"], "label": [1, 0]})
    with pytest.raises(UserError, match="no columns named 'text'; the columns are 'sentence', 'label'"):
        load_hub("name", split="train", text_columns=["text"], label_column="label")


def test_a_failing_hub_is_one_line(monkeypatch):
    def fail(*args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"^data set name, split train: .*ConnectionError: no route to host"):
        load_hub("name", split="train", text_columns=["text"], label_column="label")


def test_long_lines_and_control_characters(tmp_path):
    text = "long " * 250_000 + "\x00\x07 \u202e end"
    table = read_file(write(tmp_path, "x.tsv", f"text\tlabel\n{text}\t1\nb\t0\n"), ["text", "label"])
    assert labelled(table, Columns(("text",), "label")).texts[0][0] == text
    quoted = read_file(write(tmp_path, "x.csv", f'text,label\n"{text}",1\nb,0\n'), ["text", "label"])
    assert labelled(quoted, Columns(("text",), "label")).texts[0][0] == text


def test_labels_by_number_where_the_names_are_words(tmp_path):
    path = write(tmp_path, "x.csv", "text,label\na,1\nb,neg\n")
    assert load(path, label_names=["neg", "pos"]).labels.tolist() == [1, 0]
    with pytest.raises(UserError, match=r"label '2' is not among label_names \('neg', 'pos'\)"):
        load(write(tmp_path, "y.csv", "text,label\na,1\nb,2\n"), label_names=["neg", "pos"])
    with pytest.raises(UserError, match="label '0' is not among"):
        load(write(tmp_path, "z.csv", "text,label\na,1\nb,0\n"), label_names=["1", "2"])


def test_numbers_to_predict(tmp_path):
    columns = Columns(("a", "b"), "score", group="by")
    path = write(tmp_path, "x.csv", "a,b,score,by\np,q,1.25,me\nr,s,-3,you\n")
    found = measured(read_file(path, columns.all), columns)
    assert found.texts == (["p", "r"], ["q", "s"])
    assert found.labels.tolist() == [1.25, -3]
    assert (found.label_names, found.groups) == ((), ("me", "you"))
    for bad in ("high", "nan", "inf", ""):
        path = write(tmp_path, "y.csv", f"a,b,score,by\np,q,{bad},me\n")
        with pytest.raises(UserError, match=r"line 2: column 'score' holds .*; expected a number"):
            measured(read_file(path, columns.all), columns)


def test_parquet_keeps_the_names_of_its_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})
    data = data.cast_column("label", datasets.ClassLabel(names=["yes", "no"]))
    data.to_parquet(tmp_path / "x.parquet")
    found = load(tmp_path / "x.parquet")
    assert (found.label_names, found.labels.tolist()) == (("yes", "no"), [1, 0])
    assert error_of(tmp_path / "x.parquet", text_columns=["body"]).startswith(": no columns named 'body'")
