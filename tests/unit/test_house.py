"""The house rules of the design that a program can check: who may know whom, and where Python ends."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "uspace_mm"
NATIVE = ROOT / "native"

# Arrows point one way: cli -> subjects -> kernel -> native. What everybody may know is not repeated.
EVERYBODY = {"errors", "sizes"}
SUBJECTS = {"pager", "stores", "zpool", "notifier", "postcopy", "thp", "guest", "elf", "manager"}
MAY_KNOW: dict[str, set[str]] = {
    "errors": set(),
    "sizes": set(),
    "kernel": {"_native"},
    "notifier": {"kernel", "_native"},
    "stores": {"kernel", "_native"},
    "pager": {"stores", "notifier", "kernel", "_native"},
    "zpool": {"pager", "stores", "notifier", "kernel", "_native"},
    "postcopy": {"pager", "stores", "notifier", "kernel", "_native"},
    "manager": {"pager", "stores", "notifier", "kernel", "_native"},
    "thp": {"kernel"},
    "guest": {"kernel"},
    "elf": {"guest"},
    "demo": SUBJECTS | {"kernel"},
    "bench": SUBJECTS | {"kernel", "_native"},
    "cli": SUBJECTS | {"kernel", "demo", "bench"},
}
C_MAY_KNOW: dict[str, set[str]] = {
    "common": set(),
    "kernel": {"common"},
    "store": {"common", "kernel"},
    "notifier": {"common", "kernel"},
    # A library of its own.
    "preload": {"common", "kernel", "notifier"},
    "pager": {"common", "kernel", "store", "notifier"},
    "zpool": {"common", "kernel", "store", "notifier", "pager"},
    "postcopy": {"common", "kernel", "store", "notifier", "pager"},
    # The agent is a program of its own, which runs where nothing else of us does.
    "guest": set(),
    "elf": set(),
}
C_ROOMS_FOR_ALL = {"tests", "bench", "cffi"}


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def c_files() -> list[Path]:
    return sorted(path for path in NATIVE.rglob("*") if path.suffix in (".c", ".h", ".cdef"))


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``: an annotation is no arrow."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from running(node)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and room of each import of this package, relative ones and those inside functions included."""
    package = ("uspace_mm", *path.relative_to(PACKAGE).parts[:-1])
    for node in running(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "uspace_mm" and len(parts) > 1 and not parts[1].startswith("__"):
                yield node.lineno, parts[1]


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_python_arrows_point_one_way(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        allowed: set[str] = EVERYBODY
    else:
        assert own in MAY_KNOW, f"uspace_mm/{own} is new: say in MAY_KNOW whom it may know"
        allowed = MAY_KNOW[own] | EVERYBODY | {own}
    bad = [f"{path.name}:{line} imports {target}" for line, target in imports(path) if target not in allowed]
    assert not bad, f"{own} may know {sorted(allowed)}: {bad}"


INCLUDE = re.compile(r'^\s*#\s*include\s+["<]([^">]+)[">]', re.MULTILINE)


@pytest.mark.parametrize("path", c_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_c_arrows_point_one_way_and_stop_before_python(path: Path) -> None:
    own = path.relative_to(NATIVE).parts[0]
    included = INCLUDE.findall(path.read_text())
    assert "Python.h" not in included
    if own in C_ROOMS_FOR_ALL:
        return
    assert own in C_MAY_KNOW, f"native/{own} is new: say in C_MAY_KNOW whom it may know"
    rooms = {name.split("/")[0] for name in included if (NATIVE / name).is_file()}
    assert rooms <= C_MAY_KNOW[own] | {own}, f"native/{own} may know {sorted(C_MAY_KNOW[own])}"


COMMENTS_AND_STRINGS = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', re.DOTALL)
# A bit of a flag word, `NAME = 1 << 12,`, is no page size.
C_PAGE_SIZE = re.compile(
    r"\b(?:4096|0x1000|PAGE_SIZE|PAGE_SHIFT|PAGE_MASK)[uUlL]*\b|(?<!= )(?<!= \()\b1[uUlL]*\s*<<\s*12\b"
)
# A number that happens to be the same says so on its line: `= 4096; /* no page size: entries per call */`.
EXEMPT = "no page size"


@pytest.mark.parametrize(
    "path", [p for p in c_files() if p.parent.name != "tests"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_c_assumes_no_page_size(path: Path) -> None:
    text = path.read_text()
    code = COMMENTS_AND_STRINGS.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    bad = [
        f"{path.name}:{number}: {line.strip()}"
        for number, (line, bare) in enumerate(zip(text.splitlines(), code.splitlines(), strict=True), 1)
        if C_PAGE_SIZE.search(bare) and EXEMPT not in line
    ]
    assert not bad, (
        f"the base page size is read at run time; another number of this value says '{EXEMPT}: ...'"
    )


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_python_assumes_no_page_size(path: Path) -> None:
    lines = path.read_text().splitlines()
    bad = [
        f"{path.name}:{node.lineno}: {lines[node.lineno - 1].strip()}"
        for node in ast.walk(ast.parse("\n".join(lines)))
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value == 4096
        if EXEMPT not in lines[node.lineno - 1]
    ]
    assert not bad, (
        f"the base page size is read at run time; another number of this value says '{EXEMPT}: ...'"
    )


@pytest.mark.parametrize("path", [*python_files(), *c_files()], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500, "a file of this length holds two subjects"


def test_no_directory_installs_its_pycache() -> None:
    listed = re.search(r"package_directories = \[([^\]]*)\]", (ROOT / "meson.build").read_text())
    assert listed
    found = {str(path.parent.relative_to(PACKAGE)) for path in python_files()}
    assert found == set(re.findall(r"'([^']+)'", listed[1])), "name it in package_directories of meson.build"


def test_versions_agree() -> None:
    found = {
        "pyproject.toml": re.search(
            r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
        ),
        "meson.build": re.search(r"^  version: '([^']+)'", (ROOT / "meson.build").read_text(), re.MULTILINE),
        "native/meson.build": re.search(
            r"^  version: '([^']+)'", (NATIVE / "meson.build").read_text(), re.MULTILINE
        ),
        "__init__.py": re.search(
            r'^__version__ = "([^"]+)"', (PACKAGE / "__init__.py").read_text(), re.MULTILINE
        ),
    }
    versions = {name: match[1] if match else None for name, match in found.items()}
    assert len(set(versions.values())) == 1, versions
    assert f"## {versions['pyproject.toml']}" in (ROOT / "CHANGELOG.md").read_text()
