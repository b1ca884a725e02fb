"""The command line from end to end: help, overrides, a run, its evaluation, and what it exports, under real PEFT."""

import json
import re
import signal
import subprocess
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from fslora_jax import cli, train_command
from fslora_jax.checkpoint import Checkpoints
from fslora_jax.config import Config, load_config
from fslora_jax.data.batches import BatchShape, make_batch
from fslora_jax.errors import UserError
from fslora_jax.federation.client import train_client
from fslora_jax.federation.examples import load_examples, tokenise
from fslora_jax.federation.results import load_round

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import torch
    import transformers

# PEFT uses a name of transformers that is about to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.usefixtures("programs_kept"),
]


def output(world: runs.World, capsys, *argv: object) -> str:
    capsys.readouterr()
    runs.call(world, *argv)
    return capsys.readouterr().out


def help_of(world: runs.World, capsys, monkeypatch, *argv: object) -> str:
    """The text of ``--help``, without the boxes and line ends that depend on the terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        runs.call(world, *argv)
    assert caught.value.code == 0
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


def leaves(model: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> field of every setting that is no section."""
    found = {}
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            found |= leaves(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def test_the_installed_command_is_main():
    (script,) = entry_points(group="console_scripts", name="fslora")
    assert script.load() is cli.main


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_usage(world, capsys, argv):
    assert output(world, capsys, *argv) == cli.USAGE
    assert all(command in cli.USAGE for command in cli.COMMANDS)


def test_only_the_command_that_runs_is_imported():
    """Tables, statistics and a benchmark's peers would take a second of every start."""
    code = "import sys\nfrom fslora_jax import cli, train_command\nprint(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pandas", "scipy.stats", "torch"} & set(found.stdout.split())
    assert all(callable(resolve_name(place)) for place in cli.COMMANDS.values())


@pytest.mark.parametrize("given", [True, False])
def test_the_help_of_train_lists_every_setting_with_its_words(world, capsys, monkeypatch, given):
    shown = help_of(world, capsys, monkeypatch, "train", *([world.config] if given else []), "--help")
    assert "--run-dir" in shown
    for name, field in leaves(Config).items():
        assert f"--{name.replace('_', '-')}" in shown, name
        assert " ".join(field.description.split())[:40].replace("`", "") in shown.replace("`", ""), name
    assert ("(default: 5)" in shown) == given  # num_clients of the file


@pytest.mark.parametrize(
    ("command", "options"), [("eval", "--data --split --max-length"), ("export", "--out --client --round")]
)
def test_the_help_of_the_other_commands(world, capsys, monkeypatch, command, options):
    shown = help_of(world, capsys, monkeypatch, command, "--help")
    assert all(option in shown for option in options.split())


@pytest.fixture
def asked(monkeypatch) -> list[tuple[Config, Path]]:
    """What `train` would run, instead of running it."""
    seen: list[tuple[Config, Path]] = []
    monkeypatch.setattr(train_command, "run", lambda config, folder, display: seen.append((config, folder)))
    monkeypatch.setattr(train_command, "print_summary", lambda summary, folder: None)
    return seen


def test_without_overrides_the_file_is_the_config(world, asked, tmp_path):
    runs.call(world, "train", world.config, "--run-dir", tmp_path / "run")
    assert asked == [(load_config(world.config), tmp_path / "run")]


def test_overrides_of_every_kind_reach_the_config(world, asked, tmp_path):
    options = """--seed 3 --lora.r 16 --lora.use-rslora False --lora.target-modules query key --data.label-names neg pos
        --federation.clients-per-round None --federation.num_rounds 9 --client-optimizer.learning-rate 1e-3
        --client-optimizer.max-grad-norm 2 --server-optimizer.name adam --server-optimizer.options {b1_:_0.5}
        --model.dtype bfloat16 --loggers tensorboard wandb --federation.share-sketch True"""
    runs.call(
        world,
        "train",
        world.config,
        "--run-dir",
        tmp_path,
        *(word.replace("_:_", ": ") for word in options.split()),
    )
    ((config, _),) = asked
    assert (config.seed, config.lora.r, config.lora.use_rslora) == (3, 16, False)
    assert config.lora.target_modules == ("query", "key")
    assert config.data.label_names == ("neg", "pos")
    assert (config.federation.clients_per_round, config.federation.num_rounds) == (None, 9)
    assert config.federation.share_sketch is True
    assert (config.client_optimizer.learning_rate, config.client_optimizer.max_grad_norm) == (1e-3, 2.0)
    assert (config.server_optimizer.name, config.server_optimizer.options) == ("adam", {"b1": 0.5})
    assert (config.model.dtype, config.loggers) == ("bfloat16", ("tensorboard", "wandb"))
    untouched = load_config(world.config)
    assert config.partition == untouched.partition
    assert config.data.name == untouched.data.name


def test_the_default_folder_is_a_dated_one(world, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.call(world, "train", world.config)
    ((_, folder),) = asked
    assert re.fullmatch(r"runs/tiny-\d{8}-\d{6}", str(folder))


def test_a_run_folder_holds_what_it_should(finished):
    names = {path.name for path in finished.iterdir() if path.name[0] != "."}
    assert names == {
        *("config.yaml", "made_by.json", "metrics.jsonl", "timings.jsonl", "partition.json", "summary.json"),
        *("checkpoints", "adapter", "figures"),
    }
    assert load_config(finished / "config.yaml") == load_config(finished.with_suffix(".yaml"))
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"2", "4"}


def test_what_a_run_prints(world, capsys, tmp_path, finished):
    """The table of the summary: accuracies, a row for each k, what was sent, where the adapter is."""
    out = output(world, capsys, "train", finished.with_suffix(".yaml"), "--run-dir", finished)
    summary = json.loads((finished / "summary.json").read_text())
    assert f"{summary['before']['eval/accuracy']:.4f}" in out
    assert f"{summary['after']['eval/accuracy']:.4f}" in out
    assert [tier["k"] for tier in summary["tiers"]] == [2, 4]
    assert [tier["clients"] for tier in summary["tiers"]] == [3, 2]
    assert re.search(r"fslora, rank 8, 4 rounds", out)
    assert f"PEFT adapter: {finished / 'adapter'}" in out


def last_evaluation(run: Path) -> dict[str, float]:
    record = runs.records(run)[-1]
    return {name: record[f"eval/{name}"] for name in ("loss", "accuracy")}


@pytest.fixture(scope="module")
def held_out(finished, tmp_path_factory) -> Path:
    """The run's held-out examples as a file."""
    config = load_config(finished / "config.yaml")
    _, test = load_examples(config.data, config.seed, Path(config.model.name))
    path = tmp_path_factory.mktemp("held-out") / "held-out.jsonl"
    rows = zip(test.texts[0], test.labels, strict=True)
    lines = [json.dumps({"text": text, "label": test.label_names[label]}) for text, label in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_eval_of_a_run_is_its_last_evaluation(world, finished, capsys):
    before = runs.snapshot(finished)
    out = output(world, capsys, "eval", finished)
    assert json.loads(out) == last_evaluation(finished)
    assert out.count("\n") == 1
    assert runs.snapshot(finished) == before


@pytest.mark.parametrize("folder", [".", "adapter"])
def test_eval_on_a_file_of_the_same_examples_agrees(world, finished, held_out, capsys, folder):
    found = json.loads(
        output(world, capsys, "eval", finished / folder, "--data", held_out, "--max-length", 13)
    )
    wanted = last_evaluation(finished)
    assert found["accuracy"] == wanted["accuracy"]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_eval_of_a_run_reads_other_data_as_its_own(world, finished, capsys, tmp_path):
    """The run's columns and length are the defaults, not those of the command."""
    path = tmp_path / "long.csv"
    path.write_text("text,label\n" + f"{'good ' * 50},pos\n{'bad ' * 50},neg\n" * 2)
    wanted = output(world, capsys, "eval", finished, "--data", path, "--max-length", 12)
    assert output(world, capsys, "eval", finished, "--data", path) == wanted
    assert output(world, capsys, "eval", finished, "--data", path, "--max-length", 8) != wanted


@pytest.mark.parametrize("folder", [".", "adapter"])
def test_eval_on_a_task_with_other_labels_is_refused(world, finished, held_out, capsys, folder):
    """As many, so that numbers would come out."""
    said = runs.mistake(world, capsys, "eval", finished / folder, "--task", "mrpc", "--data", held_out)
    assert "data.task: mrpc has the labels 'not_equivalent', 'equivalent'" in said
    assert "trained on 'neg', 'pos'" in said


def test_eval_on_other_examples_is_another_number(world, finished, capsys, tmp_path):
    other = runs.write_texts(tmp_path / "other.csv", number=30, seed=5)
    found = json.loads(output(world, capsys, "eval", finished, "--data", other))
    assert found["loss"] != pytest.approx(last_evaluation(finished)["loss"], rel=1e-3)


def test_export_writes_the_runs_adapter_again(world, finished, capsys, tmp_path):
    assert (
        output(world, capsys, "export", finished, "--out", tmp_path / "a")
        == f"PEFT adapter: {tmp_path / 'a'}\n"
    )
    for path in (finished / "adapter").iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()


def test_export_of_an_earlier_round_is_another_adapter(world, finished, tmp_path):
    runs.call(world, "export", finished, "--out", tmp_path / "a", "--round", 2)
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() != (finished / "adapter" / name).read_bytes()


def torch_logits(base: Path, adapter: Path, tokens: list[list[int]]) -> np.ndarray:
    """Logits under real PEFT, after a check that it finds every tensor and no other."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    stored = peft.utils.load_peft_weights(str(adapter), device="cpu")
    result = peft.set_peft_model_state_dict(model, stored)
    assert result.unexpected_keys == []
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    assert set(peft.get_peft_model_state_dict(model, save_embedding_layers=False)) == set(stored)
    with torch.no_grad():
        return np.stack([model(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in tokens])


@pytest.mark.parametrize(("client", "k"), [(2, 2), (3, 4)])
def test_an_exported_client_computes_the_same_under_peft_at_its_own_rank(
    world, finished, tmp_path, client, k
):
    """The reference is what the client itself holds after its local steps: rank k, scale s r / k."""
    runs.call(world, "export", finished, "--out", tmp_path / "c", "--client", client, "--round", 2)
    said = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert (said["r"], said["use_rslora"]) == (k, False)
    assert said["lora_alpha"] / said["r"] == pytest.approx((8 / 8**0.5) * 8 / k)  # s r / k with rsLoRA's s

    config, federation, server, _ = load_round(finished, 2)
    local = train_client(config, federation, server, client)
    _, test = load_examples(config.data, config.seed, Path(config.model.name))
    store = tokenise(world.model, federation.task.model, test, config.data)
    everything = np.arange(len(test.labels))
    batch = make_batch(store, test.labels, everything, BatchShape(len(everything), 12, 0), pack=False)
    held, batch = jax.tree.map(lambda x: jnp.asarray(x)[None], (local, batch))
    ours = federation.task.model.apply(federation.task.base, [held], batch, None)[0]
    tokens = [ids.tolist() for ids in np.split(store.tokens, store.offsets[1:-1])]
    theirs = torch_logits(world.model, tmp_path / "c", tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(theirs - torch_logits(world.model, finished / "adapter", tokens)).max() > 1e-2


@pytest.mark.parametrize(
    ("command", "more"),
    [("train", "; the same command goes on from what is saved"), ("export", "")],
)
def test_control_c_ends_with_one_line(world, capsys, monkeypatch, command, more):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "resolve_name", lambda name: interrupted)
    with pytest.raises(SystemExit) as caught:
        runs.call(world, command)
    assert caught.value.code == 130
    assert capsys.readouterr().err == f"fslora: stopped{more}\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            "9 bytes.;",
        ),
        (MemoryError("Unable to allocate 1.46 TiB"), "Unable to allocate 1.46 TiB;"),
        (MemoryError(), "the host has no more;"),
    ],
)
def test_a_lack_of_memory_is_one_line_that_says_what_to_do(world, capsys, monkeypatch, error, words):
    def hungry(argv):
        raise error

    monkeypatch.setattr(cli, "resolve_name", lambda name: hungry)
    said = runs.mistake(world, capsys, "train")
    assert said.startswith("fslora: error: memory: ") and words in said
    assert said.endswith("or set model.remat: full")


def test_a_reader_that_has_seen_enough_is_no_mistake(world, capsys, monkeypatch, tmp_path):
    def printing(argv):
        raise BrokenPipeError

    with (tmp_path / "out").open("w") as printed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        patch.setattr(cli, "resolve_name", lambda name: printing)
        with pytest.raises(SystemExit) as caught:
            runs.call(world, "methods")
    assert caught.value.code == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_other_errors_of_a_device_are_not_a_users(world, monkeypatch):
    def broken(argv):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(cli, "resolve_name", lambda name: broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        runs.call(world, "train")


def test_a_checkpoint_that_a_run_beside_it_has_replaced_is_not_missed(finished, monkeypatch):
    """The newest is pruned while it is being read; then a newer one is there."""
    restore, asked = Checkpoints.restore, []

    def pruned(self, round, like, files=None):
        asked.append(round)
        if len(asked) == 1:
            raise UserError("the checkpoint cannot be read")
        return restore(self, round, like, files)

    newest = iter([2, 4, 4])
    monkeypatch.setattr(Checkpoints, "restore", pruned)
    monkeypatch.setattr(Checkpoints, "newest", lambda self: next(newest))
    assert int(load_round(finished, None).server.round) == 4
    assert asked == [2, 4]


def test_a_newest_checkpoint_that_is_damaged_is_told(finished, monkeypatch):
    def damaged(*arguments):
        raise UserError("the checkpoint cannot be read")

    monkeypatch.setattr(Checkpoints, "restore", damaged)
    with pytest.raises(UserError, match="cannot be read"):
        load_round(finished, None)
