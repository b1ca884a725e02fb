"""Settings that are chosen by trials: which one was best, and the point with what was chosen."""

from pathlib import Path

from fslora_jax.config import make_config
from fslora_jax.errors import UserError
from fslora_jax.metrics import headline
from fslora_jax.rundir import read_summary
from fslora_jax.study.points import Choice, Point, nested

DIVERGED = "diverged.txt"
"""In the folder of a trial that diverged: what was said of it. It counts as the worst, and is not run again."""


def settled(out: Path, point: Point) -> Point | None:
    """A point whose remaining settings are those of its best trial; None while trials are not finished.

    Of equal trials the first wins.

    Raises:
      UserError: all trials diverged, or their metric is not one that the task has.
    """
    if not point.choices:
        return point
    finished = [choice for choice in point.choices if not (out / choice.trial.name / DIVERGED).exists()]
    if not finished:
        raise UserError(f"all {len(point.choices)} trials diverged; let `tune` try smaller learning rates")
    summaries = [read_summary(out / choice.trial.name) for choice in finished]
    worth = [worth_of(point, summary["after"]) for summary in summaries if summary is not None]
    if len(worth) < len(finished):
        return None
    return with_choice(point, finished[worth.index(max(worth))])


def worth_of(point: Point, after: dict[str, float]) -> float:
    """What a trial is judged by, greater is better."""
    metric = headline([after]) if point.by is None else f"eval/{point.by}"
    if metric not in after:
        names = ", ".join(name.removeprefix("eval/") for name in after)
        raise UserError(f"tune.by: found {point.by}, expected one of {names}")
    return -after[metric] if metric == "eval/loss" else after[metric]


def with_choice(point: Point, choice: Choice) -> Point:
    """The point with the settings of a choice, which are also places on the choice's axes."""
    config = make_config(nested(point.config.model_dump(), choice.settings, point.name), point.name)
    return point._replace(config=config, labels=point.labels | choice.labels, choices=())
