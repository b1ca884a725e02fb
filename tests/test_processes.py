"""Two processes of four devices against one of eight, through the command line; and what one device makes of it."""

import json
import socket

import jax
import numpy as np
import pytest
import runs
from safetensors.numpy import load_file

from fslora_jax import processes
from fslora_jax.errors import UserError

CHANGES = {"federation__num_rounds": 2, "mesh": {"clients": 4, "fsdp": 2}, "evaluate_every": 1}


def devices(count, **environment):
    """Python that runs before the command: so many virtual devices, and who this process is."""
    return (
        f"import os, jax; os.environ.update({environment!r}); jax.config.update('jax_platforms', 'cpu'); "
        f"jax.config.update('jax_num_cpu_devices', {count})"
    )


def play(world, folder, drivers, *argv):
    config = runs.write_config(folder.with_suffix(".yaml"), world, **CHANGES)
    started = [runs.start(world, "train", config, "--run-dir", folder, *argv, driver=d) for d in drivers]
    for done in [runs.finish(process, 300) for process in started]:
        assert done.returncode == 0, done.stderr
    return runs.records(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return runs.make_world(tmp_path_factory.mktemp("processes"))


def test_identity_7_two_processes_are_one_through_the_command_line(world, capsys):
    """The same metrics and adapter; process 0 alone writes; the checkpoint restores on one device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    both = [devices(4, **names, JAX_PROCESS_ID=str(number)) for number in range(2)]
    one = play(world, world.folder / "one", [devices(8)])
    two = play(world, world.folder / "two", both, "--distributed")
    assert [set(r) for r in two] == [set(r) for r in one]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose([b[name] for name in a], list(a.values()), rtol=1e-4)
    expected, found = (
        load_file(world.folder / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")
    )
    assert expected.keys() == found.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-3, atol=1e-6, err_msg=name)
    assert jax.device_count() == 1
    runs.call(world, "eval", world.folder / "two")
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["loss"] == pytest.approx(two[-1]["eval/loss"], rel=1e-4)


def test_a_process_without_a_number_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(UserError, match="--distributed: JAX_PROCESS_ID is not set"):
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
