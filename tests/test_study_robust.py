"""Studies that are killed, shared by processes, on a full disk, or damaged; and mistakes in their files."""

import errno
import os
import shutil
import signal
from collections import Counter

import pandas as pd
import pytest
import runs
from runs import mistake, write_study

from fslora_jax import log
from fslora_jax.report.command import make_page
from fslora_jax.study import table
from fslora_jax.study.points import load_study

pytestmark = pytest.mark.usefixtures("no_figures", "programs_kept")
GRIDS = {
    "g": {
        "set": {"federation.num_rounds": 2, "evaluate_every": 1, "checkpoint_every": 1},
        "over": {"seed": [0, 1]},
        "tune": {
            "over": {"client_optimizer.learning_rate": [0.01, 0.05]},
            "set": {"data.validation": 0.25, "seed": 9, "federation.num_rounds": 1},
            "by": "loss",
        },
    }
}
CLOCKED = r"(seconds|round_seconds|compile_seconds)(\.sd|\.ci)?"


@pytest.fixture(scope="module")
def study(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    runs.write_config(folder / "base.yaml", world)
    return write_study(folder / "study.yaml", grids=GRIDS)


@pytest.fixture(scope="module")
def undisturbed(world, study, tmp_path_factory):
    """The folder of the study, run in one go; only read."""
    out = tmp_path_factory.mktemp("undisturbed")
    runs.call(world, "study", study, "--out", out)
    return out


@pytest.fixture
def copied(undisturbed, tmp_path):
    return shutil.copytree(undisturbed, tmp_path / "copied")


def tables(out):
    """Whatever a study found but for the clock's part, as text; how many go together moves the last digits."""
    read = {path.name: pd.read_csv(path) for path in sorted(out.glob("*.csv"))}
    read |= {path.name: pd.read_parquet(path) for path in sorted(out.glob("*.parquet"))}
    return {
        name: t[[c for c in t if not pd.Series(c).str.fullmatch(CLOCKED)[0]]].to_csv(float_format="%.5g")
        for name, t in read.items()
    }


PLAIN = """
from fslora_jax.federation import summary
summary.figures.run_figures = summary.figures.partition_figure = lambda *_: None
"""
DIES = (
    PLAIN
    + """
import os, signal, sys
left = {count}
def dies(event, args):
    global left
    if event == "os.rename" and {part!r} in str(args[1]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(dies)
"""
)
# In the first files of a trial; before a point's checkpoint has its name; between the tables
MOMENTS = [("/g.tuning/0.05/", 2), ("/g/0/checkpoints/1", 1), ("/means.csv", 1)]


def test_a_study_that_is_killed_several_times_ends_with_the_same_tables(world, study, undisturbed, tmp_path):
    out = tmp_path / "out"
    for part, count in MOMENTS:
        driver = DIES.format(part=part, count=count)
        killed = runs.finish(runs.start(world, "study", study, "--out", out, driver=driver))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert "runs have finished" in make_page([out], None)[0]
    assert [path.name for path in out.glob("*.csv")] == ["results.csv"]
    runs.call(world, "study", study, "--out", out)
    assert tables(out) == tables(undisturbed)
    assert not list(out.glob(".*.tmp"))


SHARING = (
    PLAIN
    + """
import os, time
from pathlib import Path
from fslora_jax.federation.running import Running
here, write = Path({here!r}), Running.write
def told(self, speed=None):
    records = self._records
    write(self, speed)
    with (here / "log").open("a") as file:
        for record in records:
            file.write(f"{{os.getpid()}} {{self.run_dir}} {{record['round']}}\\n")
Running.write = told
(here / str(os.getpid())).touch()
while len(list(here.iterdir())) < 2:
    time.sleep(0.02)
"""
)


def test_two_processes_share_a_study_and_no_round_is_done_twice(world, study, undisturbed, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    driver, out = SHARING.format(here=str(here)), tmp_path / "out"
    both = [runs.start(world, "study", study, "--out", out, "--together", 1, driver=driver) for _ in range(2)]
    for ended in map(runs.finish, both):
        assert ended.returncode == 0, ended.stderr
    done = [line.split() for line in (here / "log").read_text().splitlines()]
    assert {pid for pid, _, _ in done} == {str(process.pid) for process in both}
    assert set(Counter((file, t) for _, file, t in done).values()) == {1}
    assert tables(out) == tables(undisturbed)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_first_line(path):
    path.write_bytes(b"\xff\0" + path.read_bytes()[2:])


def without(name):
    return lambda path: path.write_text(path.read_text().replace(f'"{name}"', '"another"'))


DAMAGES = {
    "summary cut": ("g/0/summary.json", cut, "cannot be read"),
    "summary older": ("g/0/summary.json", without("after"), "has no 'after', so another version"),
    "metrics damaged": ("g/0/metrics.jsonl", spoil_first_line, "line 1 of 3 is damaged"),
    "metrics older": ("g/0/metrics.jsonl", without("round"), "has no 'round', so another version"),
    "timings older": ("g/0/timings.jsonl", without("seconds"), "has no 'seconds', so another version"),
    "code unknown": ("g/0/made_by.json", cut, "cannot be read"),
    "plan cut": ("study.json", cut, "cannot be read"),
    "plan changed": ("study.json", lambda path: path.write_text('{"commands": 3}'), "commands: found 3"),
    "plan of another kind": ("study.json", lambda path: path.write_text("[]"), "expected a mapping"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_result_is_named(world, study, copied, capsys, case):
    name, damage, words = DAMAGES[case]
    damage(copied / name)
    said = mistake(world, capsys, "study", study, "--out", copied)
    assert str(copied / name) in said
    assert words in said


def test_a_damaged_metrics_file_is_not_cut_where_a_run_goes_on(world, study, copied, capsys):
    run = copied / "g/0"
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints/2")
    spoil_first_line(run / "metrics.jsonl")
    before = (run / "metrics.jsonl").read_bytes()
    said = mistake(world, capsys, "study", study, "--out", copied)
    assert "line 1 of 3 is damaged" in said
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_a_folder_that_takes_nothing_more(world, study, copied, capsys, monkeypatch, code):
    def refuse(path, content):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(table, "write_atomically", refuse)
    said = mistake(world, capsys, "study", study, "--out", copied)
    assert f"{copied / 'study.json'}: {os.strerror(code)}; make room or choose another --out" in said


def test_a_disk_that_is_full_in_a_run(world, study, undisturbed, copied, capsys, monkeypatch):
    def full(self, record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shutil.rmtree(copied / "g/1")
    with monkeypatch.context() as patch:
        patch.setattr(log.JsonLines, "write", full)
        assert f"{copied}: No space left on device; make room" in mistake(
            world, capsys, "study", study, "--out", copied
        )
    assert "round 0 of 2" in make_page([copied], None)[0]
    runs.call(world, "study", study, "--out", copied)
    assert tables(copied) == tables(undisturbed)


def test_what_is_left_is_estimated_by_what_was_done(world, study, copied, capsys):
    """Two rounds are still to be done, at nearly half an hour each."""
    for run in copied.glob("g*/*"):
        lines = [f'{{"round": {t}, "seconds": 1785.0}}\n' for t in (1, 2)]
        (run / "timings.jsonl").write_text("".join(lines[: len(runs.records(run, "timings.jsonl"))]))
    shutil.rmtree(copied / "g/1")
    runs.call(world, "study", study, "--out", copied, "--plan")
    shown = [line.replace("│", " ").split() for line in capsys.readouterr().err.splitlines()]
    rows = {row[0]: row[1:] for row in shown if row and row[0] in ("g", "g.tuning")}
    assert rows == {"g.tuning": ["2", "2", "0", "0", "0", "min"], "g": ["2", "1", "1", "2", "60", "min"]}


@pytest.mark.parametrize(
    ("grids", "words"),
    [
        ({}, "grids: found none"),
        ({"g": None}, "grids.g: found None"),
        ({"g": {"over": {"seed": []}}}, "grids.g.over.seed has no values"),
        ({"g": {"over": {"seed": {}}}}, "grids.g.over.seed has no values"),
        ({"g": {"over": {"federation.num_round": [1]}}}, "did you mean federation.num_rounds?"),
        ({"g": {"set": {"lora.rr": 1}}}, "unknown setting lora.rr; did you mean lora.r?"),
        ({"g": {"over": {"seed.x": [1]}}}, "seed is a value, expected a section"),
        ({"g": {"over": {"seed": [1, 1]}}}, "two points are named g/1"),
        ({"g": {"over": {"x": {"a": {}, "b": {}}}}}, "g/a and g/b have the same settings"),
        ({"a/b": {}}, "found the name 'a/b', which is to be a folder"),
        ({"g.tuning": {}}, "no .tuning at last"),
        ({"g": {"over": {"x": {"..": {}}}}}, "found the name '..'"),
        ({"g": {"over": {"rounds": {"few": {}}}}}, "the tables have a column rounds already"),
        ({"g": {"over": {"lora": [{"rr": 8}]}}}, "did you mean lora.r?"),
        ({"g": {"overs": {}}}, "unknown setting grids.g.overs"),
        ({"g": {"tune": {"over": {"seed": []}}}}, "grids.g.tune.over.seed has no values"),
        ({"g": {"tune": {}}}, "grids.g.tune.over: missing"),
        (
            {"g": {"tune": {"over": {"seed": [1]}, "set": {"data.validaton": 0.2}}}},
            "did you mean data.validation",
        ),
    ],
    ids=str,
)
def test_mistakes_in_a_study_are_one_line(world, study, capsys, tmp_path, grids, words):
    path = write_study(study.parent / "wrong.yaml", grids=grids)
    said = mistake(world, capsys, "study", path, "--out", tmp_path / "out")
    assert words in said
    assert str(path) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"grids: {", "is no YAML"),
        (b"- 1\n", "found list, expected a mapping"),
        (b"", "found NoneType, expected a mapping"),
        (b"set: {}\n", "config: missing"),
        (b"model: {name: m}\ndata: {}\n", "unknown setting model; expected one of config, question"),
        (b"config: none.yaml\ngrids: {g: {}}\n", "none.yaml: cannot be read"),
        (
            b"config: base.yaml\ngrids: {g: {}}\ncompare: seed\n",
            "compare: found seed, expected an axis: none",
        ),
        (b"config: base.yaml\ngrids: {g: {}}\nrepeat: sed\n", "repeat: found sed, expected an axis: none"),
    ],
    ids=str,
)
def test_files_that_are_no_study(world, study, capsys, tmp_path, content, words):
    path = study.parent / "none_such.yaml"
    if content is not None:
        path.write_bytes(content)
    said = mistake(world, capsys, "study", path, "--out", tmp_path / "out")
    path.unlink(missing_ok=True)
    assert words in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("{study} --out {study}", "is a file; expected a folder for --out"),
        ("{study} --out {study}/below", "Not a directory; make room or choose another --out"),
        ("{study} --out {out} --set data.name=[1,", "expected a YAML value behind data.name="),
        ("{study} --out {out} --set nope=1", "unknown setting nope"),
        ("{study} --out {out} --set data.name={{task}}", "expected names of axes in braces: ['seed']"),
        ("{study} --out {out} --part 0 0 --plan", "found 0 0, expected I N"),
        ("{study} --out {out} --reuse {out}/none --plan", "none is no folder; expected the --out of a study"),
    ],
)
def test_mistakes_in_the_command_are_one_line(world, study, capsys, tmp_path, argv, words):
    argv = argv.format(study=study, out=tmp_path / "out").split()
    assert words in mistake(world, capsys, "study", *argv)
    assert not (tmp_path / "out").exists()


def test_a_tuned_point_is_none_of_the_same_settings_without(study):
    tune = {"over": {"client_optimizer.learning_rate": [0.1, 0.2]}}
    path = write_study(study.parent / "both.yaml", grids={"untuned": {}, "tuned": {"tune": tune}})
    _, points = load_study(path, {})
    assert [point.name for point in points] == ["untuned/run", "tuned/run"]
