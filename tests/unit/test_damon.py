"""Where DAMON is not to be had: the reason, and that nothing was changed. tests/guest has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from uspace_mm.errors import KernelError, UnsupportedError
from uspace_mm.kernel.mapping import Mapping
from uspace_mm.kernel.proc import page_size
from uspace_mm.notifier import Ages
from uspace_mm.notifier._damon import ADMIN, Damon

COUNT = "kdamonds/nr_kdamonds"


def kdamond(admin: Path, count: int, operations: str) -> dict[Path, str]:
    """Files that stand in for the kernel's; returns what is in them."""
    context = admin / "kdamonds/0/contexts/0"
    context.mkdir(parents=True)
    (context / "avail_operations").write_text(operations)
    (context.parent / "nr_contexts").write_text("0\n")
    (admin / "kdamonds/0/state").write_text("off\n")
    (admin / COUNT).write_text(f"{count}\n")
    return contents(admin)


def contents(admin: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in admin.rglob("*") if path.is_file()}


def test_without_damon(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="CONFIG_DAMON_SYSFS"):
        Damon(1, 0, page_size(), tmp_path)


def test_another_users_is_left_alone(tmp_path: Path) -> None:
    before = kdamond(tmp_path, 1, "vaddr\nfvaddr\n")
    with pytest.raises(UnsupportedError, match="taken: .* is 1"):
        Damon(1, 0, page_size(), tmp_path)
    assert contents(tmp_path) == before


def test_without_its_operations(tmp_path: Path) -> None:
    kdamond(tmp_path, 0, "paddr\n")
    with pytest.raises(UnsupportedError, match=r"only: paddr.*CONFIG_DAMON_VADDR"):
        Damon(1, 0, page_size(), tmp_path)
    assert (tmp_path / COUNT).read_text() == "0"


def test_a_kernel_that_refuses(tmp_path: Path) -> None:
    kdamond(tmp_path, 0, "vaddr\nfvaddr\n")
    with pytest.raises(KernelError, match="operations"):  # no such file
        Damon(1, 0, page_size(), tmp_path)
    assert (tmp_path / COUNT).read_text() == "0"


def test_ages_say_why() -> None:
    count = ADMIN / COUNT
    before = count.read_text() if count.exists() else ""
    with Mapping(page_size()) as memory:
        memory.array[:] = 1
        with Ages(memory.address, memory.address + 1, touches=False, damon=True) as ages:
            evidence = {one.name: one for one in ages.evidence}
            assert evidence["pages"].how == "DAMON is wanted in its place"
            samples, age = evidence["samples"], ages.look()
            if samples.seen:
                assert age.sampled is not None
            else:
                assert any(word in samples.how for word in ("taken", "CONFIG_DAMON", "root"))
                assert (age.sampled, age.sampled_bytes) == (None, None)
        with Ages(memory.address, memory.address + 1, touches=False, damon=False) as ages:
            assert "not wanted" in [one.how for one in ages.evidence if one.name == "samples"]
    assert (count.read_text() if count.exists() else "") == before
