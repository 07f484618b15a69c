"""A guest from a page size alone: finds or makes the kernel and the root file system, and boots them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from uspace_mm.guest.boot.guest import Guest, boot
from uspace_mm.guest.boot.launch import Kernel, RootFilesystem
from uspace_mm.guest.boot.machine import Deadlines, Machine
from uspace_mm.guest.pagesize import PageSize
from uspace_mm.guest.progress import Progress, silent

BUILT = "built"
DEBIAN = "debian"


def ready(
    page_size: PageSize,
    *,
    machine: Machine = Machine(),  # noqa: B008 frozen
    kernel: str | Path | Kernel | None = None,
    root: RootFilesystem | None = None,
    packages: Iterable[str] = (),
    wheels: Iterable[Path] = (),
    pips: Iterable[str] = (),
    overlays: Iterable[Path] = (),
    own: bool = True,
    saved: bool = False,
    deadlines: Deadlines = Deadlines(),  # noqa: B008 frozen
    progress: Progress = silent,
) -> Guest:
    """A booted guest with `page_size`.

    `kernel` is ``"built"`` (our own; None means it too), ``"debian"``, or an image. `root` is used as it is;
    without it one is made with `packages`, `wheels`, `pips`, `overlays` and `own` as for
    :func:`uspace_mm.guest.rootfs.obtain`. With `saved` the guest goes on from a state that was saved after
    a boot, and the first such call saves it. What is missing is made, which takes minutes for a kernel the
    first time. Raises what that raises, and what :func:`boot` raises.
    """
    # Before the root file system: what is wrong with it is known at once.
    found = find_kernel(page_size, kernel, progress=progress)
    if root is None:
        from uspace_mm.guest import rootfs

        root = rootfs.obtain(
            packages=packages, wheels=wheels, pips=pips, overlays=overlays, own=own, progress=progress
        )
    if not saved:
        return boot(found, page_size, root, machine, deadlines=deadlines, progress=progress)
    from uspace_mm.guest.boot.saved import resume

    return resume(found, page_size, root, machine, deadlines=deadlines, progress=progress)


def find_kernel(
    page_size: PageSize, kernel: str | Path | Kernel | None = None, *, progress: Progress = silent
) -> Kernel:
    """The kernel that `kernel` means: see :func:`ready`."""
    from uspace_mm.guest import kernel as kernels

    if kernel is None or kernel == BUILT:
        return kernels.find(page_size, progress=progress)
    if kernel == DEBIAN:
        return kernels.fetch(page_size, progress=progress)
    if isinstance(kernel, (str, Path)):
        return kernels.from_file(Path(kernel))
    return kernel
