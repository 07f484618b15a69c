"""The layer with this package and its C core compiled for the guest, and the agent that is its init."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import uspace_mm
from uspace_mm.errors import UspaceError
from uspace_mm.guest import cache
from uspace_mm.guest.progress import Progress, silent
from uspace_mm.guest.rootfs import bytecode, image, toolchain
from uspace_mm.guest.rootfs.packages import identity
from uspace_mm.guest.rootfs.sources import digest_of_files, makers
from uspace_mm.guest.rootfs.target import OWN_SITE, PYTHON, TRIPLET
from uspace_mm.guest.sources import native_sources

_CORE_SOURCES = re.compile(r"^core_sources \+= files\(([^)]*)\)", re.MULTILINE)
# As in native/settings/meson.build, and with the built-in counters: guests have no liburcu.
_CORE_OPTIONS = (
    "-std=gnu11",
    "-O2",
    "-D_GNU_SOURCE",
    "-DXXH_INLINE_ALL",
    "-DUMM_RCU_COUNTERS",
    "-DUMM_RCU_COUNTERS",
    "-fPIC",
    "-fvisibility=hidden",
)
_AGENT_OPTIONS = ("-std=gnu11", "-O2", "-D_GNU_SOURCE", "-Wall", "-pthread")
_PROGRAM = "#!/usr/bin/python3\nimport sys\n\nfrom uspace_mm.cli import main\n\nsys.exit(main())\n"


def agent(progress: Progress = silent) -> Path:
    """The static program that is the guest's init, from ``native/guest``."""
    native = native_sources()
    files = [path for path in sorted((native / "guest").glob("*.[ch]")) if not path.name.startswith("test")]

    def make(entry: Path) -> None:
        progress("compiling the guest's agent")
        with toolchain.toolchain(progress) as tools, tempfile.TemporaryDirectory() as folder:
            sources = [path for path in files if path.suffix == ".c"]
            objects = tools.compile(sources, Path(folder), [*_AGENT_OPTIONS, f"-I{native}"])
            tools.link(objects, entry / "agent", ["-static", "-pthread", "-s"])

    inputs = {
        "sources": digest_of_files((path.name, path) for path in files),
        "options": _AGENT_OPTIONS,
        "makers": makers("own", "toolchain"),
        **toolchain.key(progress),
    }
    return cache.obtain("agent", inputs, make, progress=progress) / "agent"


def obtain(progress: Progress = silent) -> Path:
    """The image with this package."""
    package = Path(uspace_mm.__file__).parent
    described = _metadata()
    module = extension(progress)

    def make(entry: Path) -> None:
        started_s = image.start()
        with tempfile.TemporaryDirectory(dir=entry) as folder:
            tree = Path(folder) / "tree"
            site = tree / OWN_SITE
            for name, path in _python_files(package):
                to = site / "uspace_mm" / name
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)
            shutil.copyfile(module, site / "uspace_mm" / module.name)
            about = site / f"uspace_mm-{uspace_mm.__version__}.dist-info"
            about.mkdir()
            for name, text in described.items():
                (about / name).write_text(text)
            command = tree / "usr/bin/uspace-mm"
            command.parent.mkdir(parents=True)
            command.write_text(_PROGRAM)
            command.chmod(0o755)
            image.normalise(tree, started_s)
            bytecode.compile_tree(tree, progress)
            image.pack(tree, entry / image.NAME, started_s, progress)

    inputs = {
        "python": digest_of_files(_python_files(package)),
        "extension": module.parent.name,
        "metadata": described,
        "bytecode": identity(bytecode.host_python().resolve(progress)),
        "image": image.identity(),
        "makers": makers("own", "bytecode", "image", "target"),
    }
    return cache.obtain("root-own", inputs, make, progress=progress) / image.NAME


def extension(progress: Progress = silent) -> Path:
    """``uspace_mm._native`` for the guest: the core, and the C that cffi writes from its declarations."""
    native = native_sources()
    name = f"_native.cpython-{PYTHON.replace('.', '')}-{TRIPLET}.so"

    def make(entry: Path) -> None:
        progress("compiling the C core for the guest")
        with toolchain.toolchain(progress) as tools, tempfile.TemporaryDirectory() as folder:
            generated = _generate(native, Path(folder))
            core = _core_sources(native)
            options = [*_CORE_OPTIONS, f"-I{native}", f"-I{tools.include}/python{PYTHON}"]
            # assert() names its file: by the same name wherever it is compiled.
            options += [f"-ffile-prefix-map={native}=native", f"-ffile-prefix-map={folder}=native"]
            objects = tools.compile([generated, *core], Path(folder), options)
            tools.link(objects, entry / name, ["-shared", "-pthread", "-Wl,-z,max-page-size=0x10000"])

    inputs = {
        "sources": digest_of_files(_native_files(native)),
        "options": _CORE_OPTIONS,
        "makers": makers("own", "toolchain", "target"),
        **toolchain.key(progress),
    }
    return cache.obtain("extension", inputs, make, progress=progress) / name


def _generate(native: Path, folder: Path) -> Path:
    generated = folder / "_native.c"
    declarations = [str(path) for path in sorted((native / "cffi").glob("*.cdef"))]
    build = native / "cffi/build.py"
    done = subprocess.run(
        [sys.executable, str(build), str(generated), str(build), *declarations],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no reason"]
        raise UspaceError(f"{build} failed: {last[0]}")
    return generated


def _core_sources(native: Path) -> list[Path]:
    """The files that ``native/*/meson.build`` adds to the core; other programs lie beside them."""
    found = []
    for room in sorted(native.glob("*/meson.build")):
        for names in _CORE_SOURCES.findall(room.read_text()):
            found += [room.parent / name for name in re.findall(r"'([^']+)'", names)]
    return found


def _native_files(native: Path) -> Iterator[tuple[str, Path]]:
    declarations = [*(native / "cffi").glob("*.cdef"), native / "cffi/build.py"]
    headers = (path for path in native.glob("*/*.h") if path.parent.name not in ("guest", "tests"))
    for path in [*_core_sources(native), *headers, *declarations]:
        yield str(path.relative_to(native)), path


def _python_files(package: Path) -> Iterator[tuple[str, Path]]:
    for path in package.rglob("*.py"):
        name = path.relative_to(package)
        if name.parts[0] != "_sources":
            yield str(name), path
    yield "py.typed", package / "py.typed"


def _metadata() -> dict[str, str]:
    """The files of our ``.dist-info`` that importlib.metadata reads: name, version, entry points."""
    found = metadata.distribution("uspace-mm")
    texts = {name: found.read_text(name) for name in ("METADATA", "entry_points.txt")}
    return {name: text for name, text in texts.items() if text}
