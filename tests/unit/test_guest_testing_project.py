"""Which files of a project travel, and the layer they become."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from uspace_mm.errors import InputError
from uspace_mm.guest.testing import project
from uspace_mm.guest.testing.project import PLACE, Project


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def git(root: Path, *args: str) -> None:
    if shutil.which("git") is None:
        pytest.skip("lacks: git (Debian: git)")
    subprocess.run(["git", "-C", root, *args], check=True, capture_output=True)


def test_the_nearest_mark_upwards_is_the_root(tmp_path: Path) -> None:
    put(tmp_path, "pyproject.toml", "pkg/pytest.ini", "pkg/tests/test_a.py", "other/x")
    assert project.find_root(tmp_path / "pkg" / "tests") == tmp_path / "pkg"
    assert project.find_root(tmp_path / "other") == tmp_path
    assert project.load(tmp_path / "pkg").inside(tmp_path / "pkg" / "tests") == "tests"
    assert project.load(tmp_path / "pkg").inside(tmp_path) is None


def test_a_folder_without_git(tmp_path: Path) -> None:
    put(tmp_path, "a.py", "src/b.py", "build/x.o", ".venv/c.py", "env/pyvenv.cfg", "env/lib/d.py")
    put(tmp_path, "src/__pycache__/b.pyc", ".git/config", "data/deep/e.bin")
    (tmp_path / "link").symlink_to("a.py")
    os.mkfifo(tmp_path / "fifo")
    loaded = project.load(tmp_path)
    assert loaded.files == ("a.py", "data/deep/e.bin", "link", "src/b.py")


def test_a_git_tree_sends_what_is_not_ignored(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    put(tmp_path, "tracked.py", "build/kept.txt", "ünï \n.txt", "secret.log", "deleted.py")
    (tmp_path / ".gitignore").write_text("*.log\n/ignored/\n")
    git(tmp_path, "add", ".")
    (tmp_path / "deleted.py").unlink()
    put(tmp_path, "untracked.py", "ignored/made/test_x.py", "pkg/__pycache__/x.pyc")
    wanted = (".gitignore", "build/kept.txt", "tracked.py", "untracked.py", "ünï \n.txt")
    assert project.load(tmp_path).files == wanted
    assert project.load(tmp_path / "ignored").files == ("made/test_x.py",), "asked for, though ignored"
    git(tmp_path / "pkg", "init", "-q")
    put(tmp_path, "pkg/inner.py")
    assert "pkg/inner.py" in project.load(tmp_path).files


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        project.load(tmp_path / "nowhere")


def test_the_layer_holds_project_and_harness(tmp_path: Path) -> None:
    if shutil.which("sqfstar") is None or shutil.which("unsquashfs") is None:
        pytest.skip("lacks: sqfstar (Debian: squashfs-tools)")
    root = tmp_path / "p"
    put(root, "a.py", "tests/run.sh")
    (root / "tests" / "run.sh").chmod(0o755)
    (root / "tests" / "link").symlink_to("../a.py")
    os.link(root / "a.py", root / "b.py")
    project.make_layer(project.load(root), {"umm_driver.py": root / "a.py"}, tmp_path / "layer")
    subprocess.run(
        ["unsquashfs", "-q", "-d", tmp_path / "out", tmp_path / "layer"], check=True, capture_output=True
    )
    out = tmp_path / "out"
    inside = out / PLACE.project.lstrip("/")
    assert sorted(p.relative_to(inside).as_posix() for p in inside.rglob("*")) == [
        "a.py",
        "b.py",
        "tests",
        "tests/link",
        "tests/run.sh",
    ]
    assert (inside / "b.py").read_text() == "a.py"
    assert os.access(inside / "tests" / "run.sh", os.X_OK)
    assert os.readlink(inside / "tests" / "link") == "../a.py"
    assert (out / PLACE.harness.lstrip("/") / "umm_driver.py").read_text() == "a.py"


def test_a_layer_of_nothing(tmp_path: Path) -> None:
    if shutil.which("sqfstar") is None:
        pytest.skip("lacks: sqfstar (Debian: squashfs-tools)")
    project.make_layer(Project(tmp_path, (), 0), {}, tmp_path / "layer")
    assert (tmp_path / "layer").stat().st_size > 0
