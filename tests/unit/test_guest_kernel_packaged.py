"""Debian's kernels out of packages made by hand, from an archive that pretends."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.kernel_images import efi, image
from tests.unit.test_guest_kernel_modules import module
from uspace_mm.errors import InputError, UspaceError
from uspace_mm.guest.debian import Package, PackageGone
from uspace_mm.guest.kernel import fetch, packaged
from uspace_mm.guest.pagesize import PAGE_SIZES, parse_page_size

K16 = parse_page_size("16k")
TREE = "usr/lib/modules/6.12.107"


def deb(path: Path, files: dict[str, bytes]) -> Path:
    """A package: an ``ar`` archive of three members."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    control = io.BytesIO()
    with tarfile.open(fileobj=control, mode="w:xz"):
        pass
    out = b"!<arch>\n"
    members = (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", control.getvalue()),
        ("data.tar.xz", tar.getvalue()),
    )
    for name, data in members:
        out += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
            + data
            + b"\n" * (len(data) % 2)
        )
    path.write_bytes(out)
    return path


class Mirror:
    """What the archive would say; ``asked`` counts the look-ups."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = 0
        self.version = "1"
        self.gone: set[str] = set()
        self.names = ["kmod", "linux-base", "linux-image-arm64-16k", "linux-image-6.12.107+deb13-arm64-16k"]
        self.files = {
            "boot/vmlinuz-6.12.107": efi(gzip.compress(image(2)), b"gzip"),
            "boot/config-6.12.107": b"CONFIG_ARM64_16K_PAGES=y\n",
            f"{TREE}/modules.builtin": b"kernel/drivers/virtio/virtio_mmio.ko\n",
            f"{TREE}/kernel/drivers/block/virtio_blk.ko": module("virtio_blk"),
            f"{TREE}/kernel/fs/squashfs/squashfs.ko": module("squashfs", depends="lz4"),
            f"{TREE}/kernel/lib/lz4.ko": module("lz4"),
            f"{TREE}/kernel/fs/overlay.ko": module("overlay"),
            f"{TREE}/kernel/fs/zram.ko": module("zram", depends="lz4"),
            "usr/share/doc/x": b"",
        }

    def __call__(self, *arguments: object, **named: object) -> Mirror:
        return self

    def packages(self, names: Iterable[str], *, dependencies: bool = False) -> list[Package]:
        assert list(names) == ["linux-image-arm64-16k"] and dependencies
        self.asked += 1
        return [Package(name, self.version, "arm64", f"{name}{self.version}", 1) for name in self.names]

    def fetch(self, packages: Iterable[Package]) -> list[Path]:
        found = []
        for package in packages:
            if package.version in self.gone:
                raise PackageGone(f"{package} is gone")
            found.append(deb(self.folder / f"{package.name}.deb", self.files))
        return found


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    mirror = Mirror(tmp_path)
    monkeypatch.setattr(packaged, "Archive", mirror)
    monkeypatch.setenv("UMM_GUEST_CACHE", str(tmp_path / "cache"))
    return mirror


def test_the_kernel_comes_with_its_modules_in_their_order(mirror: Mirror) -> None:
    kernel = fetch(K16)
    assert (kernel.page_size, kernel.version, kernel.origin) == (K16, "6.12.107", "debian")
    # Unpacked, since older QEMU boots no packed EFI image.
    assert kernel.image.read_bytes() == image(2)
    assert [path.name for path in kernel.modules] == ["virtio_blk.ko", "lz4.ko", "squashfs.ko", "overlay.ko"]
    assert kernel.modules[1].read_bytes() == module("lz4")
    assert kernel.config and kernel.config.read_text() == "CONFIG_ARM64_16K_PAGES=y\n"
    assert {path.name for path in kernel.image.parent.iterdir() if not path.name.startswith(".")} == {
        *("Image", "config", "modules", "kernel.json")
    }
    assert packaged.cached() == [kernel]


def test_it_is_looked_up_once_a_day_or_when_asked(mirror: Mirror) -> None:
    first = fetch(K16)
    mirror.version = "2"
    assert fetch(K16) == first and mirror.asked == 1
    second = fetch(K16, update=True)
    assert second.image != first.image and mirror.asked == 2
    record = next((mirror.folder / "cache").rglob("linux-image-arm64-16k.json"))
    os.utime(record, (0, 0))
    assert fetch(K16) == second and mirror.asked == 3
    assert len(packaged.cached()) == 2


def test_a_package_that_was_replaced_is_looked_up_again(mirror: Mirror) -> None:
    fetch(K16)
    mirror.gone, mirror.version = {"1"}, "2"
    # Other modules are another entry, so the package is wanted again.
    kernel = fetch(K16, modules=(*packaged.MODULES, "zram"))
    assert [path.stem for path in kernel.modules][-1] == "zram"
    assert mirror.asked == 2


def test_64k_names_what_makes_it(mirror: Mirror) -> None:
    with pytest.raises(
        InputError, match="no arm64 kernel with 64k pages.*guest kernel build --page-size 64k"
    ):
        fetch(PAGE_SIZES[2])
    assert mirror.asked == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"boot/vmlinuz-6.12.107": image(1)}, "has 4k pages, not 16k"),
        ({"boot/vmlinuz-6.12.107": b"damaged" * 99}, "no arm64 kernel image"),
        ({"boot/vmlinuz-2": image(2)}, "it has 2 boot/vmlinuz"),
        ({f"{TREE}/kernel/lib/lz4.ko": None}, "module lz4, which squashfs needs"),
        ({f"{TREE}/kernel/fs/overlay.ko": b"damaged"}, "no kernel module"),
    ],
    ids=["page size", "image", "two", "module missing", "module damaged"],
)
def test_bad_packages_are_named_and_nothing_stays(
    mirror: Mirror, change: dict[str, bytes | None], expected: str
) -> None:
    merged = {**mirror.files, **change}
    mirror.files = {name: data for name, data in merged.items() if data is not None}
    with pytest.raises(InputError, match=expected) as caught:
        fetch(K16)
    assert "\n" not in str(caught.value)
    assert packaged.cached() == []
    assert list((mirror.folder / "cache").rglob("*.new")) == []


def test_a_meta_package_that_names_no_kernel_is_an_error(mirror: Mirror) -> None:
    mirror.names.pop()
    with pytest.raises(UspaceError, match="needs none"):
        fetch(K16)
