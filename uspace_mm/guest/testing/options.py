"""Options of the pytest on the host, as the pytest in a guest gets them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from uspace_mm.guest.testing.job import PROJECT, join, translated
from uspace_mm.guest.testing.project import Project

# What the host does itself: choosing and ordering tests, stopping, reporting, distributing.
_HOST_ONLY = frozenset(
    {"file_or_dir", "plugins", "keyword", "markexpr", "deselect", "ignore", "ignore_glob", "maxfail"}
    | {"usepdb", "usepdb_cls", "trace", "collectonly", "lf", "failedfirst", "newfirst", "stepwise"}
    | {"stepwise_skip", "stepwise_reset", "cacheclear", "cacheshow", "last_failed_no_failures", "xmlpath"}
    | {"junitprefix", "pastebin", "numprocesses", "dist", "tx", "maxprocesses", "looponfail", "distload"}
    | {"px", "debug", "help", "version", "inifilename", "rootdir", "basetemp", "override_ini"}
    | {"confcutdir", "durations", "durations_min", "log_file", "setuponly", "setupshow", "setupplan"}
    | {"color", "code_highlight", "random_order_bucket", "repeat", "importmode", "assertmode", "capture"}
    | {"testrunuid", "loadgroup", "disable_plugin_autoload", "force_short_summary", "htmlpath"}
    | {"show_fixtures", "show_fixtures_per_test", "markers"}
)
_HOST_ONLY_PREFIXES = ("cov", "no_cov", "guest_", "benchmark", "json_report", "report_log", "allure", "xdist")


def options_of(config: pytest.Config, project: Project) -> dict[str, Any]:
    """The options that shape a test and its report, with paths as the guest sees them."""
    found = {
        name: translated(value, project.root)
        for name, value in vars(config.option).items()
        if name not in _HOST_ONLY and not name.startswith(_HOST_ONLY_PREFIXES) and is_plain(value)
    }
    # A file that does not import fails its own tests only: the host has collected them all.
    return {**found, "continue_on_collection_errors": True}


def arguments_of(config: pytest.Config, project: Project, files: Iterable[str]) -> tuple[str, ...]:
    """What pytest in the guest must know before it has options: root directory, ini file, plugins, files."""
    option = config.option
    root = project.inside(config.rootpath)
    arguments = [
        f"--rootdir={PROJECT if root is None else join(PROJECT, root)}",
        f"--import-mode={option.importmode}",
        f"--assert={option.assertmode}",
        f"--capture={option.capture}",
        "--override-ini=addopts=",  # they are among the options already
    ]
    ini = None if config.inipath is None else project.inside(config.inipath)
    if ini is not None:
        arguments.append(f"--config-file={join(PROJECT, ini)}")
    cut = project.inside(Path(option.confcutdir)) if option.confcutdir else None
    if cut is not None:
        arguments.append(f"--confcutdir={join(PROJECT, cut)}")
    arguments += [f"--override-ini={value}" for value in option.override_ini or ()]
    arguments += [f"-p{name}" for name in option.plugins]
    return (*arguments, *(join(PROJECT, name) for name in files))


def is_plain(value: object) -> bool:
    """Whether JSON can carry it."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(part) for part in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(part) for key, part in value.items())
    return value is None or isinstance(value, (str, int, float, bool))
