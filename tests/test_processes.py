"""Two processes of four devices against one of eight, through the command line; and what one device makes of it."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import runs
from safetensors.numpy import load_file

from fslora_jax import processes
from fslora_jax.errors import UserError

CHANGES = {
    "federation__num_rounds": 8,
    "mesh": {"clients": 4, "fsdp": 2},
    "evaluate_every": 1,
    "checkpoint_every": 2,
}


def devices(count, **environment):
    """Python that runs before the command: so many virtual devices, and who this process is."""
    return (
        f"import os, jax; os.environ.update({environment!r}); jax.config.update('jax_platforms', 'cpu'); "
        f"jax.config.update('jax_num_cpu_devices', {count})"
    )


def pair(then="", **environment):
    """What two processes of four devices run before the command, the same in both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [devices(4, **environment, JAX_PROCESS_ID=str(number)) + then for number in range(2)]


def play(world, folder, drivers, *argv):
    """The run in as many processes as there are ``drivers``: how they ended."""
    config = runs.write_config(folder.with_suffix(".yaml"), world, **CHANGES)
    started = [runs.start(world, "train", config, "--run-dir", folder, *argv, driver=d) for d in drivers]
    ended = [runs.finish(process, 300) for process in started]
    for process, done in zip(started, ended, strict=True):
        latest = time.monotonic() + 60
        while done.returncode < 0 and processes.AGAIN not in done.stderr and time.monotonic() < latest:
            time.sleep(0.05)  # its heir speaks after its end
            done.stderr = process.communicate()[1]
    return ended


def check_ended(processes):
    for done in processes:
        assert done.returncode == 0, done.stderr


def check_alike(run, expected):
    """The metrics and the adapter of a run are those of another one, but for the order of sums."""
    wanted, found = runs.records(expected), runs.records(run)
    assert [set(record) for record in found] == [set(record) for record in wanted]
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_allclose([b[name] for name in a], list(a.values()), rtol=1e-4)
    wanted, found = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (expected, run))
    assert wanted.keys() == found.keys()
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return runs.make_world(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def two(world):
    """The run of two processes to which nothing happens."""
    check_ended(play(world, world.folder / "two", pair(), "--distributed"))
    return world.folder / "two"


def test_identity_7_two_processes_are_one_through_the_command_line(world, two, capsys):
    """The same metrics and adapter; process 0 alone writes; the checkpoint restores on one device."""
    check_ended(play(world, world.folder / "one", [devices(8)]))
    check_alike(two, world.folder / "one")
    assert jax.device_count() == 1
    capsys.readouterr()
    runs.call(world, "eval", two)
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["loss"] == pytest.approx(runs.records(two)[-1]["eval/loss"], rel=1e-4)
    assert not list((two / "heartbeats").iterdir())


FAULT = """
import os, signal, subprocess, time
from fslora_jax.display import TerminalDisplay
def told(self, done, *rest):
    me, first = os.getpid(), os.environ["JAX_PROCESS_ID"] == "0"{what}
TerminalDisplay.round = told
"""
STOPPED_THEN_ASKED_TO_LEAVE = """
    if not first and done == 1:
        subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {me}"])
        os.kill(me, signal.SIGSTOP)
    if not first and done == 3:
        os.kill(me, signal.SIGTERM)
    time.sleep(1.5 if done >= 3 else 0)
"""
KILLED = """
    if first == {leader} and done == {round}:
        os.kill(me, signal.SIGKILL)
"""


def test_one_of_two_processes_hangs_is_asked_to_leave_and_dies(world, two):
    """It is named; both leave after the same round; the other one says what to do. What is left goes on to the bytes
    of a run to which nothing happened, and on a single device to the same numbers."""
    run, limits = world.folder / "faults", {"FSLORA_WATCHDOG": "2", "FSLORA_HEARTBEAT_TIMEOUT": "20"}

    drivers = pair(FAULT.format(what=STOPPED_THEN_ASKED_TO_LEAVE), **limits)
    left = play(world, run, drivers, "--distributed")
    assert [done.returncode for done in left] == [143, 143], left
    here = re.search(
        r"fslora: no sign of life for 2 s from process 1 \((.+), pid \d+\) is in round [01], \w+",
        left[0].stderr,
    )
    assert here, left[0].stderr
    assert here[1] == socket.gethostname()
    assert "fslora: going on" in left[0].stderr[here.end() :]
    (stopped,) = {
        re.search(r"stopped after round (\d) of 8, which is saved", done.stderr)[1] for done in left
    }
    assert int(stopped) >= 3
    assert (run / "checkpoints" / stopped).is_dir()

    killed = FAULT.format(what=KILLED.format(leader=True, round=6))
    dead, alone = play(world, run, pair(killed, **limits), "--distributed")
    assert dead.returncode == -signal.SIGKILL
    assert alone.returncode in (processes.LOST_CODE, -signal.SIGABRT)  # who is first, we or JAX
    assert re.search("process 1 of 2 (cannot go on|was killed, or ended by JAX)", alone.stderr), alone.stderr
    assert processes.AGAIN in alone.stderr
    assert "process 0 of 2 was killed" in dead.stderr

    killed = FAULT.format(what=KILLED.format(leader=False, round=8))
    alone, dead = play(world, run, pair(killed, **limits), "--distributed")
    assert dead.returncode == -signal.SIGKILL
    assert alone.returncode == processes.LOST_CODE, alone.stderr
    assert "process 0 of 2 cannot go on, as another process has ended" in alone.stderr
    assert processes.AGAIN in alone.stderr
    assert "Traceback" not in alone.stderr
    assert "was killed" not in alone.stderr
    assert json.loads((run / "heartbeats" / "1").read_text())["round"] in (7, 8)  # written from time to time

    elsewhere = world.folder / "elsewhere"
    shutil.copytree(run, elsewhere)
    check_ended(play(world, run, pair(), "--distributed"))
    assert runs.results(run) == runs.results(two)

    saved = sorted(path.name for path in (elsewhere / "checkpoints").iterdir())
    assert saved[-1] != "8", saved
    check_ended(play(world, elsewhere, [devices(1)], "--mesh.clients", "1", "--mesh.fsdp", "1"))
    check_alike(elsewhere, two)


NO_DISK = """
from fslora_jax.errors import UserError
from fslora_jax.federation import running
def refuse(*_):
    raise UserError("loggers: no space")
running.open_loggers = refuse
"""


def test_what_the_leader_alone_opens_ends_all_where_it_fails(world):
    said = play(
        world, world.folder / "refused", pair(NO_DISK, FSLORA_HEARTBEAT_TIMEOUT="20"), "--distributed"
    )
    assert [done.returncode for done in said] == [2, 2], said
    assert "fslora: error: loggers: no space" in said[0].stderr
    assert "fslora: error: process 0 could not go on; its message says why" in said[1].stderr


@pytest.mark.parametrize(
    ("end", "spoken"),
    [
        ("pass", ""),
        ("raise SystemExit(3)", ""),
        ("os.abort()", "lost\n"),
        ("os.kill(os.getpid(), 9)", "lost\n"),
    ],
)
def test_who_ends_without_a_word_has_left_one(end, spoken):
    code = f"import os\nfrom fslora_jax.processes import last_words\nwith last_words('lost'):\n    {end}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr == spoken


def test_a_process_without_a_number_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(UserError, match="--distributed: JAX_PROCESS_ID is not set"):
        processes.join()


@pytest.mark.parametrize("value", ["soon", "0", "-1"])
def test_limits_are_seconds(monkeypatch, value):
    monkeypatch.setenv("FSLORA_HEARTBEAT_TIMEOUT", value)
    with pytest.raises(UserError, match=f"^FSLORA_HEARTBEAT_TIMEOUT: found '{value}'; expected seconds"):
        processes.join()


def test_several_processes_need_a_run_folder(world, capsys):
    with pytest.raises(SystemExit):
        runs.call(world, "train", world.config, "--distributed")
    assert "--distributed: no --run-dir" in capsys.readouterr().err


def test_a_leader_that_fails_says_why():
    def fail():
        raise UserError("no space")

    with pytest.raises(UserError, match="no space"):
        processes.leader_first(fail)
