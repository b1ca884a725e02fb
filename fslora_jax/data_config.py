"""Settings of the data: where texts are, how they are split, tokenised and batched."""

from typing import Literal

from fslora_jax.settings import Count, Fraction, Section

Glue = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli_mismatched", "qnli", "rte", "wnli"]
TaskName = Literal["classification", "regression", Glue, "commonsense", "alpaca", "chat", "text"]


class DataConfig(Section):
    """Labelled texts, how they are split, tokenised and batched."""

    task: TaskName = "classification"
    """`classification` and `regression` have the columns below; a GLUE task knows its own columns, labels and
    metrics; `commonsense`, `alpaca`, `chat` and `text` train a language model on instructions or plain text."""
    name: str | None = None
    """Local .tsv, .csv, .json, .jsonl or .parquet file, a folder with a task's original files, or a Hugging Face data
    set id (`owner/name:config`); by default a GLUE task's own place on the hub."""
    parts: tuple[str, ...] = ()
    """Folders below `name`, each a task to train on together, such as ARC-Easy and boolq."""
    split: str | None = None
    """Split of a hub data set to train on; by default train."""
    test_name: str | None = None
    """The held-out examples, as `name`; without one, those of a task's folder or hub data set, or else
    `test_examples` of the training data."""
    test_split: str | None = None
    """Split of a hub data set that is held out; by default the task's own."""
    test_examples: Count = 1000
    """Number of examples held out at random, where nothing else says which."""
    max_test_examples: Count | None = None
    """At most so many of the held-out examples, drawn at random; by default all."""
    validation: Fraction = 0.0
    """Part of the training examples, drawn at random, that is held out in place of the test examples: to choose
    settings by, before anything is tested."""
    learn: Literal["completion", "all"] = "completion"
    """What a language model learns to predict: the answers, or every token."""
    text_columns: tuple[str, ...] = ("text",)
    """One column, or two for sentence pairs; numbers are positions in a file without a header."""
    label_column: str = "label"
    """Column with the label."""
    client_column: str | None = None
    """Column that says whose an example is, for the partition `natural`."""
    label_names: tuple[str, ...] | None = None
    """All labels in order; by default those that occur, sorted."""
    max_length: Count = 128
    """Longer texts are truncated to this many tokens."""
    row_length: Count | None = None
    """Tokens of a packed row; by default the length with which batches need the fewest."""
    packing: bool = True
    """Several short examples in one row (exact, and much faster), or one padded example a row."""
