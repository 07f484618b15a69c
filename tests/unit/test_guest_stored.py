"""What the cache holds, and emptying it: all of ours, nothing of others, not under anybody's feet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from uspace_mm.cli import main
from uspace_mm.guest import cache, stored


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMM_GUEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(kind: str, size: int) -> Path:
    return cache.obtain(kind, {"size": size}, lambda folder: void((folder / "f").write_bytes(bytes(size))))


def void(_: object) -> None:
    pass


def test_nothing_is_there_yet(capsys: pytest.CaptureFixture[str]) -> None:
    assert stored.entries() == []
    assert stored.clear() == 0
    assert main(["guest", "cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == []


def test_entries_and_their_sizes(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("root-base", 5000)
    put("kernel", 300)
    put("kernel", 200)
    assert [item.kind for item in stored.entries()] == ["kernel", "kernel", "root-base"]
    assert [item.inputs for item in stored.entries("root-base")] == [{"size": 5000}]
    assert stored.entries("root-base")[0].size_bytes > 5000
    assert main(["guest", "cache"]) == 0
    printed = capsys.readouterr().out
    assert printed.split()[:2] == ["kernel", "2"]
    assert str(own_cache) in printed
    assert main(["guest", "cache", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [entry["kind"] for entry in record["entries"]] == ["kernel", "kernel", "root-base"]
    assert record["total_bytes"] == sum(item.size_bytes for item in stored.entries())


def test_a_damaged_entry_is_still_counted_and_cleared(own_cache: Path) -> None:
    (put("root-base", 10) / cache.MANIFEST).write_text("{")
    assert [item.inputs for item in stored.entries()] == [{}]
    assert stored.clear() > 10
    assert stored.entries() == []


def test_only_what_is_ours_is_removed(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The variable may point at a folder with other things in it."""
    put("root-base", 10)
    mine = [
        own_cache / "thesis.txt",
        own_cache / "root-base/notes",
        own_cache / "apt/mine/x",
        own_cache / "d/y",
    ]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("keep me")
    (own_cache / "apt/trixie-arm64/lists").mkdir(parents=True)
    (own_cache / "apt/trixie-arm64/apt.conf").touch()
    assert main(["guest", "cache", "--clear"]) == 0
    assert capsys.readouterr().out.startswith("removed ")
    left = {path for path in own_cache.rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert left == set(mine)


def test_only_what_was_not_used_for_long(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, again, new = put("root-base", 1), put("root-base", 2), put("kernel", 3)
    week_ago = time.time() - 7 * 86400
    for entry in (old, again):
        os.utime(entry / cache.MANIFEST, (week_ago, week_ago))
    assert put("root-base", 2) == again, "which is a use"
    assert main(["guest", "cache", "--clear", "--unused", "6.5"]) == 0
    assert capsys.readouterr().out.startswith("removed ")
    assert [path.exists() for path in (old, again, new)] == [False, True, True]
    assert not list(own_cache.glob(f"*/.{old.name}.lock"))
    assert main(["guest", "cache", "--clear", "--unused", "6.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed_bytes"] == 0
    for arguments in (["--unused", "1"], ["--clear", "--unused", "-1"], ["--clear", "--unused", "nan"]):
        assert main(["guest", "cache", *arguments]) == 2
        assert "--unused DAYS" in capsys.readouterr().err


def test_it_is_not_emptied_while_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    put("root-base", 10)
    with cache.in_use():
        assert main(["guest", "cache", "--clear"]) == 3
        assert "in use by another command" in capsys.readouterr().err
        assert put("root-base", 10).is_dir(), "other users do not hinder each other"
    assert main(["guest", "cache", "--clear"]) == 0


def test_another_process_that_makes_an_entry_is_a_user() -> None:
    code = (
        "import sys; from uspace_mm.guest import cache\n"
        "def make(folder):\n"
        "    print('making', flush=True); sys.stdin.read()\n"
        "cache.obtain('kernel', {}, make)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "making\n"
        with pytest.raises(cache.CacheError, match="in use"):
            stored.clear()
        child.stdin.close()
        assert child.wait() == 0
    assert [item.kind for item in stored.entries()] == ["kernel"]
    assert stored.clear() > 0
