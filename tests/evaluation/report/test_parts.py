from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smpo_common.errors import UserError
from smpo_pipeline.evaluation.report.charts import curve, distribution, ticks
from smpo_pipeline.evaluation.report.curves import read_curves
from smpo_pipeline.evaluation.report.gallery import Spot, select_extremes, select_random
from smpo_pipeline.evaluation.report.pictures import embed, embed_all


def test_curves_of_a_resumed_and_killed_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "lr": 0.1, "loss": 9.0, "fixed": 1.0, "first_only": 3.0},
        {"step": 2, "lr": 0.2, "loss": 8.0, "fixed": 1.0, "gap": None},
        {"step": 2, "lr": 0.3, "loss": 7.0, "fixed": 1.0},
        {"step": 3, "lr": 0.4, "loss": float("nan"), "fixed": 1.0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    curves = read_curves(path)
    assert list(curves) == ["loss", "lr"]
    assert [values.tolist() for values in curves["loss"]] == [[1, 2], [9, 7]]
    assert [values.tolist() for values in curves["lr"]] == [[1, 2, 3], [0.1, 0.3, 0.4]]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(UserError, match="line 2"):
        read_curves(path)


def test_extremes_take_each_prompt_once_and_only_real_gains() -> None:
    difference = np.array([[0.5, 0.9], [-0.2, 0.1], [-0.3, -0.1], [0.0, 0.0]])
    chosen = select_extremes(difference)
    assert chosen.best == [Spot(0, 1), Spot(1, 1)]
    assert chosen.worst == [Spot(2, 0), Spot(1, 0)]


def test_random_choice_is_reproducible_and_of_distinct_prompts() -> None:
    spots = select_random(50, 4)
    assert spots == select_random(50, 4)
    assert len({spot.prompt for spot in spots}) == len(spots) == 12
    assert len(select_random(3, 1)) == 3


def test_small_images_are_embedded_losslessly_and_large_ones_reduced(tmp_path: Path) -> None:
    Image.effect_noise((32, 24), 90).save(tmp_path / "small.png")
    Image.effect_noise((1024, 512), 90).save(tmp_path / "large.png")
    small = embed(tmp_path / "small.png", 16)
    assert (small.size, small.hard_pixels) == ((32, 24), True)
    with Image.open(tmp_path / "small.png") as original:
        np.testing.assert_array_equal(decode(small.uri, "png"), np.asarray(original.convert("RGB")))
    large = embed(tmp_path / "large.png", 384)
    assert (large.size, large.hard_pixels) == ((1024, 512), False)
    assert decode(large.uri, "webp").shape == (192, 384, 3)
    assert decode(embed(tmp_path / "large.png", 2000).uri, "webp").shape == (512, 1024, 3)


def decode(uri: str, kind: str) -> np.ndarray:
    head, content = uri.split(",")
    assert head == f"data:image/{kind};base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        return np.asarray(image.convert("RGB"))


def test_the_largest_size_that_fits_is_taken(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        Image.effect_noise((300, 300), 90).save(path)
    whole = embed_all([*paths, *paths])  # each once
    assert (whole.side, whole.reduced, sorted(whole.by_path)) == (1024, 0, paths)
    total = sum(len(each.uri) for each in whole.by_path.values())
    assert embed_all(paths, budget=total).side == 1024
    less = embed_all(paths, budget=total - 1)
    assert (less.side, less.reduced) == (256, 3)
    assert sum(len(each.uri) for each in less.by_path.values()) < total
    assert embed_all(paths, budget=1).side == 256


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (-3, 5, [-2, 0, 2, 4]), (0, 0, [0]), (990, 1010, [990, 995, 1000, 1005, 1010])],
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(wanted)


def test_charts_stand_constant_data_and_escape_their_words() -> None:
    chart = distribution({"a": np.zeros((3, 2)), "b": np.zeros((3, 2))}, "scores of <a> & b")
    assert "&lt;a&gt; &amp; b" in chart
    assert "nan" not in chart
    line = curve(np.arange(2000.0), np.sin(np.arange(2000.0) / 50), "loss")
    assert "nan" not in line
    assert len(line) < 15_000
