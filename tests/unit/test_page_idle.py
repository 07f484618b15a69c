"""The bitmap of idle pages: which bits of which words, on a file that stands in for the kernel's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from uspace_mm.errors import KernelError, UnsupportedError
from uspace_mm.kernel.page_idle import PageIdle


def test_frames_are_bits_of_words(tmp_path: Path) -> None:
    path = tmp_path / "bitmap"
    path.write_bytes(bytes(8 * 4))
    frames = np.array([0, 63, 64, 200, 65], np.uint64)
    with PageIdle(path) as idle:
        assert not idle.idle(frames).any()
        idle.mark(frames)
        assert idle.idle(frames).all()
        assert idle.idle(np.array([1, 64, 2, 201, 65], np.uint64)).tolist() == [
            False,
            True,
            False,
            False,
            True,
        ]
        assert not len(idle.idle(np.array([], np.uint64)))
        idle.mark(np.array([], np.uint64))
    words = np.frombuffer(path.read_bytes(), np.uint64)
    assert [int(word) for word in words] == [1 | 1 << 63, 3, 0, 1 << (200 - 192)]


def test_frames_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "bitmap"
    path.write_bytes(bytes(8))
    with PageIdle(path) as idle, pytest.raises(KernelError, match="past the end of memory"):
        idle.idle(np.array([64], np.uint64))


def test_without_the_bitmap(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="CONFIG_IDLE_PAGE_TRACKING"):
        PageIdle(tmp_path / "none")
