"""The pytest plugin on the host: ``@pytest.mark.pagesize("16k", "64k")`` runs a test in guests with them.

It is an entry point, so every pytest run of an environment with this package imports it: what guests need is
imported by the first test that is marked. Fixtures of marked tests run in the guest, with the test.

With xdist every worker boots guests of its own and runs item after item in them; ``--dist loadgroup`` keeps
each page size on one worker, as the marked tests of a size are a group.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from uspace_mm.guest.testing.remote import Remote

MARK = "pagesize"
# The parameter by which pytest makes an item per page size; no test takes it as an argument.
PARAMETER = "_guest_page_size"
SIZES = ("4k", "16k", "64k")
LOCALLY = "none"

_SIZE: pytest.StashKey[str] = pytest.StashKey()
_GUEST_NAME: pytest.StashKey[str] = pytest.StashKey()
_REMOTE: pytest.StashKey[Remote] = pytest.StashKey()

_OPTIONS = {
    "memory": "memory of each guest (1G)",
    "cpus": "CPUs of each guest (2)",
    "kernel": "kernel image to boot for its page size, 'built' (default) or 'debian'",
    "wheel": "wheel to install in the guests",
    "pip": "package to install in the guests, as pip names it",
    "overlay": "folder whose files are added to the guests",
    "project": "folder that travels into the guests (the project around the root directory)",
    "test-timeout": "seconds that a test may take in a guest (120)",
}


def _inside() -> bool:
    """Whether this is the pytest in a guest, where the reporter has the same mark and options."""
    return "umm_reporter" in sys.modules


def pytest_addoption(parser: pytest.Parser) -> None:
    if _inside():
        return
    group = parser.getgroup("guest", "tests in guests with other page sizes (uspace_mm)")
    group.addoption(
        "--guest-page-sizes",
        metavar="SIZES",
        help="limit tests marked pagesize to these (4k,16k,64k); 'none' runs them on this machine",
    )
    for name, text in _OPTIONS.items():
        group.addoption(f"--guest-{name}", action="append", default=[], metavar="VALUE", help=text)
        parser.addini(f"guest_{name.replace('-', '_')}", text, type="args", default=[])


def pytest_configure(config: pytest.Config) -> None:
    if not _inside():
        config.addinivalue_line(
            "markers",
            f"{MARK}(*sizes): run the test in guests with these page sizes ('4k', '16k', '64k'; "
            "without any: all); --guest-page-sizes limits them",
        )
        _chosen(config)  # refuses what is none before anything is collected


def _several(argument: object) -> Sequence[object]:
    return argument if isinstance(argument, (list, tuple)) else str(argument).split(",")


def _sizes_of(config: pytest.Config, mark: pytest.Mark) -> list[str]:
    """The page sizes of a mark, limited by the option; empty where the option leaves none."""
    if mark.kwargs:
        raise pytest.UsageError(f"pytest.mark.{MARK} takes page sizes, not {next(iter(mark.kwargs))}")
    words = [part for argument in mark.args for part in _several(argument)]
    named = [_name(part, f"pytest.mark.{MARK}") for part in words] or list(SIZES)
    chosen = _chosen(config)
    return [name for name in dict.fromkeys(named) if name in chosen]


def _chosen(config: pytest.Config) -> Sequence[str]:
    text = config.getoption("guest_page_sizes", None)
    if text is None or text == "all":
        return SIZES
    if text == LOCALLY:
        return ()
    return [_name(part, "--guest-page-sizes") for part in str(text).split(",")]


def _name(part: object, where: str) -> str:
    from uspace_mm.errors import InputError
    from uspace_mm.guest.pagesize import parse_page_size

    try:
        return parse_page_size(str(part)).name
    except InputError as error:
        raise pytest.UsageError(f"{where}: {error}") from error


def _locally(config: pytest.Config) -> bool:
    return _inside() or config.getoption("guest_page_sizes", None) == LOCALLY


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker(MARK)
    if mark is None or _locally(metafunc.config):
        return
    sizes = _sizes_of(metafunc.config, mark)
    if not sizes:
        return  # pytest_collection_modifyitems says so
    groups = metafunc.config.pluginmanager.hasplugin("xdist")
    parameters = [
        pytest.param(size, id=size, marks=[pytest.mark.xdist_group(f"guest-{size}")] if groups else [])
        for size in sizes
    ]
    metafunc.fixturenames.append(PARAMETER)
    metafunc.parametrize(PARAMETER, parameters)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _locally(config):
        return
    found: list[pytest.Item] = []
    for item in items:
        mark = item.get_closest_marker(MARK)
        found += [item] if mark is None else _per_size(config, item, mark)
    if any(_SIZE in item.stash for item in found) and not config.option.collectonly:
        for option, name in (("usepdb", "--pdb"), ("trace", "--trace")):
            if config.getoption(option, False):
                raise pytest.UsageError(
                    f"{name} does not reach into a guest: leave the tests marked {MARK} out, "
                    "or run them on this machine with --guest-page-sizes none"
                )
    items[:] = found


def _per_size(config: pytest.Config, item: pytest.Item, mark: pytest.Mark) -> list[pytest.Item]:
    """The items that stand for `item`: itself where pytest made one per size, else (unittest, marks that a
    conftest adds) copies of it."""
    callspec = getattr(item, "callspec", None)
    if callspec is not None and PARAMETER in callspec.params:
        size = str(callspec.params[PARAMETER])
        item.stash[_SIZE] = size
        item.stash[_GUEST_NAME] = without_size(item.name, size)
        return [item]
    sizes = _sizes_of(config, mark)
    if not sizes:
        item.add_marker(
            pytest.mark.skip(
                f"--guest-page-sizes {config.option.guest_page_sizes} leaves none of its page sizes"
            )
        )
        return [item]
    return [_copy(item, size) for size in sizes]


def without_size(name: str, size: str) -> str:
    """The item's name in the guest: ``test[16k]`` is ``test``, ``test[a-16k]`` is ``test[a]``."""
    stem, bracket, identity = name.removesuffix("]").partition("[")
    parts = identity.split("-")
    index = len(parts) - 1 - parts[::-1].index(size)  # the last: another parameter may look the same
    del parts[index]
    return f"{stem}{bracket}{'-'.join(parts)}]" if parts else stem


def _copy(item: pytest.Item, size: str) -> pytest.Item:
    clone = copy.copy(item)
    clone.stash = pytest.Stash()
    clone.stash[_SIZE] = size
    clone.stash[_GUEST_NAME] = item.name
    clone.name = f"{item.name[:-1]}-{size}]" if item.name.endswith("]") else f"{item.name}[{size}]"
    assert item.parent is not None
    if hasattr(item, "_id"):  # pytest 9.1 made the node id an object
        clone._id = item.parent.id.child(clone.name)
    else:
        clone._nodeid = item.nodeid.removesuffix(item.name) + clone.name  # type: ignore[attr-defined]
    return clone


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    size = item.stash.get(_SIZE, None)
    if size is None:
        return None
    remote = item.config.stash.get(_REMOTE, None)
    if remote is None:
        from uspace_mm.guest.testing.remote import Remote, Wanted

        wanted = [
            Wanted(other, other.stash[_SIZE], other.stash[_GUEST_NAME])
            for other in item.session.items
            if _SIZE in other.stash
        ]
        remote = item.config.stash[_REMOTE] = Remote(item.config, wanted)
    remote.run(item, nextitem)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    remote = session.config.stash.get(_REMOTE, None)
    if remote is not None:
        # 0 and 1: it ran to its end.
        remote.close(ended_early=bool(session.shouldfail or session.shouldstop or exitstatus > 1))
