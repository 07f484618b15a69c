"""A root file system in a guest: Debian, Python, our package, and everything that a caller can add to it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.integration.guest_boot import Output, any_kernel, run
from tests.unit.test_guest_rootfs_wheels import make_wheel
from uspace_mm.guest import rootfs
from uspace_mm.guest.boot import Guest, Machine, boot
from uspace_mm.guest.outcome import Exited

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    folder = tmp_path_factory.mktemp("root")
    overlay = folder / "overlay"
    (overlay / "bin").mkdir(parents=True)
    (overlay / "src").mkdir()
    (overlay / "bin/added").write_text("#!/bin/sh\necho added\n")
    (overlay / "bin/added").chmod(0o755)
    (overlay / "src/module.py").write_text("value = 1\n")
    wheel = make_wheel(
        folder,
        "extra",
        files={"extra/__init__.py": "def main():\n    print('extra runs')\n"},
        entry_points="[console_scripts]\nextra = extra:main\n",
    )
    root = rootfs.obtain(packages=["hello"], wheels=[wheel], overlays=[overlay])
    kernel, size = any_kernel()
    with boot(kernel, size, root, Machine(memory_bytes=512 << 20)) as guest:
        yield guest


def python(guest: Guest, code: str, *options: str) -> Output:
    outcome, output = run(guest, "python3", *options, "-c", code)
    assert outcome == Exited(0), output.err.decode()
    return output


def test_what_was_added_is_there(guest: Guest) -> None:
    for command, expected in (("hello", "Hello, world!"), ("added", "added"), ("extra", "extra runs")):
        outcome, output = run(guest, command)
        assert (outcome, output.out.decode().strip()) == (Exited(0), expected)


def test_python_imports_what_every_guest_has_without_compiling(guest: Guest) -> None:
    """python -v says of each module where its code came from; "matches" is bytecode that is valid."""
    outcome, output = run(
        guest,
        "env",
        "PYTHONPATH=/src",
        "python3",
        "-v",
        "-c",
        "import numpy, pytest, psutil, cffi, rich, uspace_mm.kernel.features, extra, module",
    )
    assert outcome == Exited(0)
    lines = output.err.decode().splitlines()
    assert sum(" matches " in line for line in lines) > 300
    compiled_here = [line for line in lines if line.startswith(("# wrote", "# code object from '"))]
    compiled_here = [line for line in compiled_here if "pyc'" not in line]
    assert compiled_here == []


def test_an_edited_module_is_noticed(guest: Guest) -> None:
    guest.put("/src/module.py", b"value = 2\n")
    output = python(guest, "import sys; sys.path.insert(0, '/src'); import module; print(module.value)")
    assert output.out == b"2\n"


def test_our_package_runs(guest: Guest) -> None:
    outcome, output = run(guest, "uspace-mm", "doctor", "--json")
    assert outcome == Exited(0), output.err.decode()
    assert json.loads(output.out)


def test_the_loaders_cache_is_what_ldconfig_would_write(guest: Guest) -> None:
    """Debian's own ldconfig, for once where it can run."""
    _, ours = run(guest, "ldconfig", "-p")
    outcome, output = run(guest, "ldconfig", "-C", "/tmp/ld.so.cache")
    assert outcome == Exited(0), output.err.decode()
    _, theirs = run(guest, "ldconfig", "-p", "-C", "/tmp/ld.so.cache")

    def libraries(printed: Output) -> list[str]:
        # /lib is a link to usr/lib, and searched first by Debian's.
        lines = printed.out.decode().replace("=> /lib/", "=> /usr/lib/").splitlines()
        # Where a name is found twice, the first is what is loaded.
        return list({line.split()[0]: line.strip() for line in reversed(lines) if "=>" in line}.values())[
            ::-1
        ]

    known, expected = libraries(ours), libraries(theirs)
    # We go by links instead of what a library calls itself: libbz2.so.1 has another name inside.
    extra = [line for line in known if line not in expected]
    assert [line for line in known if line not in extra] == expected
    assert len(expected) > 50 and len(extra) < 5
    found = python(guest, "from ctypes.util import find_library as f; print(f('c'), f('z'))")
    assert found.out == b"libc.so.6 libz.so.1\n"


def test_accounts_and_names(guest: Guest) -> None:
    _, output = run(
        guest, "sh", "-c", "id; hostname; setpriv --reuid nobody --clear-groups id -un; which python awk"
    )
    assert output.out.decode().splitlines() == [
        "uid=0(root) gid=0(root) groups=0(root)",
        "guest",
        "nobody",
        "/usr/bin/python",
        "/usr/bin/awk",
    ]


def test_any_user_may_use_python(guest: Guest) -> None:
    outcome, output = run(
        guest,
        "setpriv",
        "--reuid",
        "nobody",
        "--clear-groups",
        "python3",
        "-c",
        "import numpy, uspace_mm, extra",
    )
    assert outcome == Exited(0), output.err.decode()


def test_musls_loader_is_there(guest: Guest) -> None:
    _, output = run(guest, "/lib/ld-musl-aarch64.so.1")
    assert output.err.startswith(b"musl libc (aarch64)")


def test_pytest_runs(guest: Guest) -> None:
    guest.put("/tmp/t/test_it.py", b"def test_it():\n    assert 1 + 1 == 2\n")
    outcome, output = run(guest, "python3", "-m", "pytest", "-q", "/tmp/t")
    assert outcome == Exited(0), output.out.decode()
    assert b"1 passed" in output.out
