"""The figures of a run."""

import matplotlib.image
import pytest

from fslora_jax.figures import run_figures

NAMES = ("accuracy.png", "loss.png", "traffic.png")


def history(rounds: int, every: int = 2, slope: float = 0.1) -> list[dict]:
    """Metrics as a run writes them."""
    found = []
    for t in range(rounds + 1):
        record = {"round": t}
        if t:
            record |= {"train/loss": 1 / t, "traffic/down_bytes": 3000 * t, "traffic/up_bytes": 2000 * t}
        if t % every == 0 or t == rounds:
            record |= {"eval/loss": 2 - slope * t, "eval/accuracy": slope * t}
        found.append(record)
    return found


@pytest.mark.parametrize("rounds", [1, 6])
def test_three_pictures_are_drawn(tmp_path, rounds):
    run_figures(history(rounds), tmp_path / "figures")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(NAMES)
    for name in NAMES:
        picture = matplotlib.image.imread(tmp_path / "figures" / name)
        assert picture.shape[:2] == (600, 900)
        assert picture[..., :3].min() < 0.5  # not an empty page


def test_the_same_numbers_give_the_same_bytes_and_others_do_not(tmp_path):
    for folder, slope in (("a", 0.1), ("b", 0.1), ("c", 0.09)):
        run_figures(history(4, slope=slope), tmp_path / folder)
    for name in NAMES:
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b
        assert a != c
        assert b"Software" not in a


def test_every_series_is_in_its_picture(tmp_path, monkeypatch):
    """Read back from the axes rather than from pixels."""
    from fslora_jax import figures

    drawn = {}
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.update({path.name: figure.axes[0]}))
    run_figures(history(4), tmp_path)
    lines = {name: [line.get_xydata().tolist() for line in axes.lines] for name, axes in drawn.items()}
    assert lines["accuracy.png"] == [[[0, 0], [2, 0.2], [4, 0.4]]]
    assert lines["loss.png"][0] == [[t, 1 / t] for t in (1, 2, 3, 4)]
    assert lines["loss.png"][1] == [[0, 2], [2, 1.8], [4, 1.6]]
    assert lines["traffic.png"][0] == [[0, 0], [0.004, 0.2], [0.008, 0.4]]
    assert lines["traffic.png"][1] == [[0, 0], [0.006, 0.2], [0.012, 0.4]]
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in drawn.values())


def test_a_run_has_them_beside_the_picture_of_its_clients(finished):
    assert sorted(path.name for path in (finished / "figures").iterdir()) == sorted([*NAMES, "partition.png"])
