"""All rewards at once through ``score``, over rows that break scorers."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smpo_pipeline.images.decode import decode_image
from smpo_pipeline.rewards import load_reward
from smpo_schemas.rejects import read_rejects
from smpo_schemas.scoring.scores import read_scores, read_scores_info
from tests.pictures import encode, picture
from tests.rewards.test_own import guide_code

pytestmark = pytest.mark.slow


def odd_rows() -> list[dict]:
    """Write pairs with one oddity each, among normal ones."""
    good, whole = encode(picture(60, 44, seed=9)), encode(picture(200, 200))
    buffer = io.BytesIO()
    picture(6_000, 4_000).save(buffer, "JPEG", quality=60)  # more than a chunk's bytes
    odd = {
        "corrupted": (whole[: len(whole) // 2], "a cat"),
        "black": (encode(Image.new("RGB", (64, 48))), "a cat"),
        "one pixel": (encode(picture(1, 1), "PNG"), "a cat"),
        "24 megapixels": (buffer.getvalue(), "a cat"),
        "long prompt": (encode(picture(50, 50)), "cat " * 2_500),
        "empty prompt": (encode(picture(50, 50)), ""),
        "control characters": (encode(picture(50, 50)), "a\x00b\x1b[2J\r\x07 [/red] \u202e"),
        "10 MB prompt": (encode(picture(50, 50)), "cat " * 2_500_000),
    }
    plain = [(encode(picture(40 + number, 30, seed=number)), f"a dog and {number}") for number in range(len(odd))]
    both = [each for pair in zip(odd.values(), plain, strict=True) for each in pair]
    names = [name for number, odd_name in enumerate(odd) for name in (odd_name, f"plain {number}")]
    return [
        {"pair_id": name, "prompt": prompt, "image_0": image, "image_1": good}
        for name, (image, prompt) in zip(names, both, strict=True)
    ]


def test_odd_rows_are_scored_rightly_or_rejected_and_change_nothing_else(folders, tmp_path, on_ray):
    rows = odd_rows()
    (tmp_path / "my_rewards.py").write_text(guide_code())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    # Without clipscore, which is pickscore's class under another name: one process less to start.
    specs = [f"{name}={folder}" for name, folder in folders.items() if name != "clipscore"]
    specs.append("my_rewards:Sharpness")
    common = ("score", "--pairs", tmp_path / "pairs.parquet", "--out", tmp_path / "out", "--device", "cpu")
    done = on_ray("smpo-pipeline", *common, "--batch-size", 5, "--reward", *specs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    info = read_scores_info(tmp_path / "out")
    table = {row["pair_id"]: row for row in read_scores(tmp_path / "out", info).to_pylist()}
    rejects = {reject.pair_id: reject.reason for reject in read_rejects(tmp_path / "out" / "rejected.parquet")}
    assert set(rejects) == {"corrupted", "one pixel", "10 MB prompt"}
    assert rejects["10 MB prompt"] == "text too long: prompt has 10000000 characters, above 100000"
    assert rejects["corrupted"].startswith("image not readable")
    # One pixel has no Laplacian: the user's reward returned NaN, and the pair is rejected for all rewards.
    assert rejects["one pixel"] == "not finite: sharpness gave no number for an image of this pair"
    assert list(table) == [row["pair_id"] for row in rows if row["pair_id"] not in rejects]

    here = pytest.MonkeyPatch()
    here.syspath_prepend(tmp_path)
    rewards = [load_reward(spec, "cpu") for spec in specs]
    here.undo()
    assert set(info.rewards) == {reward.name for reward in rewards}
    for reward in rewards:
        assert info.rewards[reward.name].fingerprint == reward.fingerprint
    for row in rows:
        if row["pair_id"] in rejects:
            continue
        images = [decode_image(row[f"image_{index}"]) for index in range(2)]
        for reward in rewards:
            stored = [table[row["pair_id"]][f"{reward.name}_{index}"] for index in range(2)]
            alone = [reward.score([image], [row["prompt"]])[0] for image in images]
            np.testing.assert_allclose(stored, alone, rtol=1e-5, atol=1e-5, err_msg=f"{reward.name}, {row['pair_id']}")


def test_one_pixel_has_a_right_score_where_the_reward_can_tell(folders):
    """Resized it is one colour: its score is that of a square of this colour, whatever the crop."""
    pixel, square = picture(1, 1), picture(1, 1).resize((64, 64), Image.Resampling.NEAREST)
    for name, folder in folders.items():
        first, second = load_reward(f"{name}={folder}", "cpu").score([pixel, square], ["a cat"] * 2)
        assert first == pytest.approx(second, abs=1e-5), name
