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
