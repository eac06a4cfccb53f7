"""What is published of the ablation is what its tables hold."""

from pathlib import Path

import pytest

import ablation_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ablation"


@pytest.fixture(scope="module")
def tables():
    return ablation_report.tables(RESULTS)


def test_every_table_of_the_results_is_that_of_the_rows(tables):
    text = (RESULTS / "RESULTS.md").read_text()
    for table in tables[1:]:
        assert table in text


def test_the_readme_shows_the_short_table(tables):
    assert tables[0] in (ROOT / "README.md").read_text()
