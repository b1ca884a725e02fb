"""A run that is killed, at any moment and several times, ends as one that never was: the same bytes."""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import runs
from forked import Forked

from fslora_jax import preemption
from fslora_jax.federation import summary

pytestmark = pytest.mark.usefixtures("programs_kept")

DIE = "import os, signal\ndie = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
IN_ROUND = """
from fslora_jax.federation.meter import Meter
measure = Meter.measure
Meter.measure = lambda self, t, *rest: die() if t + 1 == {round} else measure(self, t, *rest)
"""
HALF_A_CHECKPOINT = """
from pathlib import Path
from fslora_jax import checkpoint
from safetensors import flax
def save(self, directory, args):
    content = flax.save(checkpoint._by_name(args.tree))
    Path(directory / checkpoint.FILE).write_bytes(content[: len(content) // 2])
    if "{round}." in str(directory):
        die()
    Path(directory / checkpoint.FILE).write_bytes(content)
checkpoint._Handler.save = save
"""
BEFORE = """
import sys
sys.addaudithook(lambda event, args: event == {event!r} and {part!r} in str(args[0]) and die())
"""
# Name -> (what the child does to die, the rounds in its metrics, the checkpoints it leaves behind)
MOMENTS = {
    "in the first round": (IN_ROUND.format(round=1), [0], []),
    "before the first checkpoint": (IN_ROUND.format(round=2), [0, 1], []),
    "in a later round": (IN_ROUND.format(round=4), [0, 1, 2, 3], ["2"]),
    "in the writing of a checkpoint": (HALF_A_CHECKPOINT.format(round=4), [0, 1, 2, 3, 4], ["2"]),
    "before a checkpoint gets its name": (
        BEFORE.format(event="os.rename", part="/checkpoints/4.orbax-checkpoint-tmp"),
        [0, 1, 2, 3, 4],
        ["2"],
    ),
}
WAITING = """
import time
from pathlib import Path
from fslora_jax.display import TerminalDisplay
def show(self, *rest):
    Path({here!r}).touch()
    while not Path({go!r}).exists():
        time.sleep(0.01)
    time.sleep(0.5)
TerminalDisplay.round = show
"""


def arguments(world: runs.World, run: Path) -> tuple[object, ...]:
    return "train", world.config, "--run-dir", run


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_one_that_was_not(world, finished, tmp_path, moment):
    death, rounds, saved = MOMENTS[moment]
    run = tmp_path / "run"
    killed = runs.finish(runs.start(world, *arguments(world, run), driver=DIE + death))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [record["round"] for record in runs.records(run)] == rounds
    assert checkpoints(run) == saved
    assert not (run / "summary.json").exists()
    runs.call(world, *arguments(world, run))
    assert runs.results(run) == runs.results(finished)
    assert not list((run / "checkpoints").glob("*tmp*"))


def wait_for(path: Path, process: Forked, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_from_outside_at_random_moments_while_another_process_is_refused(
    world, finished, tmp_path, capsys
):
    run, chance = tmp_path / "run", random.Random(0)
    for attempt in "ab":
        here, go = tmp_path / f"{attempt}.here", tmp_path / f"{attempt}.go"
        process = runs.start(world, *arguments(world, run), driver=WAITING.format(here=str(here), go=str(go)))
        try:
            wait_for(here, process)
            capsys.readouterr()
            with pytest.raises(SystemExit) as caught:
                runs.call(world, *arguments(world, run))
            assert caught.value.code == 2
            err = capsys.readouterr().err
            assert err.startswith(f"fslora: error: {run}: another process is working in it")
            assert err.count("\n") == 1
            go.touch()
            time.sleep(chance.uniform(0, 0.6))
        finally:
            process.kill()
            process.communicate()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "train/lo')
    runs.call(world, *arguments(world, run))
    assert runs.results(run) == runs.results(finished)


class Camera:
    """Copies a folder before every file operation inside it: what a kill at that moment would leave behind."""

    def __init__(self, folder: Path, album: Path):
        self.folder, self.album, self.on = folder, album, False
        album.mkdir()

    def hook(self, event: str, args: tuple) -> None:
        changes = event in ("os.rename", "os.mkdir", "os.remove", "shutil.rmtree") or (
            event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        )
        if (
            self.on
            and changes
            and str(args[0]).startswith(f"{self.folder}/")
            and not str(args[0]).endswith(".lock")
        ):
            self.on = False
            shutil.copytree(self.folder, self.album / f"{len(list(self.album.iterdir())):03}")
            self.on = True


@contextmanager
def filming(folder: Path, album: Path) -> Iterator[Camera]:
    """An audit hook cannot be taken out again, only switched off."""
    camera = Camera(folder, album)
    sys.addaudithook(camera.hook)
    camera.on = True
    try:
        yield camera
    finally:
        camera.on = False


def test_before_any_file_operation_a_kill_changes_nothing(world, finished, tmp_path, monkeypatch):
    """A sample of all moments between two changes on disk, the first and the last among them."""
    monkeypatch.setattr(
        summary.figures, "run_figures", lambda records, folder: None
    )  # they take most of the time
    monkeypatch.setattr(summary.figures, "partition_figure", lambda counts, names, path: None)
    run = tmp_path / "run"
    with filming(run, tmp_path / "album"):
        runs.call(world, *arguments(world, run))
    moments = sorted((tmp_path / "album").iterdir())
    assert len(moments) > 40
    wanted = runs.results(finished)
    for moment in [*moments[:: len(moments) // 10], moments[-1]]:
        runs.call(world, *arguments(world, moment))
        for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
            assert (moment / name).read_bytes() == wanted[name], (moment.name, name)


def test_a_run_goes_on_with_its_own_data_only(world, tmp_path, capsys):
    """Texts of another seed are refused, in training or in testing; those it was begun with, put back, are not."""
    run, texts = tmp_path / "run", tmp_path / "texts.csv"
    held_out = tmp_path / "held_out.csv"
    for path in (texts, held_out):
        shutil.copyfile(world.data, path)
    changes = {"data__name": str(texts), "data__test_name": str(held_out)}
    runs.train(world, run, **changes)
    before = runs.results(run)
    (run / "summary.json").unlink()
    for path in (texts, held_out):
        runs.write_texts(path, seed=1)
        said = runs.mistake(world, capsys, "train", run.with_suffix(".yaml"), "--run-dir", run)
        assert "was begun with other data (fingerprint " in said
        shutil.copyfile(world.data, path)
    runs.train(world, run, **changes)
    assert runs.results(run) == before


def test_a_finished_run_is_not_run_again(world, finished, capsys):
    before = runs.snapshot(finished)
    runs.call(world, "train", finished.with_suffix(".yaml"), "--run-dir", finished)
    out, err = capsys.readouterr()
    assert runs.snapshot(finished) == before
    assert "already finished" in err
    assert "compiling" not in err
    assert "held-out examples" in out
    assert f"PEFT adapter: {finished / 'adapter'}" in out


SHOWING = """
import os, signal, time
from fslora_jax.display import TerminalDisplay
from fslora_jax.federation import books
books.AHEAD_SECONDS = {ahead}
show = TerminalDisplay.round
def told(self, done, *rest):
    show(self, done, *rest)
    if done == {round}:
        os.kill(os.getpid(), signal.SIGTERM)
TerminalDisplay.round = told
"""


@pytest.mark.parametrize(("round", "ahead", "last"), [(1, "0", 1), (3, "0", 3), (1, "float('inf')", 2)])
def test_sigterm_saves_the_round_and_exits_to_be_restarted(world, finished, tmp_path, round, ahead, last):
    """Neither round is due for a checkpoint; of short rounds the next one is at work already, and ends as well."""
    run, driver = tmp_path / "run", SHOWING.format(round=round, ahead=ahead)
    stopped = runs.finish(runs.start(world, *arguments(world, run), driver=driver))
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert f"stopped after round {last} of 4, which is saved" in stopped.stderr
    assert checkpoints(run)[-1] == str(last)
    assert "Traceback" not in stopped.stderr
    runs.call(world, *arguments(world, run))
    assert runs.results(run) == runs.results(finished)


def test_several_processes_are_asked_about_every_round_of_a_call(monkeypatch):
    """JAX names one round to stop at, which may lie within a call."""
    asked = []
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        preemption.multihost_utils, "reached_preemption_sync_point", lambda t: asked.append(t) or t == 7
    )
    with preemption.watching() as due:
        assert [due(range(start, start + 5)) for start in (0, 5, 10)] == [False, True, False]
    assert asked == list(range(1, 16))
