"""The studies in configs/studies: every one can be planned, and has the points that it says."""

from pathlib import Path

import pytest
import runs

from fslora_jax.federation.method import check_method
from fslora_jax.study import command
from fslora_jax.study.points import load_study, with_trials

FOLDER = Path(__file__).parents[1] / "configs/studies"
# Points of each grid and its trials
POINTS = {
    "aggregation": {"full": 8, "mixed": 8},
    "clients": {"all": 9, "ten": 6},
    "compression": {"compression": 54},
    "distributions": {"distributions": 18},
    "glue": {"federated": 24, "alone": 24, "central": 8},
    "heterogeneity": {"heterogeneity": 12, "heterogeneity.tuning": 16},
    "llama": {"methods": 4, "rank": 4, "ratio": 3},
    "local_steps": {"rounds": 15, "rounds.tuning": 20, "steps": 12, "steps.tuning": 16},
    "methods": {
        "compared": 36,
        "compared.tuning": 48,
        "mrpc": 36,
        "mrpc.tuning": 48,
        "others": 6,
        "others.tuning": 24,
        "larger": 72,
        "larger.tuning": 96,
    },
    "rank": {
        "untuned": 12,
        "tuned": 12,
        "tuned.tuning": 16,
        "untuned-mrpc": 12,
        "tuned-mrpc": 12,
        "tuned-mrpc.tuning": 16,
    },
    "ratio": {"untuned": 12, "tuned": 12, "tuned.tuning": 16},
    "roberta": {"methods": 84, "rank": 12, "ratio": 9},
    "sketching": {"sketching": 12, "sketching.tuning": 16},
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_studies_are_whole(path, world, tmp_path, capsys, monkeypatch):
    """Their points are valid configs, each with a method that fits it, and the plan shows them."""
    study, points = load_study(path, {})
    assert study.question.endswith("?")
    assert f"fslora study configs/studies/{path.name} --out " in path.read_text(encoding="utf-8")
    everything = with_trials(points)
    counts = {grid: sum(p.grid == grid for p in everything) for grid in {p.grid for p in everything}}
    assert counts == POINTS[path.stem]
    for point in everything:
        check_method(point.config)
    monkeypatch.setattr(command, "load_study", lambda *_: (study, points))  # reading takes most of the time
    runs.call(world, "study", path, "--plan", "--out", tmp_path / "out")
    shown = [line.replace("│", " ").split() for line in capsys.readouterr().err.splitlines()]
    assert {row[0]: row[1] for row in shown if len(row) == 6 and row[0] in counts} == {
        grid: str(count) for grid, count in counts.items()
    }
    assert not (tmp_path / "out").exists()


def test_rank_holds_what_a_client_trains_and_sends():
    """k = 8 and lora_alpha for every r, so the client's scale grows as the root of r."""
    _, points = load_study(FOLDER / "rank.yaml", {})
    for point in points:
        lora, (ratio,) = point.config.lora, point.config.federation.sketching_ratios
        assert ratio * lora.r == 8
        scale = lora.lora_alpha / lora.r**0.5 / ratio
        assert scale == pytest.approx(2 * lora.r**0.5)


def test_heterogeneity_compares_equal_means():
    _, points = load_study(FOLDER / "heterogeneity.yaml", {})
    ratios = {p.labels["ratios"]: p.config.federation.sketching_ratios for p in points}
    assert ratios["mean"] == (sum(ratios["mixed"]) / 4,)
    inverse = sum(1 / ratio for ratio in ratios["mixed"]) / 4
    assert 1 / ratios["same-noise"][0] == pytest.approx(inverse, abs=0.1)
    assert ratios["smallest"] == (min(ratios["mixed"]),)
