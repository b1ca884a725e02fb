"""Tasks by name: where the data lies, how a record becomes an example, what a model is and how it is measured."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from fslora_jax.data.examples import Columns, Prompted
from fslora_jax.data.prompts import alpaca, commonsense, text

Kind = Literal["classification", "regression", "causal"]


class Home(NamedTuple):
    """Where a public data set lies on the hub, and how its original TSV files differ from the hub's.

    ``splits`` are the one to train on and the held-out one. ``columns`` are the hub's, ``original`` those of the
    TSV files, of which ``skip_short`` says that some rows are damaged.
    """

    hub: str
    splits: tuple[str, str]
    columns: Columns
    original: Columns
    skip_short: bool = False


class TaskType(NamedTuple):
    """What data asks of a model, and the names in ``metrics.METRICS`` that measure it.

    ``home`` is None for data of a user's own; a classification then has the config's columns. ``files`` are those
    of a local folder, to train on and held out. ``label_names`` are the hub's, in its order. ``columns`` and
    ``render`` make a language model's prompt and completion of a record; ``render`` is None where the model's own
    chat template does.
    """

    kind: Kind
    metrics: tuple[str, ...]
    home: Home | None = None
    files: tuple[str, str] | None = None
    label_names: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ()
    render: Callable[[str, dict[str, Any]], Prompted] | None = None


def _glue(
    config: str,
    metrics: tuple[str, ...],
    names: tuple[str, ...],
    texts: tuple[str, ...],
    original: Columns | None = None,
    *,
    held_out: tuple[str, str] = ("validation", "dev.tsv"),
    skip_short: bool = False,
) -> TaskType:
    columns = Columns(texts, "label")
    home = Home(
        hub=f"nyu-mll/glue:{config}",
        splits=("train", held_out[0]),
        columns=columns,
        original=original or columns,
        skip_short=skip_short,
    )
    kind = "classification" if names else "regression"
    return TaskType(kind, metrics, home, ("train.tsv", held_out[1]), names or None)


_PAIR = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")
_CORRELATIONS = ("pearson", "spearmanr")

TASKS: dict[str, TaskType] = {
    "classification": TaskType("classification", ("accuracy",)),
    "regression": TaskType("regression", _CORRELATIONS),
    # GLUE (arXiv 1804.07461), with its official metrics; WNLI's held-out labels are adversarial to its training's.
    "cola": _glue(
        "cola",
        ("matthews_correlation", "accuracy"),
        ("unacceptable", "acceptable"),
        ("sentence",),
        Columns(("3",), "1"),
    ),
    "sst2": _glue("sst2", ("accuracy",), ("negative", "positive"), ("sentence",)),
    "mrpc": _glue(
        "mrpc",
        ("accuracy", "f1"),
        ("not_equivalent", "equivalent"),
        _PAIR,
        Columns(("#1 String", "#2 String"), "Quality"),
    ),
    "stsb": _glue("stsb", _CORRELATIONS, (), _PAIR, Columns(_PAIR, "score")),
    "qqp": _glue(
        "qqp",
        ("accuracy", "f1"),
        ("not_duplicate", "duplicate"),
        _QUESTIONS,
        Columns(_QUESTIONS, "is_duplicate"),
        skip_short=True,
    ),
    "mnli": _glue(
        "mnli",
        ("accuracy",),
        _MNLI,
        ("premise", "hypothesis"),
        Columns(_PAIR, "gold_label"),
        held_out=("validation_matched", "dev_matched.tsv"),
    ),
    "mnli_mismatched": _glue(
        "mnli",
        ("accuracy",),
        _MNLI,
        ("premise", "hypothesis"),
        Columns(_PAIR, "gold_label"),
        held_out=("validation_mismatched", "dev_mismatched.tsv"),
    ),
    "qnli": _glue("qnli", ("accuracy",), _ENTAILMENT, ("question", "sentence")),
    "rte": _glue("rte", ("accuracy",), _ENTAILMENT, _PAIR),
    "wnli": _glue("wnli", ("accuracy",), ("not_entailment", "entailment"), _PAIR),
    # Language models.
    "commonsense": TaskType(
        "causal",
        (),
        files=("train.json", "test.json"),
        columns=("instruction", "input", "output", "answer"),
        render=commonsense,
    ),
    "alpaca": TaskType("causal", (), columns=("instruction", "output"), render=alpaca),
    "chat": TaskType("causal", (), columns=("messages",)),
    "text": TaskType("causal", (), columns=("text",), render=text),
}
