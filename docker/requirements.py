"""What pyproject.toml asks for, one requirement per line: ``requirements.py build``, or ``run [EXTRA...]``.

The images install these before they see the sources, so that a changed source does not fetch them again.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text())
what, *extras = sys.argv[1:]
if what == "build":
    wanted = [*project["build-system"]["requires"], "ninja"]
else:
    wanted = [*project["project"]["dependencies"]]
    for extra in extras:
        wanted += project["project"]["optional-dependencies"][extra]
print(*wanted, sep="\n")
