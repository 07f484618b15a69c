"""The machine's own huge page settings: typed reading, refusals, and that each test puts them back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.kernel.huge import settings_lock
from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel import proc
from uspace_mm.kernel.transparent_hugepage import ROOT, Choice, Number, Switch, TransparentHugepage, Value


@pytest.fixture
def thp() -> Iterator[TransparentHugepage]:
    """The settings; the test fails when they are not what they were."""
    if not ROOT.is_dir():
        pytest.skip("lacks: transparent huge pages")
    settings = TransparentHugepage()
    with settings_lock():
        before = raw()
        yield settings
        assert raw() == before


def raw() -> dict[str, str]:
    """Every writable file as the kernel shows it, read without the code under test."""
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for path in ROOT.rglob("*")
        if path.is_file() and path.stat().st_mode & 0o222
    }


def needs_root() -> None:
    if not os.access(ROOT / "enabled", os.W_OK) or os.geteuid() != 0:
        pytest.skip("lacks: root, to change the settings of huge pages")


def test_every_file_is_read(thp: TransparentHugepage) -> None:
    values = thp.read_all()
    assert set(values) == {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()}
    assert values["hpage_pmd_size"] == proc.pmd_size()
    assert f"[{values['enabled']}]" in (ROOT / "enabled").read_text()
    assert set(thp.settings()) == set(raw())


def test_sizes_end_at_the_pmd(thp: TransparentHugepage) -> None:
    sizes = thp.sizes()
    if not sizes:
        pytest.skip("lacks: folders per size (Linux 6.8)")
    assert sizes[-1] == proc.pmd_size()
    for size in sizes:
        assert size % proc.page_size() == 0
        folder = thp.size(size)
        assert folder.enabled is not None or folder.shmem_enabled is not None
        assert all(isinstance(count, int) for count in folder.read_statistics().values())


def other_value(setting: object) -> Value | None:
    if isinstance(setting, Choice):
        # "force" and "deny" exclude other settings; they have a test of their own.
        return next((word for word in setting.choices if word not in (setting.read(), "force", "deny")), None)
    if isinstance(setting, Switch):
        return not setting.read()
    if isinstance(setting, Number):
        return setting.high if setting.read() != setting.high else setting.low
    return None


def test_every_setting_takes_another_value_and_is_put_back(thp: TransparentHugepage) -> None:
    needs_root()
    before = thp.settings()
    changed = 0
    for name in before:
        value = other_value(thp.setting(name))
        if value is None:
            continue
        with thp.changed({name: value}):
            assert thp.setting(name).read() == value
            others = {other: old for other, old in before.items() if other != name}
            assert {other: thp.setting(other).read() for other in others} == others
        assert thp.setting(name).read() == before[name]
        changed += 1
    assert changed >= 10


def test_the_limits_are_the_kernels(thp: TransparentHugepage) -> None:
    """One more than permitted is refused by the kernel too, so the limit is not ours alone."""
    needs_root()
    for setting in (thp.khugepaged.max_ptes_none, thp.khugepaged.pages_to_scan):
        for value in (setting.low - 1, setting.high + 1):
            with pytest.raises(InputError, match=f"permitted: {setting.low} to {setting.high}"):
                setting.write(value)
            with pytest.raises(OSError), setting.path.open("w") as file:
                file.write(str(value))


def test_all_settings_survive_an_error_in_the_block(thp: TransparentHugepage) -> None:
    needs_root()
    before = thp.settings()
    values = {name: value for name in before if (value := other_value(thp.setting(name))) is not None}
    with pytest.raises(ZeroDivisionError), thp.preserve():
        thp.write(values)
        assert thp.settings() != before
        raise ZeroDivisionError
    assert thp.settings() == before


def test_settings_that_exclude_each_other_are_put_back(thp: TransparentHugepage) -> None:
    """With a small size on "inherit" the kernel refuses "force", and the other way round."""
    needs_root()
    small = next((thp.size(size) for size in thp.sizes() if size < thp.hpage_pmd_size.read()), None)
    if small is None or small.shmem_enabled is None:
        pytest.skip("lacks: shmem_enabled per size (Linux 6.11)")
    with thp.preserve():
        small.shmem_enabled.write("inherit")
        with pytest.raises(KernelError, match="alone or together with the other settings"):
            thp.shmem_enabled.write("force")
    with thp.preserve():
        thp.shmem_enabled.write("force")
        with pytest.raises(KernelError, match="EINVAL"):
            small.shmem_enabled.write("inherit")


def test_min_free_kbytes_comes_back_too(thp: TransparentHugepage) -> None:
    """The kernel recomputes it with `enabled`; without a value of root's own it returns to what it was."""
    needs_root()
    path = Path("/proc/sys/vm/min_free_kbytes")
    # With huge pages of 512 MiB the value follows the zones' watermarks, which follow the value: the first
    # round settles it.
    for _ in range(2):
        before = path.read_text()
        with thp.changed({"enabled": "never" if thp.enabled.read() != "never" else "madvise"}):
            pass
    assert path.read_text() == before


def test_an_interrupt_puts_back_as_well(thp: TransparentHugepage) -> None:
    needs_root()
    script = """
import sys
from uspace_mm.kernel.transparent_hugepage import TransparentHugepage
thp = TransparentHugepage()
with thp.changed({"khugepaged/alloc_sleep_millisecs": 12345}):
    print(thp.khugepaged.alloc_sleep_millisecs.read(), flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == b"12345\n"
        assert thp.khugepaged.alloc_sleep_millisecs.read() == 12345
        child.send_signal(2)
        child.wait(20)
    assert thp.khugepaged.alloc_sleep_millisecs.read() != 12345
