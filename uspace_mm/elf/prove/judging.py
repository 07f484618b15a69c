"""Holds a verdict against what happened in the guest, with the 4K guest as control.

Evidence may make a verdict worse. It makes one better only when the rights and bytes of every LOAD and of
the RELRO range were compared with the file, and for the loader that was watched.
"""

from __future__ import annotations

from dataclasses import replace

from uspace_mm.elf.prove.observation import Observation
from uspace_mm.elf.records import Evidence, Loader, Status, Verdict
from uspace_mm.elf.verdict import combine


def judge(verdict: Verdict, loader: Loader, seen: Observation | None, control: Observation | None) -> Verdict:
    """`verdict` with the evidence of `seen`, given by `loader`; `control` is None for the control."""
    if seen is None or seen.end == "lost":
        return _with(verdict, Evidence(None, False, "the guest ended before the file was loaded"))
    if control is not None and not control.compared:
        return _with(
            verdict,
            Evidence(None, False, f"not loaded with 4k pages either ({control}): no matter of pages"),
        )
    found = _status(seen, control)
    if found is None:
        return _with(verdict, Evidence(None, False, f"not loaded ({seen}), and there is no control for it"))
    text = f"{loader.value}: {_text(seen, control, found)}"
    before = dict(verdict.by_loader).get(loader, verdict.status)
    if found is Status.LOADS and not seen.compared:
        found = before
    # What is unknown (jemalloc) is the file's own matter, the same with an older glibc.
    same = {loader, Loader.GLIBC_OLD} if loader is Loader.GLIBC and before is Status.UNKNOWN else {loader}
    by_loader = tuple(
        (who, found if who is loader or (who in same and status is Status.UNKNOWN) else status)
        for who, status in verdict.by_loader
    )
    status = combine(by_loader)
    if found.failing and found.rank > status.rank:
        status = found
    evidence = Evidence(not found.failing, seen.compared, text)
    return _with(replace(verdict, status=status, by_loader=by_loader), evidence, verdict)


def _status(seen: Observation, control: Observation | None) -> Status | None:
    """What was seen, as a status; None when nothing can be said."""
    if not seen.compared:
        return Status.FAILS if control is not None else None
    if _differences(seen, control):
        return Status.WRONG
    if seen.ended_well and (control is None or seen.code == control.code):
        return Status.LOADS
    # The same end as with 4k pages is the program's own.
    if control is not None and (seen.end, seen.code) == (control.end, control.code):
        return Status.LOADS
    if control is None:
        return None
    return Status.FAILS if seen.end == "killed" else Status.WRONG


def _differences(seen: Observation, control: Observation | None) -> list[str]:
    # What the program itself wrote before it was compared looks the same with 4k pages.
    known = control.differences if control is not None else frozenset()
    return sorted(seen.differences - known)


def _text(seen: Observation, control: Observation | None, found: Status) -> str:
    if found is Status.LOADS:
        return f"rights and bytes of every LOAD and of RELRO are as in the file, then {seen}"
    if not seen.compared:
        return f"not loaded: {seen}; loaded with 4k pages"
    differences = _differences(seen, control)
    if differences:
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        return f"memory differs from the file: {_explain(differences[0])}{more}; {seen}"
    return f"loaded as in the file, then {seen}; with 4k pages {control}"


def _explain(line: str) -> str:
    word, *rest = line.split()
    address = f"at {int(rest[0], 16):#x}" if rest else ""
    if word == "lacks" and len(rest) == 4:
        names = {"4": "R", "2": "W", "1": "X", "5": "RX", "6": "RW", "7": "RWX", "0": "no rights", "3": "WX"}
        return f"{address} wants {names.get(rest[2], rest[2])}, has {names.get(rest[3], rest[3])}"
    told = {
        "unmapped": "nothing is mapped",
        "source": "another place of the file is mapped",
        "bytes": "other bytes",
        "zeros": "no zeros",
        "beyond": "RELRO reaches memory behind the file",
    }
    return f"{told.get(word, word)} {address}"


def _with(verdict: Verdict, evidence: Evidence, before: Verdict | None = None) -> Verdict:
    """`verdict` with `evidence` added to what other loaders gave."""
    first = (before or verdict).evidence
    if first is None:
        return replace(verdict, predicted=(before or verdict).status, evidence=evidence)
    known = [ok for ok in (first.ok, evidence.ok) if ok is not None]
    both = Evidence(
        all(known) if known else None,
        first.compared and evidence.compared,
        f"{first.text}; {evidence.text}",
    )
    return replace(verdict, predicted=(before or verdict).predicted, evidence=both)
