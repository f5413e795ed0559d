"""A report of four models."""

from __future__ import annotations

import pytest

from tests.evaluation.report.made import Made, make_report


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of 45 prompts in three categories, one of which has no name."""
    return make_report(tmp_path_factory.mktemp("report"))
