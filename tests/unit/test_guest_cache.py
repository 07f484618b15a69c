"""Entries of the cache: made once, checked before use, made again when damaged, and never half there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from uspace_mm.guest import cache

INPUTS = {"of": "this", "and": [1, 2]}


class Maker:
    """Makes an entry with two files, one in a folder, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, entry: Path) -> None:
        self.calls += 1
        (entry / "image").write_bytes(b"image" * 1000)
        (entry / "folder").mkdir()
        (entry / "folder" / "file").write_bytes(b"file")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMM_GUEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
def entry(maker: Maker) -> Path:
    return cache.obtain("kind", INPUTS, maker)


def visible(root: Path) -> set[str]:
    """What lies in the folder of the kind, but locks."""
    return {path.name for path in (root / "kind").iterdir() if not path.name.endswith(".lock")}


def test_an_entry_is_made_once_whatever_the_order_of_its_inputs(entry: Path, maker: Maker) -> None:
    assert cache.obtain("kind", dict(reversed(INPUTS.items())), maker) == entry
    assert cache.find("kind", INPUTS) == entry
    assert maker.calls == 1
    assert cache.obtain("kind", {**INPUTS, "and": [1, 3]}, maker) != entry
    assert maker.calls == 2


def flip(path: Path) -> None:
    """Change one byte and put the times back, as a careful vandal would."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(path: Path) -> None:
    os.truncate(path, 3)


def unlink(path: Path) -> None:
    path.unlink()


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip, truncate, unlink, become_a_folder])
@pytest.mark.parametrize("name", ["image", "folder/file"])
def test_a_damaged_entry_is_made_again(
    entry: Path, maker: Maker, root: Path, damage: Callable[[Path], None], name: str
) -> None:
    good = (entry / name).read_bytes()
    time.sleep(0.02)  # the grain of the clock that stamps changes
    damage(entry / name)
    assert cache.find("kind", INPUTS) is None
    said: list[str] = []
    assert cache.obtain("kind", INPUTS, maker, progress=lambda text, done=None: said.append(text)) == entry
    assert maker.calls == 2
    assert (entry / name).read_bytes() == good
    assert any("damaged" in text for text in said)
    assert visible(root) == {entry.name}


@pytest.mark.parametrize(
    "manifest",
    ["", "{", "[]", "7", '"text"', "{}", '{"files": []}', '{"files": {"image": 3}}', "\udcff", "[" * 3000,
     '{"files": {"image": {}}}', '{"files": {"../../etc/passwd": {"status": [], "sha256": "0"}}}'],
)  # fmt: skip
def test_a_damaged_manifest_is_a_damaged_entry(entry: Path, maker: Maker, manifest: str) -> None:
    (entry / cache.MANIFEST).write_text(manifest, errors="surrogateescape")
    assert cache.find("kind", INPUTS) is None
    assert cache.obtain("kind", INPUTS, maker) == entry
    assert maker.calls == 2
    assert cache.find("kind", INPUTS) == entry


def test_a_copied_entry_is_right_and_read_once(entry: Path, maker: Maker, root: Path) -> None:
    shutil.copytree(root, root.with_name("copy"))
    shutil.rmtree(root)
    root.with_name("copy").rename(root)
    assert cache.obtain("kind", INPUTS, maker) == entry
    assert maker.calls == 1
    recorded = json.loads((entry / cache.MANIFEST).read_text())["files"]["image"]["status"]
    status = (entry / "image").stat()
    assert recorded == [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    assert {path.name for path in entry.iterdir()} == {"image", "folder", cache.MANIFEST}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOENT, "no")])
def test_what_the_maker_raises_is_passed_on_and_nothing_stays(root: Path, error: BaseException) -> None:
    def make(entry: Path) -> None:
        (entry / "half").write_bytes(bytes(1000))
        (entry / "closed").mkdir(mode=0o500)
        raise error

    with pytest.raises(type(error)):
        cache.obtain("kind", INPUTS, make)
    assert visible(root) == set()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(root: Path, number: int) -> None:
    def make(entry: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(cache.CacheError, match=rf"no space left in {root}/kind: .*UMM_GUEST_CACHE") as caught:
        cache.obtain("kind", INPUTS, make)
    assert caught.value.exit_status == 3
    assert visible(root) == set()


@pytest.mark.parametrize("where", ["/proc/nowhere", "file", "loop", "n" * 300, "/dev/null/x"])
def test_a_folder_that_cannot_be_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: Maker, where: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("UMM_GUEST_CACHE", str(tmp_path / where))
    with pytest.raises(cache.CacheError, match="cannot write to .*UMM_GUEST_CACHE"):
        cache.obtain("kind", INPUTS, maker)
    assert cache.find("kind", INPUTS) is None
    assert maker.calls == 0


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UMM_GUEST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 123456789)
    with pytest.raises(cache.CacheError, match="UMM_GUEST_CACHE"):
        cache.cache_root()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.cache_root() == Path("/somewhere/uspace_mm/guest")


SLOW_MAKER = """
import sys, time
from pathlib import Path
from uspace_mm.guest import cache

def make(entry):
    with open(sys.argv[1], "a") as calls:
        calls.write("made\\n")
    (entry / "half").write_text("half")
    print("making", flush=True)
    time.sleep(float(sys.argv[2]))
    (entry / "half").rename(entry / "whole")

print(cache.obtain("kind", {"of": "both"}, make), flush=True)
"""


def start(calls: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_MAKER, str(calls), str(seconds)], stdout=subprocess.PIPE, text=True
    )


def test_two_processes_make_an_entry_once(root: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    both = [start(calls, 0.5) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    assert calls.read_text() == "made\n"
    assert (Path(said[0]) / "whole").exists()


def test_what_a_killed_process_left_is_no_entry_and_is_removed(root: Path, tmp_path: Path) -> None:
    killed = start(tmp_path / "calls", 60)
    assert killed.stdout
    assert killed.stdout.readline() == "making\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    (left,) = visible(root)
    assert left.endswith(".new")
    again = start(tmp_path / "calls", 0)
    entry = Path(again.communicate(timeout=60)[0].split()[-1])
    assert visible(root) == {entry.name}
    assert {path.name for path in entry.iterdir()} == {"whole", cache.MANIFEST}
