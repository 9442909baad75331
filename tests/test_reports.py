"""The page of the reports is what its sources give."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import reports
from resfast.studies.definition import names, study
from resfast.studies.results import Row, save_results


def test_the_page_is_that_of_the_catalog_and_the_results():
    assert reports.PAGE.read_text(encoding="utf-8") == reports.page(), (
        "run python -m benchmarks.reports"
    )


def test_a_figure_comes_from_the_newest_results_and_full_ones_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reports, "ROOT", tmp_path)
    name = names()[0]
    one = study(name)
    assert reports.measured(name) is None
    for day, folder, accuracy in (("1", name, 0.5), ("2", f"{name}-quick", 0.3), ("3", name, 0.6)):
        path = tmp_path / "benchmarks" / "results" / day / "studies" / folder
        path.mkdir(parents=True)
        rows = [
            Row(variant=v.name, group=None, seed=seed, accuracy=accuracy, data="digits", device="d")
            for v in one.variants
            for seed in range(2)
        ]
        save_results(path / "results.csv", rows)
    found = reports.measured(name)
    assert (found.quick, found.rows[0].accuracy) == (False, 0.6)
    first = next(reports._variant_rows(one, found))
    assert "60.00%" in first
    assert "2 seeds" in first
    shutil.rmtree(tmp_path / "benchmarks" / "results" / "1")
    shutil.rmtree(tmp_path / "benchmarks" / "results" / "3")
    found = reports.measured(name)
    assert found.quick
    assert "quick: 30.00%" in next(reports._variant_rows(one, found))
    assert all("quick" in row or "not measured" in row for row in reports._claim_rows(one, found))
