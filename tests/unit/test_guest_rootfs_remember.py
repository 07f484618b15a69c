"""What names meant: asked once, asked again when it was forgotten or damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from uspace_mm.guest import cache
from uspace_mm.guest.rootfs import remember


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMM_GUEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Oracle:
    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> list[int]:
        self.asked += 1
        return [self.asked]


def test_asked_once_and_again_when_forgotten(own_cache: Path) -> None:
    ask = Oracle()
    assert not remember.is_known()
    assert remember.remembered("x", {"name": "a"}, ask) == [1]
    assert remember.remembered("x", {"name": "a"}, ask) == [1]
    assert remember.remembered("x", {"name": "b"}, ask) == [2]
    assert remember.remembered("y", {"name": "a"}, ask) == [3]
    assert remember.remembered("x", {"name": "a"}, ask, afresh=True) == [4]
    assert remember.is_known()
    remember.forget_all()
    assert remember.remembered("x", {"name": "a"}, ask) == [5]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"question": {}}'])
def test_a_damaged_memory_is_asked_again(own_cache: Path, damage: bytes) -> None:
    ask = Oracle()
    remember.remembered("x", {}, ask)
    (path,) = (own_cache / "resolved").iterdir()
    path.write_bytes(damage)
    assert remember.remembered("x", {}, ask) == [2]
    assert remember.remembered("x", {}, ask) == [2]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("UMM_GUEST_CACHE", str(tmp_path / "file"))
    assert remember.remembered("x", {}, Oracle()) == [1]


def test_a_files_digest_is_read_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    read = []
    digest_file = cache.digest_file

    def counting(path: Path) -> str:
        read.append(path)
        return digest_file(path)

    monkeypatch.setattr(cache, "digest_file", counting)
    first = remember.digest_of_file(path)
    assert remember.digest_of_file(path) == first
    assert len(read) == 1
    status = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the change time cannot be set back
    assert remember.digest_of_file(path) != first
