"""Every mistake of a user: one line that says what to do, exit code 2, and nothing that was there is lost."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import runs
from safetensors.numpy import load_file, save_file

from fslora_jax.checkpoint import Checkpoints
from fslora_jax.config import load_config
from fslora_jax.federation.feed import local_examples
from fslora_jax.federation.setup import set_up

pytestmark = pytest.mark.usefixtures("no_figures", "programs_kept")

WORD = "dull"
STAGES = ("loading model and data", "compiling the round", "evaluating the start", "round ")


def error_of(err: str) -> str:
    """The one line of an error among the stages that were shown before it."""
    lines = [line for line in err.splitlines() if line.strip() and not line.lstrip().startswith(STAGES)]
    assert len(lines) == 1, err
    assert lines[0].startswith("fslora: error: ")
    return lines[0].removeprefix("fslora: error: ")


def refusal(world: runs.World, capsys, *argv: object) -> str:
    """Runs what must be refused, and returns its message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        runs.call(world, *argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    return error_of(err)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in runs.snapshot(folder).items()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"federation__num_roundz": 3},
            "unknown setting federation.num_roundz; did you mean federation.num_rounds?",
        ),
        ({"federation__sketching_ratios": [0.0]}, "federation.sketching_ratios.0: found 0.0"),
        ({"federation__sketching_ratios": [1.5]}, "federation.sketching_ratios.0: found 1.5"),
        ({"federation__sketching_ratios": [0.5, -1]}, "federation.sketching_ratios.1: found -1"),
        ({"federation__sketching_ratios": [0.05]}, "0.05 of rank 8 rounds to k = 0"),
        ({"lora__r": 0}, "lora.r: found 0"),
        ({"federation__clients_per_round": 6}, "federation.clients_per_round: found 6, expected at most"),
        ({"federation__num_rounds": "many"}, "federation.num_rounds: found 'many'"),
    ],
    ids=str,
)
def test_a_wrong_setting_makes_no_folder(world, capsys, tmp_path, changes, words):
    config = runs.write_config(tmp_path / "c.yaml", world, **changes)
    message = refusal(world, capsys, "train", config, "--run-dir", tmp_path / "run")
    assert words in message
    assert str(config) in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"federation__num_clients": 100, "federation__clients_per_round": None}, "num_clients 100"),
        ({"partition__min_examples": 0, "partition__dirichlet_alpha": 1e-3}, "has no data"),
        ({"lora__target_modules": ["query", "q_proj"]}, "lora.target_modules: 'q_proj' matches no module"),
        ({"data__label_column": "mood"}, "no columns named 'mood'; the columns are 'text', 'label'"),
        ({"data__text_columns": ["sentence"]}, "no columns named 'sentence'"),
        (
            {"data__label_names": ["neg", "neutral"]},
            "label 'pos' is not among label_names ('neg', 'neutral')",
        ),
        ({"data__max_length": 21}, "data.max_length: found 21, but the model in model takes at most 20"),
        ({"data__max_length": 2}, "special tokens alone take 2"),
        ({"data__test_examples": 96}, "96; expected 1 to 95"),
        ({"data__test_examples": 1000}, "1000; expected 1 to 95"),
        ({"loggers": ["wandb"]}, "loggers: wandb needs the package wandb; pip install"),
    ],
    ids=str,
)
def test_a_setting_that_does_not_fit_can_be_corrected_in_place(
    world, capsys, tmp_path, changes, words, monkeypatch
):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    config = runs.write_config(tmp_path / "c.yaml", world, **changes)
    assert words in refusal(world, capsys, "train", config, "--run-dir", tmp_path / "run")
    runs.write_config(config, world, lora__target_modules=["another mistake"])
    assert "another mistake" in refusal(world, capsys, "train", config, "--run-dir", tmp_path / "run")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("trian", "unknown command 'trian'; expected one of train, study, report"),
        ("train", "no config file"),
        ("train --seed 3", "no config file"),
        ("train {none}", "none.yaml: cannot be read: No such file"),
        ("train {folder}", "cannot be read: Is a directory"),
        ("train {config} --federation.num-roundz 3", "num-roundz; did you mean federation.num_rounds?"),
        (
            "train {config} --num-rounds 3",
            "unknown argument --num-rounds; did you mean federation.num_rounds?",
        ),
        ("train {config} more", "unknown argument more; see fslora train {config} --help"),
        ("train {config} --lora.r 0", "settings: lora.r: found 0"),
        (
            "train {config} --federation.sketching-ratios 0.5 7",
            "settings: federation.sketching_ratios.1: found 7",
        ),
        ("train {config} --server-optimizer.options 3", "settings: server_optimizer.options: found 3"),
        ("train {config} --run-dir {config}", "is a file; expected a folder for --run-dir"),
        ("train {config} --run-dir {model}", "not empty and no run folder (it has no config.yaml)"),
        ("train {config} --run-dir {config}/run", "cannot be made or written: Not a directory"),
        ("eval {folder}", "no run folder; for an adapter folder say --data"),
        ("eval {none}", "no run folder; for an adapter folder say --data"),
        ("eval {folder} --data {data}", "adapter_config.json: no such file"),
        ("eval {none} --dta {data}", "unknown argument --dta; did you mean data?"),
        ("eval {folder} --personalised", "--personalised: given without --per-client"),
        ("export {folder} --out {none}", "no run folder, it has no config.yaml"),
        ("export {none} --out {none}", "no run folder, it has no config.yaml"),
    ],
)
def test_a_wrong_command_line(world, capsys, tmp_path, argv, words):
    places = {
        "none": tmp_path / "none.yaml",
        "folder": tmp_path,
        "config": world.config,
        "model": world.model,
        "data": world.data,
    }
    before = contents(world.model)
    assert words.format(**places) in refusal(world, capsys, *argv.format(**places).split())
    assert contents(world.model) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv",
    [
        "train {config} --lora.r abc",
        "train {config} --model.dtype float8",
        "export {config}",
        "eval",
        "eval --split",
    ],
)
def test_what_the_argument_parser_refuses_itself(world, capsys, argv):
    with pytest.raises(SystemExit) as caught:
        runs.call(world, *argv.format(config=world.config).split())
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"model: {name: m", b"\xff\xfe\x00", b"", b"- 1\n- 2\n", b"a: b: c"])
def test_files_that_are_no_config(world, capsys, tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert str(path) in refusal(world, capsys, "train", path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("export {run} --out {out} --round 2 --client 5", "client 5: expected one of 0 to 4"),
        ("export {run} --out {out} --round 2 --client -1", "client -1: expected one of 0 to 4"),
        (
            "export {run} --out {out} --client 1",
            "export: client_optimizer.schedule linear has come to a rate of 0",
        ),
        ("export {run} --out {out} --all-clients", "no client would train; take a --round before the last"),
        (
            "export {run} --out {out} --client 1 --merged",
            "export: found client and merged; expected one of them",
        ),
        ("export {run} --out {out} --merged --max-shard-gb 0", "max_shard_gb: found 0, expected more than 0"),
        ("export {run} --out {model} --merged", "the folder of the base model"),
        ("export {run} --out {run} --all-clients", "exists and is no export of all clients"),
        ("export {run} --out {out} --round 3", "no checkpoint of round 3; there are [2, 4]"),
        ("export {run} --out {model}", "exists and is no adapter"),
        ("eval {run} --data {model}/config.json", "config.json"),
        ("eval {run} --data {data} --max-length 0", "arguments: max_length: found 0"),
        ("eval {run}/adapter --data {data} --label-column mood", "no columns named 'mood'"),
        (
            "train {config} --run-dir {run} --seed 1 --lora.r 4",
            "holds a run with lora.r = 8, but this config has 4 (and 1",
        ),
    ],
)
def test_a_finished_run_is_not_touched(world, finished, capsys, tmp_path, argv, words):
    before, model = runs.snapshot(finished), contents(world.model)
    places = {
        "run": finished,
        "out": tmp_path / "out",
        "model": world.model,
        "data": world.data,
        "config": finished.with_suffix(".yaml"),
    }
    assert words in refusal(world, capsys, *argv.format(**places).split())
    assert runs.snapshot(finished) == before
    assert contents(world.model) == model
    assert not (tmp_path / "out").exists()


class Interrupted(NamedTuple):
    """A run that was killed after its checkpoint of round 2, in a world of its own that may be spoilt."""

    world: runs.World
    run: Path
    config: Path

    def refused(self, capsys) -> str:
        return refusal(self.world, capsys, "train", self.config, "--run-dir", self.run)

    def finish(self) -> dict[str, bytes]:
        runs.call(self.world, "train", self.config, "--run-dir", self.run)
        return runs.results(self.run)


@pytest.fixture
def interrupted(world, finished, tmp_path) -> Interrupted:
    """From the finished run, as its folder was two rounds before."""
    here = world._replace(model=tmp_path / "model", data=tmp_path / "texts.csv")
    shutil.copytree(world.model, here.model)
    shutil.copy(world.data, here.data)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for gone in (run / "adapter", run / "checkpoints" / "4"):
        shutil.rmtree(gone)
    (run / "summary.json").unlink()
    for name in ("metrics.jsonl", "timings.jsonl"):
        kept = [record for record in runs.records(run, name) if record["round"] <= 3]
        (run / name).write_text("".join(json.dumps(record) + "\n" for record in kept))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(world.folder), str(tmp_path)))
    return Interrupted(here, run, runs.write_config(tmp_path / "tiny.yaml", here))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace(old: bytes, new: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new, 1))


SPOILT = {
    "texts gone": ("texts.csv", Path.unlink, "was found nowhere"),
    "texts empty": ("texts.csv", lambda path: path.write_bytes(b""), "holds no examples"),
    "texts without rows": ("texts.csv", lambda path: path.write_bytes(b"text,label\n"), "holds no examples"),
    "texts not UTF-8": ("texts.csv", replace(b"good", b"g\xf6\xf6d"), "not UTF-8 at byte"),
    "a row too short": ("texts.csv", replace(b",pos", b""), "found 1 fields; expected 2"),
    "a label missing": ("texts.csv", replace(b",pos", b","), "column 'label' holds ''"),
    "weights cut": ("model/model.safetensors", cut, "damaged safetensors file"),
    "weights gone": ("model/model.safetensors", Path.unlink, "lacks model.safetensors"),
    "weights of another": (
        "model/config.json",
        replace(b'"hidden_size": 16', b'"hidden_size": 32'),
        "has shape",
    ),
    "weights pickled": (
        "model/model.safetensors",
        lambda path: path.rename(path.with_name("pytorch_model.bin")),
        "pickled weights can run code and are never read",
    ),
    "code beside the weights": (
        "model/config.json",
        replace(b"{", b'{"auto_map": {},'),
        "auto_map asks for code",
    ),
    "config cut": ("model/config.json", cut, "not JSON"),
    "tokenizer cut": ("model/tokenizer.json", cut, "not a tokenizer"),
    "tokenizer of another": (
        "model/tokenizer.json",
        lambda path: runs.make_tokenizer([*runs.VOCABULARY[:4], *"xyz", *runs.VOCABULARY[4:]]).save(
            str(path)
        ),
        "wrong tokenizer: it gives token",
    ),
    "checkpoint cut": ("run/checkpoints/2/default/server.safetensors", cut, "delete this folder to go on"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_files_are_named_and_the_run_keeps_all_it_has(interrupted, capsys, tmp_path, case):
    name, spoil, words = SPOILT[case]
    spoil(tmp_path / name)
    before = contents(interrupted.run)
    message = interrupted.refused(capsys)
    assert words in message
    assert Path(name).parts[0].removesuffix(".csv") in message
    assert contents(interrupted.run) == before


def test_another_process_in_the_folder(interrupted, capsys):
    from filelock import FileLock

    before = contents(interrupted.run)
    with FileLock(interrupted.run / ".lock"):
        assert "another process is working in it" in interrupted.refused(capsys)
    assert contents(interrupted.run) == before


def forbid(path: Path) -> None:
    """What cannot be opened; as root, a permission would not do."""
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, Path.unlink, forbid])
def test_a_run_goes_on_from_the_last_checkpoint_that_can_be_read(interrupted, finished, capsys, damage):
    newest = interrupted.run / "checkpoints" / "4"
    shutil.copytree(finished / "checkpoints" / "4", newest)
    damage(newest / "default" / "server.safetensors")
    assert interrupted.finish()["metrics.jsonl"] == (finished / "metrics.jsonl").read_bytes()
    said = "".join(capsys.readouterr().err.split())  # lines of the terminal's width
    assert f"{newest}:thecheckpointcannotberead:" in said
    assert ";goingonfromround2" in said
    assert sorted(path.name for path in newest.parent.iterdir()) == ["2", "4", "4.unreadable"]


def torn(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:20])


@pytest.mark.parametrize("damage", [torn, Path.unlink])
def test_a_run_does_not_go_on_without_the_record_of_a_round(interrupted, capsys, damage):
    """As a machine that crashed may leave it: there would be a round that nobody knows anything of."""
    damage(interrupted.run / "metrics.jsonl")
    before = contents(interrupted.run)
    said = interrupted.refused(capsys)
    round = 0 if damage is Path.unlink else 2
    assert f"metrics.jsonl: no record of round {round}, though there is a checkpoint of round 2" in said
    assert contents(interrupted.run) == before


def test_checkpoints_whose_records_are_gone_are_still_of_their_config(interrupted, capsys, tmp_path):
    (interrupted.run / "metrics.jsonl").unlink()
    config = runs.write_config(tmp_path / "other.yaml", interrupted.world, seed=77)
    said = runs.mistake(interrupted.world, capsys, "train", config, "--run-dir", interrupted.run)
    assert "holds a run with seed = 0, but this config has 77" in said


def meetings(run: Path, word: str) -> dict[int, list[int]]:
    """Round -> the clients who train on a word in it, from the third round on."""
    config = load_config(run / "config.yaml")
    federation = set_up(config)
    population, number = federation.task.population, runs.VOCABULARY.index(word)
    texts = np.split(population.store.tokens, population.store.offsets[1:-1])
    found = {}
    for t in (2, 3):
        chosen = local_examples(population, federation.feed.steps, federation.feed.cohort(t), t)
        pairs = zip(federation.feed.cohort(t), chosen, strict=True)
        found[t + 1] = [int(client) for client, mine in pairs if any(number in texts[i] for i in mine.flat)]
    return found


def test_a_process_of_its_own_says_one_line_and_ends_with_two(interrupted):
    """Nothing of what the libraries do at their end, or of what they left under way, reaches the terminal."""
    cut(interrupted.run / "checkpoints" / "2" / "default" / "server.safetensors")
    command = [sys.executable, "-c", "from fslora_jax.cli import main; main()", "eval", str(interrupted.run)]
    environment = runs.environment(
        interrupted.world
    )  # not forked: how a whole interpreter ends is what is tested
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert str(interrupted.run / "checkpoints" / "2") in error_of(ended.stderr)
    assert ended.stderr.count("\n") == 1


def test_a_loss_that_is_not_finite_names_round_and_client(interrupted, capsys):
    """One word's vector becomes so large that its norm is infinite: clients fail when they meet it, not before."""
    met = meetings(interrupted.run, WORD)
    (failing, clients), *_ = [(t, clients) for t, clients in met.items() if clients]
    assert len(clients) < 3  # not everybody, or a message with any client would do
    path = interrupted.world.model / "model.safetensors"
    tensors = load_file(path)
    tensors["embeddings.word_embeddings.weight"][runs.VOCABULARY.index(WORD)] = 3e38
    save_file(tensors, path, metadata={"format": "pt"})
    checkpoints = contents(interrupted.run / "checkpoints")
    message = interrupted.refused(capsys)
    assert message.startswith(
        tuple(f"round {failing}: client {client}: loss nan at local step" for client in clients)
    )
    assert contents(interrupted.run / "checkpoints") == checkpoints
    assert [record["round"] for record in runs.records(interrupted.run)] == list(range(failing))


def test_a_learning_rate_far_too_large_is_told_with_round_and_client(world, capsys, tmp_path):
    config = runs.write_config(tmp_path / "c.yaml", world, client_optimizer__learning_rate=1e30)
    message = refusal(world, capsys, "train", config, "--run-dir", tmp_path / "run")
    assert message.startswith("round 1: client ")
    assert "at local step 2; lower client_optimizer.learning_rate" in message


def test_weights_that_blow_up_in_the_last_step_are_not_exported(world, capsys, tmp_path):
    """Every loss is that before a step, so only the evaluation sees what the last step did."""
    config = runs.write_config(
        tmp_path / "c.yaml",
        world,
        client_optimizer__learning_rate=1e30,
        federation__local_steps=1,
        federation__num_rounds=1,
    )
    message = refusal(world, capsys, "train", config, "--run-dir", tmp_path / "run")
    assert message.startswith(
        "round 1: loss nan on the held-out examples; lower client_optimizer.learning_rate"
    )
    assert [record["round"] for record in runs.records(tmp_path / "run")] == [0]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system; the test with a limit on files stands in")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_up(folder: Path) -> Path:
    """Takes the last byte of a file system."""
    ballast = folder / ".ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while file.write(b"0" * size):
                    pass
            except OSError:
                continue
    return ballast


def test_a_full_disk_in_a_checkpoint_loses_nothing(interrupted, finished, small_disk, capsys, monkeypatch):
    here = interrupted._replace(run=small_disk / "run")
    shutil.copytree(interrupted.run, here.run)
    save, checkpoints = Checkpoints.save, contents(here.run / "checkpoints")

    def save_on_a_full_disk(self, round, *state):
        fill_up(small_disk)
        save(self, round, *state)

    monkeypatch.setattr(Checkpoints, "save", save_on_a_full_disk)
    message = here.refused(capsys)
    monkeypatch.undo()
    assert "No space left on device" in message
    assert str(here.run / "checkpoints" / "4") in message
    assert {
        name: content for name, content in contents(here.run / "checkpoints").items() if name[0] == "2"
    } == checkpoints
    (small_disk / ".ballast").unlink()
    assert here.finish()["metrics.jsonl"] == (finished / "metrics.jsonl").read_bytes()


def test_a_full_disk_in_the_metrics_loses_nothing(interrupted, finished, small_disk, capsys, monkeypatch):
    from fslora_jax.log import JsonLines

    here = interrupted._replace(run=small_disk / "run")
    shutil.copytree(interrupted.run, here.run)
    write = JsonLines.write

    def write_on_a_full_disk(self, record):
        fill_up(small_disk)
        write(self, record | {"padding": "0" * 5000})

    monkeypatch.setattr(JsonLines, "write", write_on_a_full_disk)
    assert "No space left on device" in here.refused(capsys)
    monkeypatch.undo()
    (small_disk / ".ballast").unlink()
    assert here.finish()["metrics.jsonl"] == (finished / "metrics.jsonl").read_bytes()


def test_a_limit_on_the_size_of_files_in_a_checkpoint_loses_nothing(
    interrupted, finished, capsys, monkeypatch
):
    save = Checkpoints.save
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = contents(interrupted.run / "checkpoints")

    def save_with_a_limit(self, round, *state):
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
        try:
            save(self, round, *state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(Checkpoints, "save", save_with_a_limit)
    message = interrupted.refused(capsys)
    monkeypatch.undo()
    assert str(interrupted.run / "checkpoints" / "4") in message
    assert "go on from the last one" in message
    kept = {
        name: content for name, content in contents(interrupted.run / "checkpoints").items() if name[0] == "2"
    }
    assert kept == checkpoints
    assert interrupted.finish()["metrics.jsonl"] == (finished / "metrics.jsonl").read_bytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(world, capsys, tmp_path):
    tmp_path.chmod(0o500)
    message = refusal(world, capsys, "train", world.config, "--run-dir", tmp_path / "run")
    assert "cannot be made or written: Permission denied" in message
