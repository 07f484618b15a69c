"""From headers to a verdict: all rules, for each loader that may map the file, for each page size."""

from __future__ import annotations

from collections.abc import Iterable

from uspace_mm.elf import loaders
from uspace_mm.elf.image import read_image
from uspace_mm.elf.records import (
    FileReport,
    Finding,
    Image,
    Kind,
    Level,
    Libc,
    Loader,
    Status,
    Verdict,
)
from uspace_mm.elf.rules import alignment, congruence, jemalloc, overlap, relro, remedy, sanity
from uspace_mm.elf.source import Source
from uspace_mm.guest.pagesize import PageSize

_LIBRARY_LOADERS = {
    Libc.GLIBC: (Loader.GLIBC, Loader.GLIBC_OLD),
    Libc.MUSL: (Loader.MUSL,),
    Libc.BIONIC: (Loader.BIONIC,),
    Libc.UNKNOWN: (Loader.GLIBC, Loader.GLIBC_OLD, Loader.MUSL),
}
_STATUS = {
    Level.NOTE: Status.LOADS,
    Level.UNKNOWN: Status.UNKNOWN,
    Level.WRONG: Status.WRONG,
    Level.FAILS: Status.FAILS,
}


def loaders_of(image: Image) -> tuple[Loader, ...]:
    """Who may map the file."""
    if image.kind is Kind.EXECUTABLE:
        return (Loader.KERNEL,)
    libraries = _LIBRARY_LOADERS[image.libc]
    return (*libraries, Loader.KERNEL) if image.kind is Kind.BOTH else libraries


def judge(image: Image, page_size: PageSize, jemalloc_at: int | None = None) -> Verdict:
    """The verdict on `image` for `page_size`; `jemalloc_at` is what :func:`jemalloc.find` returned."""
    findings: list[Finding] = []
    statuses: list[tuple[Loader, Status]] = []
    for loader in loaders_of(image):
        found = _check(image, page_size, loader) + jemalloc.check(jemalloc_at, page_size, loader)
        findings += found
        statuses.append((loader, _STATUS[max((f.level for f in found), default=Level.NOTE)]))
    return Verdict(page_size, combine(statuses), tuple(statuses), tuple(findings))


def combine(statuses: Iterable[tuple[Loader, Status]]) -> Status:
    """One status for several loaders: the worst of them, older glibc apart."""
    by_loader = dict(statuses)
    older = by_loader.pop(Loader.GLIBC_OLD, Status.LOADS)
    worst = max(by_loader.values(), key=lambda status: status.rank)
    return Status.NEWER_GLIBC if worst is Status.LOADS and older is not Status.LOADS else worst


def judge_source(
    name: str, machine: str, source: Source, page_sizes: Iterable[PageSize], hint: Libc = Libc.UNKNOWN
) -> FileReport:
    """Verdicts on the ELF file in `source` for each page size; reads its headers and its read-only data.

    Raises :class:`~uspace_mm.elf.image.ElfError` and :class:`~uspace_mm.elf.image.NotLoadableError`.
    """
    image = read_image(source, hint)
    found_at = jemalloc.find(source, image)
    return FileReport(name, machine, image, tuple(judge(image, size, found_at) for size in page_sizes))


def unreadable(name: str, machine: str, reason: str, page_sizes: Iterable[PageSize]) -> FileReport:
    """The report on a file whose headers no loader takes."""
    finding = Finding(sanity.RULE, Level.FAILS, Loader.KERNEL, reason, "refused", remedy=remedy.BROKEN)
    return FileReport(
        name,
        machine,
        None,
        tuple(
            Verdict(size, Status.FAILS, ((Loader.KERNEL, Status.FAILS),), (finding,)) for size in page_sizes
        ),
    )


def _check(image: Image, page_size: PageSize, loader: Loader) -> list[Finding]:
    found = sanity.check(image, loader)
    found += congruence.check(image, page_size, loader)
    found += alignment.check(image, page_size, loader)
    if any(finding.level is Level.FAILS for finding in found):
        return found  # nothing is mapped, so there is nothing to compare
    try:
        space = loaders.load(image.loads, page_size.bytes, loader)
    except loaders.RefusedError as refused:
        found.append(
            Finding(
                overlap.RULE,
                Level.FAILS,
                loader,
                refused.fact,
                refused.consequence,
                segment=refused.segment.index,
                remedy=remedy.MAX_PAGE_SIZE,
                numbers=(("page", page_size.bytes),),
            )
        )
        return found
    if loader is Loader.KERNEL and image.libc is Libc.MUSL and image.interp:
        loaders.give_gaps_to_malloc(space, image.loads, image.relro, page_size.bytes)
    found += overlap.check(image, page_size, loader, space)
    found += relro.check(image, page_size, loader, space)
    return found
