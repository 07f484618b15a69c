"""What is wanted of a configuration, what Kconfig granted, and why it did not grant the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from uspace_mm.errors import InputError
from uspace_mm.guest.kernel.options import (
    Wish,
    check,
    derived,
    parse_config,
    wishes,
    write_wishes,
)
from uspace_mm.guest.pagesize import PAGE_SIZES, parse_page_size

K16 = parse_page_size("16k")
GRANTED = {"ARM64_16K_PAGES": "y", "ARM64_4K_PAGES": "n"}


def test_the_fragments_ask_for_what_memory_work_needs() -> None:
    names = {wish.name for wish in wishes() if wish.value == "y"}
    assert names >= {
        *("USERFAULTFD", "TRANSPARENT_HUGEPAGE", "MEMCG", "ZRAM", "ZSWAP", "KSM", "IDLE_PAGE_TRACKING"),
        *(
            "PROC_PAGE_MONITOR",
            "HUGETLBFS",
            "DAMON_VADDR",
            "MEM_SOFT_DIRTY",
            "FTRACE",
            "SQUASHFS",
            "EROFS_FS",
        ),
        *(
            "SQUASHFS",
            "OVERLAY_FS",
            "VIRTIO_BLK",
            "VIRTIO_CONSOLE",
            "IKCONFIG",
            "IKCONFIG_PROC",
            "PROC_SYSCTL",
        ),
    }
    # A page size in a fragment would be in all three kernels.
    assert not any(name.endswith("_PAGES") for name in names)


def test_soft_dirty_is_asked_for_and_may_be_missing() -> None:
    (wish,) = (wish for wish in wishes() if wish.name == "MEM_SOFT_DIRTY")
    assert wish.optional is not None and "HAVE_ARCH_SOFT_DIRTY" in wish.optional
    (missing,) = check([wish], K16, GRANTED, Path("none"))
    assert missing.wish is wish
    assert missing.why == "this source has no such option"


def fragments(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.config").write_text(text)
    return folder


def test_fragments_are_read(tmp_path: Path) -> None:
    folder = fragments(
        tmp_path,
        b="# a comment\nCONFIG_B=n\n\n# optional: old kernels\nCONFIG_C=64\nCONFIG_A=y\n",
        a="CONFIG_A=y\n",
    )
    assert wishes(folder) == (
        Wish("A", "y", "b.config"),
        Wish("B", "n", "b.config"),
        Wish("C", "64", "b.config", "old kernels"),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CONFIG_A=n\n", "A is y in a.config"),
        ("A=y\n", "b.config:1"),
        ("CONFIG_B=y # why\n\nx\n", "b.config:3"),
    ],
)
def test_bad_fragments_are_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        wishes(fragments(tmp_path, a="CONFIG_A=y\n", b=text))


def test_sizes_differ_in_one_choice_only(tmp_path: Path) -> None:
    written = {}
    for size in PAGE_SIZES:
        write_wishes(size, wishes(), tmp_path / "wishes")
        written[size] = parse_config((tmp_path / "wishes").read_text())
    assert set(derived(written)) == {size.config for size in PAGE_SIZES}
    for size in PAGE_SIZES:
        assert [s for s in PAGE_SIZES if written[size][s.config] == "y"] == [size]


KCONFIG = """
config NEEDS
\tbool "Needs much"
\tdepends on GIVEN && ABSENT
\tdepends on !FORBIDDEN
\thelp
\t  depends on NOTHING: this is prose.

menuconfig EITHER
\tbool "Either"
\tdepends on ABSENT || OTHER
config HIDDEN
\tdef_bool n
config VALUE
\tint "A number"
"""


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (Wish("NEEDS", "y", "f"), "it depends on ABSENT and !FORBIDDEN"),
        (Wish("EITHER", "y", "f"), "it depends on ABSENT || OTHER"),
        (Wish("HIDDEN", "y", "f"), "only selected by others"),
        (Wish("UNHEARD", "y", "f"), "no such option"),
        (Wish("VALUE", "7", "f"), "VALUE is 3, not 7 (Kconfig gave it another value)"),
        (Wish("GIVEN", "n", "f"), "GIVEN is y, not n"),
    ],
    ids=lambda value: value.name if isinstance(value, Wish) else "",
)
def test_what_is_missing_is_named_with_the_reason(tmp_path: Path, wish: Wish, reason: str) -> None:
    (tmp_path / "mm").mkdir()
    (tmp_path / "mm" / "Kconfig").write_text(KCONFIG)
    got = {**GRANTED, "GIVEN": "y", "FORBIDDEN": "y", "VALUE": "3"}
    with pytest.raises(InputError) as caught:
        check([wish], K16, got, tmp_path)
    assert wish.name in str(caught.value) and reason in str(caught.value)
    missing = check([Wish(wish.name, wish.value, "f", "says the test")], K16, got, tmp_path)
    assert [item.wish.name for item in missing] == [wish.name]


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ONE.*TWO"):
        check([Wish("ONE", "y", "f"), Wish("TWO", "y", "f")], K16, GRANTED, tmp_path)


def test_another_page_size_is_never_accepted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ARM64_16K_PAGES is n"):
        check([], K16, {"ARM64_4K_PAGES": "y"}, tmp_path)


def test_a_config_is_parsed() -> None:
    text = '# Linux/arm64 6.12\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C="x=y"\nCONFIG_D=0x10\n'
    assert parse_config(text) == {"A": "y", "B": "n", "C": '"x=y"', "D": "0x10"}
