"""scripts/demo, test and bench on machines that lack something: they name it, say what to type, and exit 3.

Each test runs a copy of the scripts in a tree of its own, with a PATH that holds nothing but what the test
puts there. None gets as far as installing anything.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("demo", "test", "bench")
BUILD_FILES = (
    "pyproject.toml",
    "meson.build",
    "meson.options",
    "native/meson.build",
    "native/meson.options",
)
TOOLS = [
    "bash",
    "cat",
    "cut",
    "dirname",
    "env",
    "flock",
    "id",
    "mkdir",
    "readlink",
    "rm",
    "sha256sum",
    "tail",
]


class Machine:
    """A copy of the tree, in a directory with a space in its name, and a PATH with few things on it."""

    def __init__(self, directory: Path) -> None:
        self.tree = directory / "a tree"
        self.bin = directory / "bin"
        self.bin.mkdir()
        shutil.copytree(ROOT / "scripts", self.tree / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        for name in BUILD_FILES:
            (self.tree / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, self.tree / name)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)
        self.program("python3", f'exec "{os.path.realpath(sys.executable)}" "$@"')
        self.program("cc", "exit 0")
        self.program("pkg-config", "exit 0")

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!{self.bin}/bash\n{body}\n")
        path.chmod(0o755)

    def without(self, name: str) -> None:
        (self.bin / name).unlink()

    def start(
        self, script: str | Path, *args: str, cwd: Path | None = None, **env: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.bin / "bash"), str(self.tree / "scripts" / script), *args],
            cwd=cwd,
            env={"PATH": str(self.bin), **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str | Path, *args: str, cwd: Path | None = None, **env: str) -> tuple[int, str]:
        """Exit status and stderr; nothing may be on stdout."""
        process = self.start(script, *args, cwd=cwd, **env)
        out, err = process.communicate(timeout=60)
        assert out == ""
        return process.returncode, err


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_compiler_is_named_with_the_command_to_type(machine: Machine, script: str) -> None:
    machine.without("cc")
    status, err = machine.run(script)
    assert status == 3
    assert f"scripts/{script}: missing: a C compiler (no cc on PATH)\n" in err
    assert "missing: xxhash.h" in err
    assert "apt-get install gcc libc6-dev libxxhash-dev liburcu-dev" in err
    assert not (machine.tree / ".venv").exists()


@pytest.mark.parametrize(
    ("header", "package"), [("xxhash.h", "libxxhash-dev"), ("urcu/urcu-bp.h", "liburcu-dev")]
)
def test_a_missing_header_is_named(machine: Machine, header: str, package: str) -> None:
    # cpp reads the header's name from the source it is given
    machine.program("cc", f"case $(cat) in *{header}*) exit 1 ;; esac")
    status, err = machine.run("demo")
    assert status == 3
    (missing,) = [line for line in err.splitlines() if "missing: " in line]
    assert header in missing
    assert err.rstrip().endswith(f"apt-get install {package}")


def test_a_missing_pkg_config_is_named_unless_another_is_asked_for(machine: Machine) -> None:
    machine.without("pkg-config")
    status, err = machine.run("demo")
    assert status == 3
    assert "missing: pkg-config\n" in err
    assert err.rstrip().endswith("apt-get install pkgconf")
    machine.without("cc")
    machine.program("my-pkgconf", "exit 0")
    status, err = machine.run("demo", PKG_CONFIG="my-pkgconf")
    assert status == 3
    assert "a C compiler" in err
    assert "pkg-config" not in err


def test_no_python_is_named(machine: Machine) -> None:
    machine.without("python3")
    status, err = machine.run("test")
    assert status == 3
    assert "missing: Python 3.11 or newer (no python3 on PATH)" in err
    assert "apt-get install python3 python3-venv python3-dev" in err


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo old 3.9", "is Python 3.9, too old"),
        ("exit 1", "does not run as a Python 3 interpreter"),
        ("echo venv python3.99-venv; echo tag cp399", "missing: the venv module"),
        ("echo headers python3.99-dev; echo tag cp399", "(Python.h)"),
    ],
)
def test_a_python_that_will_not_do_is_named(machine: Machine, answer: str, expected: str) -> None:
    machine.program("python3", answer)
    status, err = machine.run("demo")
    assert status == 3
    assert expected in err
    if "python3.99" in answer:
        assert f"apt-get install {answer.split()[2].rstrip(';')}" in err
    else:
        assert "PYTHON=" in err


def test_python_and_cc_that_were_asked_for_are_not_replaced(machine: Machine) -> None:
    status, err = machine.run("bench", PYTHON="python9.9")
    assert (status, err) == (3, "scripts/bench: PYTHON=python9.9: there is no such interpreter\n")
    status, err = machine.run("bench", CC="no-such-cc -m64")
    assert (status, err) == (3, "scripts/bench: CC=no-such-cc -m64: there is no such compiler\n")


@pytest.mark.parametrize("tool", ["flock", "sha256sum"])
def test_a_missing_tool_is_named(machine: Machine, tool: str) -> None:
    machine.without(tool)
    status, err = machine.run("test")
    assert status == 3
    assert f"missing: {tool};" in err


def test_root_gets_the_packages_from_apt_and_is_told_when_that_fails(
    machine: Machine, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    machine.without("cc")
    machine.without("id")
    machine.program("id", "echo 0")
    machine.program("apt-get", f'echo "$*" >>"{calls}"; echo E: no network >&2; exit 100')
    status, err = machine.run("demo")
    assert status == 3
    assert "E: no network" in err
    assert "missing: a C compiler" in err
    install, update = calls.read_text().splitlines()
    assert install.endswith("install --no-install-recommends gcc libc6-dev libxxhash-dev liburcu-dev")
    assert update.endswith(" update")


def test_package_lists_are_fetched_when_a_package_is_not_found(machine: Machine, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    machine.without("cc")
    machine.without("id")
    machine.program("id", "echo 0")
    # `install` works once `update` ran, and brings a compiler that finds its headers.
    machine.program(
        "apt-get",
        f'case "$*" in *update) : >"{lists}" ;; *) [ -e "{lists}" ] || exit 100;\n'
        f'printf "#!{machine.bin}/bash\\nexit 0\\n" >"{machine.bin}/cc"; chmod +x "{machine.bin}/cc" ;; esac',
    )
    (machine.bin / "chmod").symlink_to(shutil.which("chmod") or "")
    # The set-up then goes on to the virtual environment, which this interpreter refuses to make.
    machine.program(
        "python3", 'case "$*" in *venv*) echo no venv today; exit 1 ;; *-) echo tag cp399 ;; esac'
    )
    status, err = machine.run("demo")
    assert lists.exists()
    assert status == 3
    assert "missing" not in err
    assert "no venv today" in err
    assert "making the virtual environment failed" in err


def test_it_runs_from_anywhere_and_through_a_link(machine: Machine, tmp_path: Path) -> None:
    machine.without("cc")
    (tmp_path / "link").symlink_to(machine.tree / "scripts" / "bench")
    status, err = machine.run(tmp_path / "link", cwd=Path("/"))
    assert status == 3
    assert "scripts/bench: missing: a C compiler" in err
    assert (machine.tree / "build" / "setup.log").is_file()


def test_a_second_set_up_waits_for_the_first(machine: Machine) -> None:
    machine.without("cc")
    (machine.tree / "build").mkdir()
    with (machine.tree / "build" / ".setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = machine.start("test")
        assert process.stderr and process.stdout
        assert process.stderr.readline() == "scripts/test: waiting for another set-up of this tree\n"
        time.sleep(0.1)
        assert process.poll() is None
        fcntl.flock(lock, fcntl.LOCK_UN)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "missing: a C compiler" in err


def test_ci_runs_scripts_test(machine: Machine) -> None:
    (machine.tree / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", machine.tree / ".ci" / "run")
    machine.without("cc")
    status, err = machine.run(machine.tree / ".ci" / "run", CI="true")
    assert status == 3
    assert "scripts/test: missing: a C compiler" in err


def test_what_only_tests_use_is_installed_for_them_alone_and_not_having_it_is_no_failure(
    machine: Machine, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    calls.touch()
    machine.without("id")
    machine.program("id", "echo 0")
    # This release has no buildah: apt-get refuses the whole list for its sake.
    machine.program(
        "apt-get",
        f'echo "$*" >>"{calls}"\ncase "$*" in *buildah*) echo E: no buildah; exit 100 ;;\n'
        f'*" zstd") : >"{machine.bin}/zstd"; chmod +x "{machine.bin}/zstd" ;; esac',
    )
    (machine.bin / "chmod").symlink_to(shutil.which("chmod") or "")
    machine.program("python3", 'case "$*" in *venv*) exit 1 ;; *-) echo tag cp399 ;; esac')
    assert machine.run("demo")[0] == 3
    assert calls.read_text() == ""
    status, err = machine.run("test")
    assert status == 3  # what the interpreter refused, not what apt-get did
    assert "making the virtual environment failed" in err
    first, *others = calls.read_text().splitlines()
    assert {"qemu-system-arm", "buildah", "zstd"} <= set(first.split())
    assert any(call.endswith("install --no-install-recommends zstd") for call in others)
    (left,) = [line for line in err.splitlines() if "what needs them is skipped" in line]
    assert "buildah" in left.split()
    assert "zstd" not in left.split()
