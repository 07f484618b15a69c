"""The benchmark of guests runs and reports what it promises."""

from __future__ import annotations

import json

import pytest

from tests.integration.guest_boot import any_kernel
from uspace_mm.cli import main


@pytest.mark.slow
def test_guest_reports_boots_and_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    _, size = any_kernel()
    assert main(["bench", "guest", "--quick", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    record = json.loads(captured.out)
    results, ratios = record["results"], record["ratios"]
    names = {f"ours_vs_bare_boot_{size}", f"fresh_vs_bare_boot_{size}", "suite_end_vs_20_s"}
    assert set(ratios) == names
    assert results[f"first_result_{size}_s"] <= results[f"suite_end_{size}_s"]
    ratio = results[f"run_true_{size}_s"] / results[f"bare_boot_{size}_s"]
    assert ratios[f"ours_vs_bare_boot_{size}"] == pytest.approx(ratio)
