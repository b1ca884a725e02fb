"""The README's examples run, and its configs and commands are ones that the package takes."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from fslora_jax import cli
from fslora_jax.config import load_config, make_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_says_what_its_comment_says(capsys):
    (code,) = blocks("python")
    exec(code, {})
    assert capsys.readouterr().out.strip() == re.findall(r"print\(.*\)  # (\(.*?\))", code)[0]


def test_the_config_examples_are_valid_together():
    values: dict = {}
    for block in blocks("yaml"):
        for section, settings in yaml.safe_load(block).items():
            values[section] = values.get(section, {}) | settings
    config = make_config(values, "README.md")
    assert config.lora.rank_pattern == {"output.dense": 4}
    assert (config.federation.num_clients, config.federation.clients_per_round) == (50, 10)
    assert set(config.federation.devices) == {"phone", "laptop"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    assert load_config(path).model.name


def test_the_commands_exist():
    lines = [
        line
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith(("fslora", "launch"))
    ]
    assert len(lines) >= 7
    for line in lines:
        program, command, *_ = [*shlex.split(line, comments=True), ""]
        assert command in cli.COMMANDS if program == "fslora" else (ROOT / program).is_file()
