from __future__ import annotations

import pytest

from smpo_pipeline.inversion.advice import health_warnings
from smpo_schemas.manifest import BandHealth


def band(ratio: float | None, start: int = 0) -> BandHealth:
    return BandHealth(
        start=start, stop=start + 200, states=8, noise_ratio=ratio, residual=None, neighbour_correlation=None
    )


@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.25, None])
def test_good_bands_say_nothing(ratio: float | None) -> None:
    assert health_warnings([band(ratio)]) == []


@pytest.mark.parametrize("ratio", [0.79, 0.2, 1.26, 5.0])
def test_bad_bands_are_named_and_remedies_follow_in_order(ratio: float) -> None:
    first, remedies = health_warnings([band(1.0), band(ratio, start=200)])
    assert "200 to 399" in first
    assert f"{ratio:.2f}" in first
    places = [remedies.index(word) for word in ("--renoise-steps 5", "--start level0", "--start T")]
    assert places == sorted(places)


def test_remedies_are_named_once() -> None:
    assert len(health_warnings([band(0.5), band(0.5, 200), band(2.0, 400)])) == 4
