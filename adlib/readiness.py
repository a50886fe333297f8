"""Is this machine ready for the course? What `adlib check` and lesson 00 ask, each answer with the command that mends it."""

import asyncio
import importlib.metadata
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass

import psutil

from adlib import assets
from adlib.parameters import ParameterError
from adlib.syllabus import CourseError, lessons, select

INSTALL = "python -m pip install -c constraints.txt -e ."
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One answer: what was looked at, whether it will do (None: only for information), what was found, and what to do."""

    what: str
    ok: bool | None
    found: str
    fix: str = ""


def findings(kernel=True):
    """Return a list of Finding about Python, packages, lessons, disk, memory, cores, device, kernel and assets; takes some seconds.

    With ``kernel=False`` no kernel is started, as inside a lesson. Taught in notebooks/00_start_here.ipynb, section 1.
    """
    parts = [_python(), _packages(), _lessons(), _disk(), _memory(), _cores(), _device()]
    return parts + ([_kernel()] if kernel else []) + _assets()


def _python():
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("adlib")["Requires-Python"]
    ok = platform.python_version() in SpecifierSet(wanted)
    return Finding(
        "Python", ok, f"{platform.python_version()} (wanted {wanted})", "conda env create -f environment.yml"
    )


def _packages():
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in importlib.metadata.requires("adlib") or []]
    wrong = []
    for item in (r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})):
        try:
            version = importlib.metadata.version(item.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version == "missing" or not item.specifier.contains(version, prereleases=True):
            wrong.append(f"{item.name} {version} (wanted {item.specifier})")
    return Finding("Packages", not wrong, "; ".join(wrong) or f"{len(wanted)} requirements hold", INSTALL)


def _lessons():
    try:
        every = select(lessons())
    except (CourseError, ParameterError) as error:
        return Finding("Lessons", False, str(error), "git status notebooks/")
    return Finding("Lessons", True, f"{len(every)} found, their parameters are in order")


def _disk():
    folder = next(p for p in [assets.cache_folder(), *assets.cache_folder().parents] if p.exists())
    free = shutil.disk_usage(folder).free / GB
    return Finding(
        "Disk",
        free > 2,
        f"{free:.0f} GB free for the cache (2 are enough)",
        "free some space, or set ADLIB_CACHE to another disk",
    )


def _memory():
    memory = psutil.virtual_memory()
    text = f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB available (3 are enough)"
    return Finding("Memory", memory.available > 3 * GB, text, "close other programs, and use `adlib run --jobs 1`")


def _cores():
    cores = psutil.cpu_count() or 1
    return Finding("Cores", None, f"{cores}" + (": use `adlib run --jobs 1`" if cores < 2 else ""))


def _device():
    from adlib import compute

    return Finding("Device", None, compute.describe())


def _kernel():
    from adlib.execution import ThisPython

    async def _answer():
        manager = ThisPython()
        await manager.start_kernel(stderr=subprocess.DEVNULL)
        client = manager.client()
        try:
            client.start_channels()
            await client.wait_for_ready(timeout=60)
        finally:
            client.stop_channels()
            await manager.shutdown_kernel(now=True)

    started = time.perf_counter()
    try:
        asyncio.run(_answer())
    except Exception as error:  # whatever keeps a kernel from starting is the answer to this question
        return Finding("Kernel", False, f"does not start: {error}", INSTALL)
    return Finding("Kernel", True, f"answers after {time.perf_counter() - started:.1f} s")


def _assets():
    found = []
    for asset in assets.registry().values():
        here = assets.available(asset.name)
        if here or asset.default:
            found.append(
                Finding(f"Asset {asset.name}", here, "here" if here else "not here", f"adlib fetch {asset.name}")
            )
    return found
