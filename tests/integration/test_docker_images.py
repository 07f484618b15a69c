"""Images that buildah builds from a Debian of debootstrap; their commands with and without rights."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import uspace_mm
from tests.buildah import Buildah, base_tarball, pip_arguments
from uspace_mm.errors import UspaceError
from uspace_mm.guest import cache, kernel, rootfs
from uspace_mm.guest.pagesize import parse_page_size

ROOT = Path(__file__).resolve().parents[2]
BASE = "localhost/umm-base"
TOOLS = "localhost/umm-tools"
GUEST = "localhost/umm-guest"
# Kinds of the cache of guests that are needed to compile the package for a guest without a network.
FOR_THE_PACKAGE = ("host-python", "resolved", "sysroot")
PROFILE = f"--security-opt=seccomp={ROOT / 'docker' / 'seccomp.json'}"
SOURCES = (
    "pyproject.toml",
    "meson.build",
    "meson.options",
    "README.md",
    "LICENSE",
    ".dockerignore",
    "native",
    "uspace_mm",
    "docker",
)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A build context: what a clone of the tree has, and room for a cache of guests."""
    folder = tmp_path_factory.mktemp("context")
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache", "*.so")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copyfile(ROOT / name, folder / name)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """buildah with the base image in its storage, which is gone afterwards."""
    for tool in ("buildah", "debootstrap"):
        if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            pytest.skip(f"lacks: {tool} (Debian: {tool})")
    if os.geteuid():
        pytest.skip("lacks: root, for debootstrap and chroot isolation")
    try:
        tarball = base_tarball()
    except (OSError, subprocess.SubprocessError, UspaceError) as error:
        pytest.skip(f"lacks: a Debian mirror that answers ({error})")
    engine = Buildah(tmp_path_factory.mktemp("buildah"))
    try:
        engine.import_base(tarball, BASE)
        yield engine
    finally:
        left = engine.remove()
    assert left == []


@pytest.fixture(scope="module")
def tools(buildah: Buildah, context: Path) -> Buildah:
    buildah.build(context, "docker/tools/Dockerfile", TOOLS, {"BASE": BASE, **pip_arguments()})
    return buildah


@pytest.fixture(scope="module")
def page_size(context: Path) -> str:
    """The page size of the kernel that was put into the context, with what the root image is made of."""
    fitting = [built for built in kernel.cached() if built.current]
    if not fitting:
        pytest.skip("lacks: a kernel for guests (uspace-mm guest kernel build --page-size 16k)")
    chosen = next((built for built in fitting if str(built.kernel.page_size) == "16k"), fitting[-1])
    base = rootfs.obtain().layers[0].parent
    to = context / "docker" / "guest" / "cache"
    for entry in (chosen.entry, base):
        shutil.copytree(entry, to / entry.parent.name / entry.name)
    for kind in FOR_THE_PACKAGE:
        shutil.copytree(cache.cache_root() / kind, to / kind)
    return str(chosen.kernel.page_size)


@pytest.fixture(scope="module")
def guest(tools: Buildah, context: Path, page_size: str) -> Buildah:
    """The image of the guests; its first steps are those of the tools, and are not taken again."""
    arguments = {"BASE": BASE, "PAGE_SIZES": page_size, **pip_arguments()}
    tools.build(context, "docker/guest/Dockerfile", GUEST, arguments)
    return tools


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "user"),
    [([], ""), ([PROFILE], ""), ([], "12345:12345")],
    ids=["engine's profile", "our profile", "a user that the image does not know"],
)
def test_a_guest_boots_in_its_image_with_the_kernel_of_the_context(
    guest: Buildah, page_size: str, options: list[str], user: str
) -> None:
    command = ["uspace-mm", "guest", "run", "--page-size", page_size, "--", "getconf", "PAGESIZE"]
    done = guest.call(GUEST, command, options=options, user=user)
    assert (done.returncode, done.stdout) == (0, f"{parse_page_size(page_size).bytes}\n"), done.stderr


@pytest.mark.slow
def test_the_image_of_the_guests_holds_what_boots_and_not_what_made_it(
    guest: Buildah, page_size: str
) -> None:
    done = guest.call(GUEST, ["uspace-mm", "guest", "kernel", "list", "--json"])
    assert done.returncode == 0, done.stderr
    assert page_size in done.stdout
    done = guest.call(GUEST, ["sh", "-c", "ls $UMM_GUEST_CACHE; id -u; find / -xdev -type f -perm /6000"])
    *kinds, user = done.stdout.split()
    # The large layer was taken from the context, not made again under another name.
    layers = guest.call(GUEST, ["sh", "-c", "ls $UMM_GUEST_CACHE/root-base"]).stdout.split()
    assert layers == [rootfs.obtain().layers[0].parent.name]
    assert user == "1000"
    assert {"agent", "kernel", "root-base", "root-own"} <= set(kinds)
    assert not {"apt", "deb", "wheel"} & set(kinds)


@pytest.mark.slow
def test_the_tools_run_as_a_user_without_rights(tools: Buildah) -> None:
    done = tools.call(TOOLS, ["uspace-mm", "--version"])
    assert (done.returncode, done.stdout) == (0, f"uspace-mm {uspace_mm.__version__}\n"), done.stderr
    done = tools.call(TOOLS, ["sh", "-c", "id -u; find / -xdev -type f -perm /6000 2>/dev/null; pwd"])
    assert done.stdout.split() == ["1000", "/home/uspace"]
    # What builds the package does not stay in the image.
    done = tools.call(TOOLS, ["sh", "-c", "command -v gcc pip || echo none; ls /opt"])
    assert done.stdout.split() == ["none", "uspace-mm"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "user", "source"),
    [
        ([], "", None),
        ([PROFILE], "", "user_mode"),
        ([PROFILE, "--cap-add=SYS_PTRACE"], "0", "syscall"),
    ],
    ids=["engine's profile", "our profile", "our profile and CAP_SYS_PTRACE"],
)
def test_the_rights_that_the_readme_names_are_what_the_pager_needs(
    tools: Buildah, options: list[str], user: str, source: str | None
) -> None:
    done = tools.call(TOOLS, ["uspace-mm", "doctor", "--json"], options=options, user=user)
    pager = json.loads(done.stdout)["pager"]
    if source == "user_mode" and Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1":
        source = "syscall"
    assert (pager["works"], pager["source"]) == (source is not None, source), done.stderr
    assert done.returncode == (0 if source else 3)
    done = tools.call(
        TOOLS, ["uspace-mm", "demo", "pager", "/etc/services", "--json"], options=options, user=user
    )
    assert done.returncode == (0 if source else 3), done.stderr
    assert source or "seccomp profile" in done.stderr


def stages(name: str) -> dict[str, str]:
    """The stages of a Dockerfile by the name or place, without comments."""
    text = (ROOT / "docker" / name / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    parts = re.split(r"^(?=FROM )", "\n".join(lines), flags=re.MULTILINE)[1:]
    found = {}
    for number, part in enumerate(parts):
        named = re.match(r"FROM \S+ AS (\S+)", part)
        found[named[1] if named else str(number)] = part
    return found


def test_both_images_build_the_package_in_the_same_steps() -> None:
    assert stages("tools")["build"] == stages("guest")["build"]


@pytest.mark.parametrize("name", ["tools", "guest"])
def test_a_dockerfile_is_for_every_engine_and_names_no_host(name: str) -> None:
    text = (ROOT / "docker" / name / "Dockerfile").read_text()
    assert text.splitlines()[0].startswith("# ")
    assert not re.search(r"^# *syntax=|<<|--mount|--link|--parents|--chmod", text, re.MULTILINE)
    assert not re.search(r"https?:|debian\.org|pypi", text, re.IGNORECASE)
    last = list(stages(name).values())[-1]
    assert "\nUSER uspace\n" in last
