"""What the README shows works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "code", BLOCKS, ids=lambda code: f"line {README[: README.index(code)].count(chr(10)) + 1}"
)
def test_the_code_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_there_is_code_to_run_and_no_link_to_a_file_that_is_not_there() -> None:
    assert BLOCKS
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
            assert (ROOT / target).exists(), f"{document} links to {target}"
        # Paths in backquotes of the tree itself.
        for target in re.findall(r"`\.?/?((?:scripts|native|uspace_mm|tests|docker)/[\w./-]+)`", text):
            if not re.search(r"NAME", target):
                assert (ROOT / target).exists(), f"{document} names {target}"
