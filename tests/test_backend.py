"""Which devices JAX looks for."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fslora_jax import backend


@pytest.mark.parametrize(
    ("packages", "devices", "asked", "expected"),
    [
        (["libtpu"], [], None, "cpu"),
        ([], [], None, None),
        (["libtpu"], ["/dev/accel*"], None, None),
        (["libtpu"], ["/dev/vfio/*"], None, None),
        (["libtpu"], [], "tpu,cpu", "tpu,cpu"),
        (["libtpu"], [], "", ""),
        (["libtpu", "jax_plugins"], [], None, None),
    ],
)
def test_only_an_idle_libtpu_is_left_alone(monkeypatch, packages, devices, asked, expected):
    config = SimpleNamespace(jax_platforms=asked)
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(backend, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr(backend, "find_spec", lambda name: name in packages)
    monkeypatch.setattr(backend, "entry_points", lambda group: ())
    monkeypatch.setattr(backend, "glob", lambda pattern: [pattern] if pattern in devices else [])
    monkeypatch.setenv("JAX_PLATFORMS", "before")
    backend.leave_libtpu()
    assert config.jax_platforms == expected
    assert os.environ["JAX_PLATFORMS"] == ("cpu" if (asked, expected) == (None, "cpu") else "before")


@pytest.mark.parametrize(("asked", "most", "cores", "expected"), [(3, 2, 1, 3), (-1, 8, 4, 4), (-1, 2, 4, 2)])
def test_a_cpu_counts_as_many_devices_as_asked_or_cores(asked, most, cores, expected):
    code = f"""
import os
os.sched_getaffinity = lambda process: set(range({cores}))
import jax
from fslora_jax.backend import split_cpu
from fslora_jax.errors import UserError
split_cpu({asked}, {most})
assert len(jax.devices()) == {expected}
split_cpu(-1, 99)
split_cpu({expected}, 99)
try:
    split_cpu({expected} + 1, 99)
except UserError as error:
    print(error)
"""
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=own | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"mesh.cpu_devices: found {expected + 1}, but JAX has begun with {expected}" in done.stdout


LIBTPU, PLUGINS = (importlib.util.find_spec(name) is not None for name in ("libtpu", "jax_plugins"))


@pytest.mark.skipif(not LIBTPU or PLUGINS, reason="libtpu is not installed, or not alone")
def test_nothing_is_said_of_a_tpu_that_is_not_there():
    own = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    code = "import jax; from fslora_jax import cli; cli.main(['methods', 'fedit']); jax.devices()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=own | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
