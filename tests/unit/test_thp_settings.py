"""The huge page settings on a tree of plain files: what is refused, and that everything is put back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from uspace_mm.errors import InputError, KernelError, UnsupportedError
from uspace_mm.kernel.proc import page_size
from uspace_mm.kernel.transparent_hugepage import Choice, Counter, Text, TransparentHugepage, Value

PMD_PAGES = 8
FILES = {
    "enabled": "always [madvise] never",
    "defrag": "always defer defer+madvise [madvise] never",
    "shmem_enabled": "always within_size advise [never] deny force",
    "use_zero_page": "1",
    "hpage_pmd_size": str(PMD_PAGES * page_size()),
    "hugepages-64kB/enabled": "always inherit madvise [never]",
    "hugepages-64kB/stats/split": "17",
    "hugepages-8kB/shmem_enabled": "always [inherit] within_size advise never",
    "khugepaged/defrag": "1",
    "khugepaged/pages_to_scan": "512",
    "khugepaged/scan_sleep_millisecs": "10000",
    "khugepaged/alloc_sleep_millisecs": "60000",
    "khugepaged/max_ptes_none": "7",
    "khugepaged/max_ptes_swap": "1",
    "khugepaged/max_ptes_shared": "4",
    "khugepaged/pages_collapsed": "3",
    "khugepaged/full_scans": "0",
    "from_the_future": "0",
    "choice_from_the_future": "this [that]",
}
READ_ONLY = {"hpage_pmd_size", "khugepaged/pages_collapsed", "khugepaged/full_scans"}


class Tree:
    """Files that behave like the kernel's: a word written becomes the one in brackets."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, text in FILES.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
            path.chmod(0o444 if name in READ_ONLY or "/stats/" in name else 0o644)

    def contents(self) -> dict[str, str]:
        return {name: (self.root / name).read_text() for name in FILES}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    made = Tree(tmp_path)
    original = Choice.write

    def write_as_the_kernel(self: Choice, value: str) -> None:
        words = [f"[{word}]" if word == value else word for word in self.choices]
        original(self, value)
        self.path.write_text(" ".join(words) + "\n")

    plain = TransparentHugepage.setting

    def setting(self: TransparentHugepage, name: str) -> object:
        found = plain(self, name)
        if not isinstance(found, Choice):
            # A regular file keeps the tail of what was longer; a sysfs file does not.
            write = found.write

            def write_whole(value: Value) -> None:
                write(value)  # type: ignore[arg-type]
                found.path.write_text(found.format(value) + "\n")  # type: ignore[arg-type]

            found.write = write_whole  # type: ignore[method-assign]
        return found

    monkeypatch.setattr(Choice, "write", write_as_the_kernel)
    monkeypatch.setattr(TransparentHugepage, "setting", setting)
    return made


def test_every_file_has_a_value_of_its_type(tree: Tree) -> None:
    values = TransparentHugepage(tree.root).read_all()
    assert set(values) == set(FILES)
    assert values["enabled"] == "madvise"
    assert values["khugepaged/defrag"] is True
    assert values["khugepaged/pages_to_scan"] == 512
    assert values["hugepages-64kB/stats/split"] == 17
    assert values["from_the_future"] == "0"
    assert values["choice_from_the_future"] == "that"


def test_kinds_are_told_from_names_and_unknown_files_from_content(tree: Tree) -> None:
    thp = TransparentHugepage(tree.root)
    assert isinstance(thp.setting("from_the_future"), Text)
    assert isinstance(thp.setting("choice_from_the_future"), Choice)
    assert isinstance(thp.setting("hugepages-64kB/stats/split"), Counter)
    assert set(thp.settings()) == {name for name in FILES if name not in READ_ONLY and "/stats/" not in name}


def test_sizes_and_their_missing_files(tree: Tree) -> None:
    thp = TransparentHugepage(tree.root)
    assert thp.sizes() == [8 << 10, 64 << 10]
    small, large = thp.size(8 << 10), thp.size(64 << 10)
    assert small.enabled is None
    assert small.shmem_enabled is not None and small.shmem_enabled.read() == "inherit"
    assert large.enabled is not None and large.enabled.read() == "never"
    assert large.shmem_enabled is None
    assert large.read_statistics() == {"split": 17}
    with pytest.raises(InputError, match="this kernel has 8k, 64k"):
        thp.size(5)


@pytest.mark.parametrize(
    ("name", "value", "permitted"),
    [
        ("enabled", "sometimes", "always, madvise, never"),
        ("enabled", "", "always, madvise, never"),
        ("enabled", 1, "always, madvise, never"),
        ("hugepages-64kB/enabled", "force", "always, inherit, madvise, never"),
        ("use_zero_page", 2, "0, 1"),
        ("use_zero_page", "1", "0, 1"),
        ("khugepaged/defrag", 1.0, "0, 1"),
        ("khugepaged/pages_to_scan", 0, "1 to 4294967295"),
        ("khugepaged/pages_to_scan", 1 << 32, "1 to 4294967295"),
        ("khugepaged/pages_to_scan", "512", "1 to 4294967295"),
        ("khugepaged/pages_to_scan", True, "1 to 4294967295"),
        ("khugepaged/scan_sleep_millisecs", -1, "0 to 4294967295"),
        ("khugepaged/max_ptes_none", PMD_PAGES, f"0 to {PMD_PAGES - 1}"),
        ("khugepaged/max_ptes_shared", -1, f"0 to {PMD_PAGES - 1}"),
        ("khugepaged/full_scans", 0, "read only"),
        ("hpage_pmd_size", 4, "read only"),
        ("from_the_future", "two\nlines", "one line"),
        ("from_the_future", 5, "one line"),
        ("no_such_file", 1, "is not a file below"),
        ("../enabled", "never", "is not a file below"),
        ("khugepaged", "never", "is not a file below"),
    ],
)
def test_a_bad_value_is_refused_before_anything_is_written(
    tree: Tree, name: str, value: Value, permitted: str
) -> None:
    thp = TransparentHugepage(tree.root)
    before = tree.contents()
    # `defrag` comes first and would be fine: it must not be written either.
    with pytest.raises(InputError) as caught:
        thp.write({"defrag": "never", name: value})
    assert permitted in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError), thp.changed({"defrag": "never", name: value}):
        pytest.fail("the block must not run")
    assert tree.contents() == before


def test_changed_is_in_force_and_put_back(tree: Tree) -> None:
    thp = TransparentHugepage(tree.root)
    before = tree.contents()
    with thp.changed({"enabled": "always", "khugepaged/pages_to_scan": 99999, "use_zero_page": False}):
        assert thp.enabled.read() == "always"
        assert thp.khugepaged.pages_to_scan.read() == 99999
        assert thp.use_zero_page.read() is False
        assert thp.defrag.read() == "madvise"
    assert tree.contents() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_settings_are_put_back_when_the_block_raises(tree: Tree, error: type[BaseException]) -> None:
    thp = TransparentHugepage(tree.root)
    before = tree.contents()
    with pytest.raises(error), thp.preserve():
        thp.write({"enabled": "never", "khugepaged/max_ptes_none": 0, "from_the_future": "abc"})
        assert tree.contents() != before
        raise error
    assert tree.contents() == before


def test_nested_changes_unwind_in_order(tree: Tree) -> None:
    thp = TransparentHugepage(tree.root)
    with thp.changed({"enabled": "always"}):
        with thp.changed({"enabled": "never"}):
            assert thp.enabled.read() == "never"
        assert thp.enabled.read() == "always"
    assert thp.enabled.read() == "madvise"


def test_settings_that_exclude_each_other_are_retried(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with shmem_enabled=force and a size that inherits it: what is refused first goes through later."""
    thp = TransparentHugepage(tree.root)
    before = tree.contents()
    write = Choice.write
    refused: list[str] = []

    def picky(self: Choice, value: str) -> None:
        if self.name == "defrag" and thp.enabled.read() == "always":
            refused.append(value)
            raise KernelError("write(defrag)", 22)
        write(self, value)

    with thp.preserve():
        thp.write({"defrag": "never", "enabled": "always"})
        monkeypatch.setattr(Choice, "write", picky)
    assert refused == ["madvise"]
    assert tree.contents() == before


def test_what_cannot_be_put_back_is_said(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    thp = TransparentHugepage(tree.root)

    def broken(self: Choice, value: str) -> None:
        raise KernelError(f"write({self.name}, {value!r})", 5)

    with pytest.raises(KernelError, match=r"write\(enabled, 'madvise'\)"), thp.changed({"enabled": "never"}):
        monkeypatch.setattr(Choice, "write", broken)
    monkeypatch.undo()


def test_the_blocks_own_error_comes_first(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    thp = TransparentHugepage(tree.root)

    def broken(self: Choice, value: str) -> None:
        raise KernelError(f"write({self.name}, {value!r})", 5)

    def run() -> None:
        with thp.changed({"enabled": "never"}):
            monkeypatch.setattr(Choice, "write", broken)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run()
    assert any("write(enabled, 'madvise')" in note for note in caught.value.__notes__)


def test_no_huge_pages_at_all(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="CONFIG_TRANSPARENT_HUGEPAGE"):
        TransparentHugepage(tmp_path)


def test_a_vanished_file_names_itself(tree: Tree) -> None:
    thp = TransparentHugepage(tree.root)
    (tree.root / "use_zero_page").unlink()
    with pytest.raises(KernelError, match="this kernel does not have it"):
        thp.use_zero_page.read()
    with pytest.raises(InputError, match="no such file"):
        thp.use_zero_page.write(True)


@pytest.mark.parametrize(
    "parse", [lambda t: t.khugepaged.pages_to_scan.parse, lambda t: t.use_zero_page.parse]
)
def test_text_of_people_is_parsed_or_refused(
    tree: Tree, parse: Callable[[TransparentHugepage], Callable[[str], object]]
) -> None:
    parser = parse(TransparentHugepage(tree.root))
    assert parser("1") == 1
    for bad in ("", "one", "0x1", "1.5", " 1"):
        with pytest.raises(InputError):
            parser(bad)
