"""Several devices and several processes, each set in processes of its own: the rest of identity 7."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy
from compare import close, fslora_with, last

HERE = Path(__file__).parent
SECONDS = 300
"""A process that hangs is killed after this."""


def start(*command: str, **environment: str) -> subprocess.Popen:
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=HERE.parent,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes: list[subprocess.Popen]) -> None:
    """Waits for all; where one fails or hangs, all end and the test shows what they printed."""
    outputs = []
    try:
        outputs.extend(process.communicate(timeout=SECONDS)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0] * len(codes), "\n".join(outputs)


@pytest.mark.parametrize(
    ("module", "count"), [("on_devices.py", 8), ("on_meshes.py", 8), ("on_two_devices.py", 2)]
)
def test_several_devices(module, count):
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "disable_hlo_passes" not in flag]
    flags = " ".join([*kept, f"--xla_force_host_platform_device_count={count}"])
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "once_a_file", "--noconftest"]
    finish([start("-m", "pytest", *options, str(HERE / module), XLA_FLAGS=flags)])


@pytest.mark.parametrize(("processes", "devices"), [(2, 2)])
def test_identity_7_two_processes_are_one(tmp_path, processes, devices):
    """Products, head and the losses of each process's own clients; the three clients sit in both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    files = [tmp_path / f"{number}.npz" for number in range(processes)]
    script = str(HERE / "one_process.py")
    finish(
        [
            start(script, address, str(processes), str(number), str(devices), str(file))
            for number, file in enumerate(files)
        ]
    )
    alone = toy.play(fslora_with("momentum"), toy.OPTIMIZERS["momentum"][0], dropout=0.4)
    expected = {"/".join(map(str, name)): value for name, value in last(alone).items()}
    seen = []
    for file in files:
        with np.load(file) as found:
            assert found["devices"] == processes * devices
            close({name: found[name] for name in expected}, expected, 5e-6)
            for name in found.files:
                if name.startswith("loss/"):
                    t, c = map(int, name.split("/")[1:])
                    np.testing.assert_allclose(found[name], alone.losses[t, c], rtol=1e-4)
                    seen.append((t, c))
    assert sorted(seen) == sorted(alone.losses)
