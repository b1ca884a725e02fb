"""A world so small that whole runs through the command line take a second: a model, texts, a config."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
import yaml
from forked import Forked
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from fslora_jax import cli

GOOD, BAD = ["good", "fine", "great", "warm"], ["bad", "dull", "poor", "cold"]
PLAIN = ["a", "film", "that", "is", "the", "plot", "was", "and", "very", "##ly", "with"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *PLAIN]
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "initializer_range": 0.4,
}
NUM_EXAMPLES = 96

# Whatever a run may carry from round to round has a part in it: cohorts, sketches, dropout, schedule, optimisers.
SETTINGS: dict[str, Any] = {
    "data": {"test_examples": 24, "max_length": 12},
    "lora": {"r": 8, "lora_alpha": 8.0, "lora_dropout": 0.1, "target_modules": ["query", "value"]},
    "partition": {"dirichlet_alpha": 1.0},
    "federation": {
        "num_clients": 5,
        "clients_per_round": 3,
        "num_rounds": 4,
        "local_steps": 2,
        "batch_size": 4,
        "sketching_ratios": [0.25, 0.5],
    },
    "client_optimizer": {"name": "adamw", "learning_rate": 0.02, "weight_decay": 0.01, "schedule": "linear"},
    "server_optimizer": {"name": "sgd", "options": {"momentum": 0.5}},
    "evaluate_every": 2,
    "checkpoint_every": 2,
}


class World(NamedTuple):
    """Folders of one test session: the base model, the texts, JAX's cache, and the config that goes with them."""

    folder: Path
    model: Path
    data: Path
    cache: Path
    config: Path


def make_world(folder: Path) -> World:
    """Writes a model, a data file and a config file."""
    world = World(folder, folder / "model", folder / "texts.csv", folder / "cache", folder / "tiny.yaml")
    make_model(world.model)
    write_texts(world.data)
    write_config(world.config, world)
    return world


def make_model(folder: Path) -> Path:
    """A random BERT with a WordPiece tokenizer, as transformers saves them."""
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(folder)
    make_tokenizer(VOCABULARY).save(str(folder / "tokenizer.json"))
    return folder


def make_tokenizer(vocabulary: list[str]) -> Any:
    """BERT's way of cutting texts."""
    numbers = {word: number for number, word in enumerate(vocabulary)}
    tokenizer: Any = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def write_texts(path: Path, number: int = NUM_EXAMPLES, seed: int = 0) -> Path:
    """Sentences of two to eight words; label ``pos`` has a good word inside, ``neg`` a bad one."""
    rng = np.random.default_rng(seed)
    lines = ["text,label"]
    for label in rng.integers(2, size=number):
        words = list(rng.choice(PLAIN[:-2], rng.integers(1, 8)))
        words.insert(rng.integers(len(words) + 1), rng.choice(GOOD if label else BAD))
        lines.append(f"{' '.join(words)},{'pos' if label else 'neg'}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def settings(world: World, **changes: Any) -> dict[str, Any]:
    """The tiny run's settings, nested; ``changes`` by name, a double underscore where the YAML has a level."""
    values = json.loads(json.dumps(SETTINGS))
    values["model"] = {"name": str(world.model)}
    values["data"]["name"] = str(world.data)
    for name, value in changes.items():
        *sections, leaf = name.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return values


def write_config(path: Path, world: World, **changes: Any) -> Path:
    """A YAML config of the tiny run."""
    path.write_text(yaml.safe_dump(settings(world, **changes)), encoding="utf-8")
    return path


def call(world: World, *argv: object) -> None:
    """``fslora ARGV`` in this process, with the session's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSLORA_CACHE", str(world.cache))
        cli.main([str(arg) for arg in argv])


def train(world: World, run_dir: Path, *argv: object, **changes: Any) -> Path:
    """A whole run in this process; the config lies beside the run folder."""
    config = write_config(run_dir.with_suffix(".yaml"), world, **changes)
    call(world, "train", config, "--run-dir", run_dir, *argv)
    return run_dir


def write_study(path: Path, **values: Any) -> Path:
    """A YAML study on the config beside it, base.yaml."""
    path.write_text(yaml.safe_dump({"config": "base.yaml"} | values, sort_keys=False), encoding="utf-8")
    return path


def mistake(world: World, capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a user's mistake, of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        call(world, *argv)
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fslora: error: ")]
    assert len(said) == 1
    return said[0]


def environment(world: World) -> dict[str, str]:
    """Of a process of its own."""
    return os.environ | {"FSLORA_CACHE": str(world.cache)}


def start(world: World, *argv: object, driver: str | None = None) -> Forked:
    """``fslora ARGV`` as a process of its own; ``driver`` is Python that runs before, such as a patch."""
    code = f"{driver or ''}\nfrom fslora_jax.cli import main\nmain()"
    return Forked(code, list(map(str, argv)), environment(world), world.folder)


def finish(process: Forked, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Waits for the end; a process that takes too long is killed."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def until(found: Callable[[], Any], seconds: float = 120) -> Any:
    """The first true answer."""
    latest = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < latest
        time.sleep(0.05)
    return answer


def records(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run_dir / name).read_text(encoding="utf-8").splitlines()]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of change; locks are no content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def results(run_dir: Path) -> dict[str, bytes]:
    """What config and seed alone decide: metrics, adapter, figures."""
    chosen = [run_dir / "metrics.jsonl", *(run_dir / "adapter").iterdir(), *(run_dir / "figures").iterdir()]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in sorted(chosen)}
