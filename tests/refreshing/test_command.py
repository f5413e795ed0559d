"""``smpo-pipeline refresh`` as users run it, and the reward that it writes."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from smpo_common.errors import UserError
from smpo_pipeline.images.decode import decode_image
from smpo_pipeline.rewards import load_reward
from smpo_schemas.scoring.refresh import read_refresh
from smpo_schemas.scoring.scores import read_scores, read_scores_info
from tests.command import assert_one_line, run_here
from tests.embeddings.helpers import make_pairs, make_scores, tinted
from tests.tiny.rewards import make_tiny_aesthetic
from tests.tiny.stable_diffusion import make_tiny_clip

PAIRS = 60
PROMPTS = [f"a cat {number % 20}" for number in range(PAIRS)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """People prefer bluish images to reddish ones, a policy makes reddish ones, and the reward is a random CLIP."""
    folder = tmp_path_factory.mktemp("world")
    make_tiny_clip(folder / "clip")
    make_tiny_clip(folder / "other", seed=1)
    make_tiny_aesthetic(folder / "aesthetic")
    kinds = [((0, 1), (1, 0), (1, 1))[number % 3] for number in range(PAIRS)]
    labels = [(0.0, 1.0, 0.5)[number % 3] for number in range(PAIRS)]
    make_scores(folder / "scores", make_pairs(folder, kinds, labels, PROMPTS))
    make_pairs(folder / "candidates", [(0, 0)] * 30, [None] * 30, PROMPTS[:30])
    make_pairs(folder / "wrong", [(1, 1)] * 30, [None] * 30, PROMPTS[:30])
    return folder


@pytest.fixture
def refresh(world, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def refresh(
        *flags, out=tmp_path / "out", reward=f"clipscore={world / 'clip'}", human=world, candidates=world / "candidates"
    ):
        data = ("--scores", human / "scores", "--pairs", human / "pairs.parquet", "--candidates", candidates)
        how = ("--reward", reward, "--embeddings", world / "embeddings", "--device", "cpu")
        return run_here(capfd, "smpo-pipeline", "refresh", *data, *how, "--out", out, *flags)

    return refresh


@pytest.mark.slow
def test_a_refreshed_reward_prefers_golden_images_and_scores(refresh, world, tmp_path, capfd, here_on_ray):
    done = refresh()
    assert (done.returncode, done.stderr) == (0, "")
    info = read_refresh(tmp_path / "out")
    assert info.after.agreement > info.before.agreement
    assert info.after.golden_over_sample > max(info.before.golden_over_sample, 0.9)
    assert info.after.log_loss < info.before.log_loss
    assert info.change > 0.1
    assert (info.human_pairs, info.human_prompts, info.sampled_prompts, info.rejected) == (60, 20, 20, 0)
    # 20 prompts with 40 decided pairs; 10 prompts have two candidates rows (4 images), 10 one (2).
    assert info.comparisons == sum(4 if int(PROMPTS[n].split()[-1]) < 10 else 2 for n in range(PAIRS) if n % 3 < 2)
    for shown in (f"{info.after.agreement:.1%}", f"{info.before.log_loss:.4f}", f"refreshed={tmp_path / 'out'}"):
        assert shown in done.stdout
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}
    assert refresh().returncode == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*")} == first
    assert refresh(out=tmp_path / "again").returncode == 0
    assert (tmp_path / "again/head.safetensors").read_bytes() == first["head.safetensors"]
    # By command, against the formula in float64.
    spec = ("--reward", f"refreshed={tmp_path / 'out'}", f"clipscore={world / 'clip'}")
    common = ("--pairs", world / "pairs.parquet", "--out", tmp_path / "scored", "--device", "cpu")
    done = here_on_ray("smpo-pipeline", "score", *common, *spec)
    assert done.returncode == 0, done.stderr
    scored = read_scores_info(tmp_path / "scored")
    table = read_scores(tmp_path / "scored", scored)
    reward, base = (load_reward(each, "cpu") for each in spec[1:])
    assert scored.rewards["refreshed"].fingerprint == reward.fingerprint != base.fingerprint
    assert scored.rewards["refreshed"].unit == "cosine"
    v = load_file(tmp_path / "out/head.safetensors")["v"].numpy()
    for row in range(3):
        image, prompt = decode_image(tinted((0, 1, 1)[row], 2 * row)), PROMPTS[row]
        with torch.no_grad():
            embedded = base.embed(base.pixels([image]), [prompt])
        image_D, text_D = (each[0].numpy() / np.linalg.norm(each[0].numpy()) for each in embedded)
        expected = (image_D * text_D).sum() + v @ (image_D * text_D)
        assert table["refreshed_0"][row].as_py() == pytest.approx(expected, rel=1e-5, abs=1e-4)  # v is about 100
    assert scored.rewards["refreshed"].agreement > scored.rewards["clipscore"].agreement


@pytest.mark.slow
def test_v_of_0_is_the_base_to_the_bit(refresh, world, tmp_path):
    images = [decode_image(tinted(number % 2, number)) for number in range(4)]
    for name, flags in (
        ("clipscore=clip", ()),
        ("aesthetic=aesthetic", ("--features", f"pickscore={world / 'other'}")),
    ):
        kind, _, model = name.partition("=")
        base = f"{kind}={world / model}"
        out = tmp_path / kind
        assert refresh(*flags, "--allow-worse", out=out, reward=base).returncode == 0
        refreshed = load_reward(f"refreshed={out}", "cpu")
        assert (refreshed.score(images, PROMPTS[:4]) != load_reward(base, "cpu").score(images, PROMPTS[:4])).all()
        head = load_file(out / "head.safetensors")
        save_file({"v": torch.zeros_like(head["v"])}, out / "head.safetensors")
        with pytest.raises(UserError, match="its head has changed since; refresh again"):
            load_reward(f"refreshed={out}", "cpu")
        refreshed._v_D = torch.zeros_like(head["v"])
        np.testing.assert_array_equal(
            refreshed.score(images, PROMPTS[:4]), load_reward(base, "cpu").score(images, PROMPTS[:4])
        )


def test_blanks_around_a_prompt_do_not_part_it_from_its_samples(refresh, world, tmp_path):
    """`generate` has removed them."""
    make_scores(
        tmp_path / "scores", make_pairs(tmp_path, [(0, 1)] * PAIRS, [0.0] * PAIRS, [f" {p}\n" for p in PROMPTS])
    )
    done = refresh(human=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "samples of 20 of their 20 prompts" in done.stdout


def test_a_reward_that_gets_worse_is_not_written(refresh, world, tmp_path):
    """Samples that look like what people prefer, with a large weight."""
    flags = ("--adversarial", 1000)
    done = refresh(*flags, candidates=world / "wrong", reward=f"refreshed={make_good(refresh, tmp_path)}")
    assert_one_line(done, "of the held-out labels", "nothing is written", "--allow-worse")
    assert not (tmp_path / "out/refresh.json").exists()


def test_labels_by_chance_support_no_change(refresh, world, tmp_path):
    chance = np.random.default_rng(0)
    kinds, labels = chance.integers(2, size=(PAIRS, 2)).tolist(), chance.integers(2, size=PAIRS).astype(float).tolist()
    make_scores(tmp_path / "scores", make_pairs(tmp_path, kinds, labels, PROMPTS))
    data = ("--scores", tmp_path / "scores", "--pairs", tmp_path / "pairs.parquet", "--adversarial", 0)
    line = "the strongest penalty does best on prompts held out"
    assert line in refresh(*data, "--allow-worse").stdout
    assert line not in refresh(out=tmp_path / "true").stdout


def make_good(refresh, tmp_path):
    """A reward that agrees with people: the refreshed one, which can be refreshed again."""
    assert refresh(out=tmp_path / "good").returncode == 0
    return tmp_path / "good"


@pytest.mark.slow
def test_the_seed_draws_the_samples(refresh, world, tmp_path):
    heads = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert refresh("--samples", 1, "--seed", seed, "--folds", 2, out=tmp_path / name).returncode == 0
        heads.append((tmp_path / name / "head.safetensors").read_bytes())
    assert heads[0] == heads[1] != heads[2]


@pytest.mark.slow
def test_mistakes_are_one_line(refresh, world, tmp_path):
    assert_one_line(
        refresh(reward=f"aesthetic={world / 'aesthetic'}"), "has no CLIP of its own", "--features clipscore"
    )
    assert_one_line(refresh(candidates=world / "nowhere"), "--candidates", "does not exist")
    rows = pq.read_table(world / "candidates/pairs.parquet")
    others = rows.set_column(rows.column_names.index("prompt"), "prompt", [["elsewhere"] * 30])
    (tmp_path / "others").mkdir()
    pq.write_table(others, tmp_path / "others/pairs.parquet")
    assert_one_line(
        refresh(candidates=tmp_path / "others"), "--candidates has no image for a prompt of the labelled pairs"
    )
    assert refresh("--folds", 2).returncode == 0
    assert_one_line(refresh("--folds", 3), "holds another refreshed reward", "--overwrite")
    assert refresh("--folds", 3, "--overwrite").returncode == 0
    with pytest.raises(UserError, match="give a folder that `smpo-pipeline refresh` wrote"):
        load_reward("refreshed", "cpu")
    info = json.loads((tmp_path / "out/refresh.json").read_text())
    (tmp_path / "out/refresh.json").write_text(json.dumps(info | {"reward": f"clipscore={world / 'other'}"}))
    with pytest.raises(UserError, match="other has changed since; refresh again"):
        load_reward(f"refreshed={tmp_path / 'out'}", "cpu")
