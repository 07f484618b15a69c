"""Kernels that run: their page size, that they differ in nothing else, what they offer to memory work."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.kernel_images import choosing_at_boot, write
from uspace_mm.errors import UnsupportedError
from uspace_mm.guest.kernel import Kernel, boot_argument, fetch, find, from_file
from uspace_mm.guest.kernel.comparison import measure
from uspace_mm.guest.kernel.inspection import inspect
from uspace_mm.guest.kernel.options import derived, parse_config
from uspace_mm.guest.pagesize import PAGE_SIZES, PageSize, parse_page_size

K64 = parse_page_size("64k")
# What Kconfig derives from the page size (6.12).
DERIVED = {
    *("ARM64_4K_PAGES", "ARM64_16K_PAGES", "ARM64_64K_PAGES", "PAGE_SHIFT", "PAGE_SIZE_LESS_THAN_64KB"),
    *("HAVE_PAGE_SIZE_4KB", "HAVE_PAGE_SIZE_16KB", "HAVE_PAGE_SIZE_64KB", "PAGE_SIZE_LESS_THAN_256KB"),
    *("PAGE_SIZE_4KB", "PAGE_SIZE_16KB", "PAGE_SIZE_64KB", "ARCH_FORCE_MAX_ORDER", "PGTABLE_LEVELS"),
    *("ARM64_CONT_PTE_SHIFT", "ARM64_CONT_PMD_SHIFT", "ARM64_PA_BITS_52", "ARM64_VA_BITS_36"),
    *("ARM64_VA_BITS_39", "ARM64_VA_BITS_42", "ARM64_VA_BITS_47", "ARCH_MMAP_RND_BITS"),
    *("ARCH_MMAP_RND_BITS_MIN", "ARCH_MMAP_RND_BITS_MAX", "ARCH_MMAP_RND_COMPAT_BITS_MIN"),
    # Swapping huge pages whole is written for 4K; sharing tables of huge pages needs four levels.
    *("ARCH_WANTS_THP_SWAP", "THP_SWAP", "ARCH_WANT_HUGE_PMD_SHARE", "HUGETLB_PMD_PAGE_TABLE_SHARING"),
}
OFFERED = (
    "/proc/config.gz",
    "/proc/self/pagemap",
    "/proc/kpageflags",
    "/proc/pressure/memory",
    "/proc/sys/vm/unprivileged_userfaultfd",
    "/proc/sys/vm/nr_hugepages",
    "/proc/self/io",
    "/dev/userfaultfd",
    "/dev/loop-control",
    "/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_none",
    "/sys/kernel/mm/ksm/run",
    "/sys/kernel/mm/page_idle/bitmap",
    "/sys/kernel/mm/damon/admin",
    "/sys/kernel/mm/lru_gen/enabled",
    "/sys/module/zswap/parameters/enabled",
    "/sys/block/zram0/disksize",
    "/sys/kernel/tracing/events/huge_memory/mm_khugepaged_scan_pmd/enable",
    "/sys/kernel/tracing/events/vmscan",
    "/sys/bus/virtio/drivers/virtio_blk",
    "/sys/bus/virtio/drivers/virtio_console",
    "/sys/bus/virtio/drivers/virtio_balloon",
    "/sys/bus/virtio/drivers/virtio_rng",
    "/sys/bus/pci/drivers/pvpanic-pci",
    "/sys/class/rtc/rtc0",
)


@dataclass
class Found:
    """What the guest printed, sorted by the word in front."""

    page_bytes: int = 0
    console: str = ""
    words: dict[str, list[str]] = field(default_factory=dict)


def own_kernel(size: PageSize) -> Kernel:
    try:
        return find(size, build=False)
    except UnsupportedError:
        pytest.skip(f"lacks: a kernel with {size} pages (uspace-mm guest kernel build --page-size {size})")


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for program, package in (
        ("qemu-system-aarch64", "qemu-system-arm"),
        ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    ):
        if not shutil.which(program):
            pytest.skip(f"lacks: {program} (Debian: {package})")
    path = tmp_path_factory.mktemp("init") / "init"
    source = Path(__file__).with_name("kernel_init.c")
    subprocess.run(["aarch64-linux-gnu-gcc", "-static", "-O1", "-o", path, source], check=True)
    return path


def cpio(files: dict[str, bytes | None]) -> bytes:
    """An archive in the "newc" format; None is a directory."""
    out = b""
    for number, (name, data) in enumerate([*files.items(), ("TRAILER!!!", b"")], 1):
        mode = 0o040755 if data is None else 0o100755
        content = data or b""
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        entry = b"070701" + b"".join(b"%08x" % value for value in fields) + name.encode() + b"\0"
        out += entry + bytes(-len(entry) % 4) + content + bytes(-len(content) % 4)
    return out


def boot(
    kernel: Kernel,
    init: Path,
    folder: Path,
    *,
    arguments: str = "",
    ask: Sequence[str] = (),
    disk: bool = False,
) -> Found:
    files: dict[str, bytes | None] = {"init": init.read_bytes(), "modules": None, "sys": None, "dev": None}
    for number, module in enumerate(kernel.modules):
        files[f"modules/{number:02}-{module.name}"] = module.read_bytes()
    write(folder / "initramfs", cpio(files))
    write(folder / "disk", bytes(1 << 20))
    drive = ["-drive", f"file={folder / 'disk'},if=none,id=d,format=raw", "-device", "virtio-blk-pci,drive=d"]
    done = subprocess.run(
        [
            *("qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a76", "-m", "512M"),
            *("-nodefaults", "-nographic", "-serial", "stdio", "-no-reboot"),
            *("-kernel", str(kernel.image), "-initrd", str(folder / "initramfs")),
            *("-append", f"console=ttyAMA0 quiet panic=-1 {arguments} -- {' '.join(ask)}"),
            *(drive if disk else ()),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=90,
        check=True,
        text=True,
        errors="replace",
    )
    found = Found(console=done.stdout)
    for line in done.stdout.replace("\r", "").splitlines():
        word, _, rest = line.partition(" ")
        found.words.setdefault(word, []).append(rest)
    assert "END" in found.words, done.stdout
    assert "FAILED" not in found.words, done.stdout
    found.page_bytes = int(found.words["PAGESZ"][0])
    return found


@pytest.mark.parametrize("size", PAGE_SIZES, ids=str)
def test_our_kernels_run_with_their_page_size_and_offer_what_is_needed(
    size: PageSize, init: Path, tmp_path: Path
) -> None:
    found = boot(own_kernel(size), init, tmp_path, ask=OFFERED, disk=True)
    assert found.page_bytes == size.bytes
    assert found.words.get("ABSENT", []) == []
    assert found.words["PRESENT"] == list(OFFERED)
    filesystems = {line.split()[-1] for line in found.words["FILESYSTEM"]}
    assert filesystems >= {"squashfs", "erofs", "overlay", "ext4", "tmpfs", "hugetlbfs", "proc", "devtmpfs"}
    assert set(found.words["CONTROLLERS"][0].split()) >= {"memory", "pids", "hugetlb"}


def test_the_three_differ_in_nothing_but_the_page_size() -> None:
    configs = {}
    for size in PAGE_SIZES:
        kernel = own_kernel(size)
        assert kernel.config is not None
        configs[size] = parse_config(kernel.config.read_text())
    table = derived(configs)
    for name, row in table.items():
        print(f"{name:32}", *(f"{size}: {value}" for size, value in row.items()))
    assert set(table) <= DERIVED
    assert {name for name in table if name.endswith("K_PAGES")} == {size.config for size in PAGE_SIZES}


@pytest.mark.parametrize("size", PAGE_SIZES, ids=str)
def test_an_image_says_what_it_was_built_for(size: PageSize) -> None:
    kernel = own_kernel(size)
    found = inspect(kernel.image)
    assert (found.page_size, found.config, found.contradiction) == (size, size, None)
    assert (found.version, found.page_size_from) == (kernel.version, "header")
    assert found.memory_bytes is not None and found.memory_bytes > found.kernel_bytes


def test_text_and_data_are_those_of_binutils() -> None:
    if not shutil.which("size"):
        pytest.skip("lacks: size (Debian: binutils)")
    kernel = own_kernel(K64)
    assert kernel.vmlinux is not None
    found = inspect(kernel.vmlinux).sections
    assert found is not None
    line = subprocess.check_output(["size", "--format=berkeley", kernel.vmlinux], text=True).splitlines()[1]
    assert [found.text_bytes, found.data_bytes, found.bss_bytes] == [int(word) for word in line.split()[:3]]
    column = measure("64k")
    assert column.kb["text"] == found.text_bytes / 1024 and column.kb["image"] > column.kb["data"]


def test_a_stand_in_for_an_image_of_all_sizes_falls_back_silently(init: Path, tmp_path: Path) -> None:
    """No released kernel chooses its page size at boot: this stand-in is one for 64K that says "unspecified".

    It shows what the argument does where nobody listens to it: nothing at all. So the guest must be asked.
    """
    kernel = from_file(write(tmp_path / "Image", choosing_at_boot(own_kernel(K64).image.read_bytes())))
    assert kernel.page_size is None
    wanted = parse_page_size("16k")
    found = boot(kernel, init, tmp_path, arguments=boot_argument(wanted))
    assert found.page_bytes == K64.bytes != wanted.bytes
    assert boot_argument(wanted) == "arm64.pagesize=16k"


@pytest.mark.slow
def test_debians_kernel_runs_with_the_modules_it_needs(init: Path, tmp_path: Path) -> None:
    size = parse_page_size("16k")
    kernel = fetch(size)
    assert kernel.origin == "debian" and kernel.version.endswith("-16k")
    assert [module.stem for module in kernel.modules] == ["virtio_mmio", "virtio_blk", "squashfs", "overlay"]
    assert fetch(size) == kernel
    asked = ("/dev/vda", "/sys/bus/virtio/drivers/virtio_blk", "/sys/module/overlay")
    found = boot(kernel, init, tmp_path, ask=asked, disk=True)
    assert found.page_bytes == size.bytes
    assert found.words.get("PRESENT") == list(asked)
    assert {line.split()[-1] for line in found.words["FILESYSTEM"]} >= {"squashfs", "overlay", "tmpfs"}
