"""The configuration: fragments that say what is wanted, and the check that the kernel's Kconfig granted
it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from uspace_mm.errors import InputError
from uspace_mm.guest.pagesize import PAGE_SIZES, PageSize

FRAGMENTS = Path(__file__).parent / "config"
_SET = re.compile(r"CONFIG_(\w+)=(.*)")
_UNSET = re.compile(r"# CONFIG_(\w+) is not set")


@dataclass(frozen=True)
class Wish:
    """One option of a fragment. ``optional`` says why a kernel may lack it; None: a kernel without it is
    refused."""

    name: str
    value: str
    fragment: str
    optional: str | None = None


def wishes(folder: Path = FRAGMENTS) -> tuple[Wish, ...]:
    """What all fragments ask for, in the order of their names.

    A comment ``# optional: REASON`` makes the option below it one that may be missing. Raises
    :class:`InputError` for a line that is neither comment nor option, and for options that contradict.
    """
    found: dict[str, Wish] = {}
    for path in sorted(folder.glob("*.config")):
        reason: str | None = None
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.startswith("# optional: "):
                reason = line.removeprefix("# optional: ")
                continue
            if not line or line.startswith("#"):
                continue
            match = _SET.fullmatch(line)
            if not match:
                raise InputError(f"{path}:{number}: neither a comment nor CONFIG_NAME=VALUE")
            wish = Wish(match[1], match[2], path.name, reason)
            reason = None
            if (other := found.get(wish.name)) and other.value != wish.value:
                raise InputError(f"{path}:{number}: {wish.name} is {other.value} in {other.fragment}")
            found[wish.name] = wish
    return tuple(found.values())


def write_wishes(page_size: PageSize, wanted: Iterable[Wish], path: Path) -> None:
    """Write the file for KCONFIG_ALLCONFIG: everything wanted, and `page_size`. Nothing else tells sizes
    apart."""
    lines = [f"CONFIG_{wish.name}={wish.value}" for wish in wanted]
    lines += [f"CONFIG_{size.config}={'y' if size is page_size else 'n'}" for size in PAGE_SIZES]
    path.write_text("\n".join(lines) + "\n")


def parse_config(text: str) -> dict[str, str]:
    """The options of a ``.config``, without ``CONFIG_``; one that "is not set" is ``n``."""
    options: dict[str, str] = {}
    for line in text.splitlines():
        if match := _SET.fullmatch(line):
            options[match[1]] = match[2]
        elif match := _UNSET.fullmatch(line):
            options[match[1]] = "n"
    return options


@dataclass(frozen=True)
class Missing:
    """A wish that Kconfig did not grant; ``got`` is what the option is, ``why`` what Kconfig says about
    it."""

    wish: Wish
    got: str
    why: str


def check(wanted: Iterable[Wish], page_size: PageSize, got: Mapping[str, str], source: Path) -> list[Missing]:
    """The optional wishes that `got`, the options of a ``.config``, lacks.

    Raises :class:`InputError` when it lacks any other, naming each with the reason that the Kconfig files
    under `source` give.
    """
    everything = [*wanted, Wish(page_size.config, "y", "the page size")]
    unmet = [wish for wish in everything if got.get(wish.name, "n") != wish.value]
    if not unmet:
        return []
    definitions = _definitions(source, {wish.name for wish in unmet})
    missing = [
        Missing(wish, got.get(wish.name, "n"), _why(wish, definitions.get(wish.name), got)) for wish in unmet
    ]
    if fatal := [item for item in missing if item.wish.optional is None]:
        named = "; ".join(f"{m.wish.name} is {m.got}, not {m.wish.value} ({m.why})" for m in fatal)
        raise InputError(f"{source.name}: cannot have what guests need: {named}; take another source")
    return missing


def _definitions(source: Path, names: set[str]) -> dict[str, list[str]]:
    """For each name that some Kconfig file defines: the lines of its definitions."""
    found: dict[str, list[str]] = {}
    for path in source.rglob("Kconfig*"):
        parts = path.relative_to(source).parts
        if (parts[0] == "arch" and parts[1:2] not in (("arm64",), ("Kconfig",))) or not path.is_file():
            continue
        current: list[str] | None = None
        for line in path.read_text(errors="replace").splitlines():
            if match := re.match(r"(?:menu)?config\s+(\w+)", line):
                current = found.setdefault(match[1], []) if match[1] in names else None
            elif (line and not line[0].isspace()) or line.strip() in ("help", "---help---"):
                current = None
            elif current is not None:
                current.append(line.strip())
    return found


def _why(wish: Wish, definition: list[str] | None, got: Mapping[str, str]) -> str:
    if definition is None:
        return "this source has no such option"
    needs = [line.removeprefix("depends on").strip() for line in definition if line.startswith("depends on")]
    # Of a conjunction, the parts that are plainly off; an "or" is given whole.
    unmet = [
        term
        for need in needs
        for term in (need.split("&&") if "||" not in need else [need])
        if not _holds(term.strip(), got)
    ]
    if unmet:
        return "it depends on " + " and ".join(term.strip() for term in unmet)
    if not any(re.match(r'(bool|tristate|int|hex|string|prompt)\s+"', line) for line in definition):
        return "it cannot be chosen, only selected by others"
    return "Kconfig gave it another value"


def _holds(term: str, got: Mapping[str, str]) -> bool:
    names = re.findall(r"!?\s*\b[A-Z0-9_]+\b", term)
    if "||" in term:
        return any(_holds(part.strip(" ()"), got) for part in term.split("||"))
    return all((got.get(name.lstrip("! "), "n") != "n") != name.startswith("!") for name in names)


def derived(configs: Mapping[PageSize, Mapping[str, str]]) -> dict[str, dict[PageSize, str]]:
    """The options in which `configs` differ, with the value for each page size ("n" where there is no such
    option)."""
    names = sorted(set().union(*configs.values()))
    table = {name: {size: config.get(name, "n") for size, config in configs.items()} for name in names}
    return {name: row for name, row in table.items() if len(set(row.values())) > 1}
