"""Metrics files that survive a kill, and optional loggers."""

import json

import pytest

from fslora_jax.errors import UserError
from fslora_jax.log import JsonLines, open_loggers, read_records


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fill(path, rounds: int) -> None:
    log = JsonLines(path, 0)
    for t in range(rounds):
        log.write({"round": t, "train/loss": 0.5**t})
    log.close()


def test_records_come_back_as_they_were(tmp_path):
    fill(tmp_path / "m.jsonl", 3)
    assert read_records(tmp_path / "m.jsonl") == [{"round": t, "train/loss": 0.5**t} for t in range(3)]


def test_a_record_is_on_disk_before_the_next_round(tmp_path):
    log = JsonLines(tmp_path / "m.jsonl", 0)
    log.write({"round": 0})
    assert lines(tmp_path / "m.jsonl") == [{"round": 0}]
    log.close()


@pytest.mark.parametrize("keep", range(4))
def test_going_on_drops_rounds_beyond_the_checkpoint(tmp_path, keep):
    path = tmp_path / "m.jsonl"
    fill(path, 4)
    log = JsonLines(path, keep)
    log.write({"round": keep + 1, "train/loss": 9.0})
    log.close()
    assert [r["round"] for r in lines(path)] == list(range(keep + 2))
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    fill(path, 3)
    path.write_bytes(path.read_bytes()[:-cut])
    JsonLines(path, 9).close()
    assert [r["round"] for r in lines(path)] == ([0, 1, 2] if cut == 1 else [0, 1])


def test_a_file_that_is_not_there_has_no_records(tmp_path):
    assert read_records(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_logger_without_its_package_says_what_to_install(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=rf"loggers: {name} needs the package {package}; pip install"):
        open_loggers([name], tmp_path, 0)


def test_an_optional_logger_gets_what_the_file_gets(tmp_path, monkeypatch):
    """Through a stand-in for tensorboardX, which is not a dependency of the tests."""
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            seen.append((folder, purge_step))

        def add_scalar(self, *arguments):
            seen.append(arguments)

        def close(self):
            seen.append("closed")

    module = type("tensorboardX", (), {"SummaryWriter": SummaryWriter})
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", module)
    loggers = open_loggers(["tensorboard"], tmp_path, 2)
    for logger in loggers:
        logger.write({"round": 3, "train/loss": 0.5})
        logger.close()
    assert seen == [(str(tmp_path / "tensorboard"), 3), ("train/loss", 0.5, 3), "closed"]
    assert lines(tmp_path / "metrics.jsonl") == [{"round": 3, "train/loss": 0.5}]
