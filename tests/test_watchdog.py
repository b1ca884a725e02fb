"""Who is named when, by files alone; whole runs with a process that is stopped are in `test_processes.py`."""

import json

import pytest

from fslora_jax.watchdog import FOLDER, STEPS, Heard, Said, complaint, hear, watchdog, write

THERE = Said("host", 7, 3, "training", 0)


def heard(step="training", round=3, beat=100.0, moved=100.0):
    return Heard(THERE._replace(step=step, round=round), beat, moved)


@pytest.mark.parametrize(
    ("processes", "wrong"),
    [
        ([heard(), heard()], None),
        ([heard(moved=50.0), heard(moved=95.0)], None),
        ([], None),
        ([heard(moved=80.0), heard(moved=90.0)], "nothing has moved for 10 s: 0 3 training; 1 3 training"),
        (
            [heard(moved=80.0), heard("waiting for data", moved=80.0)],
            "nothing has moved for 10 s: 1 3 waiting for data",
        ),
        ([heard("saving", 2, moved=80.0), heard(moved=80.0)], "nothing has moved for 10 s: 0 2 saving"),
        ([heard(moved=80.0), heard(beat=95.0, moved=80.0)], "no sign of life for 5 s: 1 3 training"),
    ],
)
def test_the_one_that_others_wait_for_is_named(processes, wrong):
    found = complaint(dict(enumerate(processes)), now=100.0, patience=10.0, silence=5.0)
    if wrong is None:
        assert found is None
        return
    what, who = wrong.split(": ")
    assert found.startswith(what)
    for part in who.split("; "):
        number, round, step = part.split(" ", 2)
        assert f"process {number} (host, pid 7) is in round {round}, {step}" in found
    assert found.count("process ") == len(who.split("; "))


def test_times_go_by_the_readers_clock(tmp_path):
    """From when a file's content changed: a sign of life is no step forward, and a file that is gone nobody's."""
    folder = tmp_path / FOLDER
    write(folder, THERE)
    known = hear(folder, 2, {}, now=10.0)
    assert known == {0: Heard(THERE, 10.0, 10.0)}
    assert hear(folder, 2, known, now=12.0) == known
    write(folder, THERE._replace(beats=1))
    assert hear(folder, 2, known, now=13.0) == {0: Heard(THERE._replace(beats=1), 13.0, 10.0)}
    write(folder, THERE._replace(step="saving", beats=2))
    assert hear(folder, 2, known, now=14.0)[0][1:] == (14.0, 14.0)
    (folder / "0").write_text("{half")
    assert hear(folder, 2, known, now=15.0) == {}


def test_a_process_alone_leaves_no_file(tmp_path):
    with watchdog(tmp_path, 1.0, 1.0) as at:
        at(1, "training")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_does_not_end_a_run(tmp_path):
    (tmp_path / "file").touch()
    write(tmp_path / "file" / FOLDER, THERE)


def test_what_is_written_can_be_read_by_a_person(tmp_path):
    write(tmp_path / FOLDER, THERE)
    found = json.loads((tmp_path / FOLDER / "0").read_text())
    assert found == {"host": "host", "pid": 7, "round": 3, "step": "training", "beats": 0}
    assert found["step"] in STEPS
