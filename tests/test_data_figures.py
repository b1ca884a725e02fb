"""The figure of a partition: the same bytes each time, and a size that follows the clients."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from fslora_jax import figures
from fslora_jax.data.partition import LISTED
from fslora_jax.figures import OKABE_ITO, partition_figure


def draw(path: Path, clients: int, labels: int, seed: int = 0) -> np.ndarray:
    counts = np.random.default_rng(seed).integers(1, 50, (clients, labels))
    partition_figure(counts, [f"name {i}" for i in range(labels)], path)
    return imread(path)


@pytest.mark.parametrize(("clients", "labels"), [(1, 2), (20, 3), (60, 2), (10, 12)])
def test_the_same_numbers_give_the_same_bytes(tmp_path, clients, labels):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw(tmp_path / name, clients, labels, seed)
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != other


def test_bars_have_the_lengths_of_the_counts(tmp_path):
    path = tmp_path / "figure.png"
    partition_figure(np.array([[30, 10], [0, 20]]), ["a", "b"], path)
    image = (imread(path)[..., :3] * 255).round().astype(int)[80:]  # below the legend
    colours = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in OKABE_ITO[:2]]
    widths = [(image == colour).all(-1).sum(1) for colour in colours]
    unit = max(widths[1]) / 20
    found = [{round(w / unit) for w in row if w > 5} for row in widths]
    assert found == [{30}, {10, 20}]


def test_two_hundred_clients_are_legible(tmp_path):
    image = draw(tmp_path / "a", 200, 2)
    assert len(image) / 200 > 6  # pixels a client
    assert len(draw(tmp_path / "b", 10, 2)) < 500


def test_names_are_no_mathematics(tmp_path):
    partition_figure(np.array([[1, 2]]), ["$x^$", "_b"], tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_of_a_million_clients_the_first_are_drawn(tmp_path, monkeypatch):
    counts = np.random.default_rng(0).integers(1, 50, (1_000_000, 2))
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    partition_figure(counts, ["a", "b"], tmp_path / "a.png")
    assert len(drawn[0].patches) == 2 * LISTED
    assert drawn[0].get_ylabel() == "client (the first 1,000 of 1,000,000)"
