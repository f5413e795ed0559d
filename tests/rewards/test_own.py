"""A user's own reward: named as MODULE:CLASS, or offered by a package."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smpo_common.errors import UserError
from smpo_pipeline.rewards import checked_scores, load_reward, parse_reward, reward_classes

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "scoring.md"


def guide_code() -> str:
    """Read the guide's example: its first block of Python."""
    return re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Change to a temporary working directory, from which modules are imported; undo both afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_the_guides_example_scores(here):
    assert len(guide_code().strip().splitlines()) <= 22
    (here / "my_rewards.py").write_text(guide_code())
    reward = load_reward("my_rewards:Sharpness", "cpu")
    sharp = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    plain = Image.new("RGB", (40, 40), "white")
    scores = reward.score([plain, sharp], ["a", "b"])
    assert scores[0] == 0
    assert scores[1] > 1
    assert (reward.name, reward.unit) == ("sharpness", "grey levels")
    # Laplacian by hand: a single bright pixel.
    dot = Image.new("RGB", (5, 5))
    dot.putpixel((2, 2), (90, 90, 90))
    values = np.zeros((3, 3))
    values[1, 1], values[0, 1], values[2, 1], values[1, 0], values[1, 2] = -360, 90, 90, 90, 90
    np.testing.assert_allclose(reward.score([dot], [""]), [values.std()])


def test_a_model_may_be_given(here):
    (here / "own_model.py").write_text(
        guide_code().replace("self.model = ", "self.given = model\n        self.model = ")
    )
    assert load_reward("own_model:Sharpness=some/where:1=2", "cpu").given == "some/where:1=2"
    assert parse_reward("own_model:Sharpness=")[1] is None


def test_an_installed_package_may_offer_one(here, monkeypatch):
    """Write a package's metadata with an entry point, as pip does."""
    (here / "offered.py").write_text(guide_code())
    info = here / "offered-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
    points = "sharpness = offered:Sharpness\nother = offered:Sharpness\nbroken = offered:Nothing\n"
    (info / "entry_points.txt").write_text(f"[smpo.rewards]\n{points}")
    monkeypatch.syspath_prepend(here)
    assert load_reward("sharpness", "cpu").unit == "grey levels"
    with pytest.raises(UserError, match="--reward other: .*name 'sharpness'"):
        load_reward("other", "cpu")
    with pytest.raises(UserError, match="has no 'Nothing'"):
        load_reward("broken", "cpu")
    with pytest.raises(UserError, match=r"known: aesthetic, broken, .*sharpness.*or your own as MODULE:CLASS"):
        load_reward("shrapness", "cpu")


def test_an_unusable_class_is_one_line(here):
    base = guide_code()
    (here / "bad.py").write_text(
        base
        + "\n\nclass Named(Sharpness):\n    name = 'a:b'\n"
        + "\n\nclass Taken(Sharpness):\n    name = 'pickscore'\n"
        + "\n\nclass Half(Reward):\n    name = 'half'\n"
    )
    (here / "syntax.py").write_text("def (")
    (here / "folder").mkdir()
    for spec, message in {
        "nowhere:Sharpness": "nowhere cannot be imported: No module named 'nowhere'",
        "syntax:Sharpness": "syntax cannot be imported: invalid syntax",
        ":Sharpness": "--reward :Sharpness: ''",
        "./bad.py:Sharpness": "--reward ./bad.py:Sharpness: './bad.py'",
        "sys:Sharpness": "sys has no 'Sharpness'",
        "folder:Sharpness": "folder has no 'Sharpness'",
        "bad:Missing": "bad.py has no 'Missing'",
        "bad:np": "subclass of smpo_pipeline.rewards.Reward",
        "bad:Named": "the name 'a:b' cannot be a column",
        "bad:Taken": "the name 'pickscore'",
        "bad:Half": "does not define unit, __init__, score",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            load_reward(spec, "cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [("[1.0]", r"shape \(1,\) for 2 images; expected \(2,\)"), ("['good', 'bad']", "score failed: could not convert")],
)
def test_a_result_other_than_one_number_per_image_is_one_line(here, given, message):
    (here / "odd.py").write_text(
        "from smpo_pipeline.rewards import Reward\n\n\nclass Odd(Reward):\n    name, unit = 'odd', 'none'\n"
        "    def __init__(self, model, device):\n        self.model = self.fingerprint = 'odd'\n"
        f"    def score(self, images, prompts):\n        return {given}\n"
    )
    with pytest.raises(UserError, match=f"--reward odd: .*{message}"):
        checked_scores(load_reward("odd:Odd", "cpu"), [Image.new("RGB", (4, 4))] * 2, ["a", "b"])


@pytest.mark.parametrize(
    ("set_there", "message"),
    [
        ("self.model, self.fingerprint = None, '1'", "must set self.model"),
        ("self.model, self.fingerprint = 'm', 1", "must set self.fingerprint to a string; it is 1"),
        ("self.model = 'm'", "must set self.fingerprint to a string; it is None"),
        ("self.model, self.fingerprint = 'm', ''", "must set self.fingerprint to a string; it is ''"),
    ],
)
def test_a_reward_without_model_or_fingerprint_is_refused_before_any_work(here, set_there, message):
    (here / "unnamed.py").write_text(
        guide_code().replace('self.model = "Laplacian"', set_there).replace('self.fingerprint = "1"  #', "#")
    )
    with pytest.raises(UserError, match=f"--reward unnamed:Sharpness: its constructor {re.escape(message)}"):
        load_reward("unnamed:Sharpness", "cpu")


def test_the_image_that_a_reward_raises_for_is_named(here):
    (here / "picky.py").write_text(
        guide_code().replace("greys = [", "assert_fit(images)\n        greys = [")
        + "\n\ndef assert_fit(images):\n    if any(image.width == 1 for image in images):\n"
        "        raise ValueError('too narrow')\n"
    )
    reward = load_reward("picky:Sharpness", "cpu")
    images = [Image.new("RGB", (40, 30)), Image.new("RGB", (1, 77)), Image.new("RGB", (40, 31))]
    message = r"--reward sharpness: score failed: too narrow; .* 1 x 77 pixels, prompt 'b'"
    with pytest.raises(UserError, match=message):
        checked_scores(reward, images, ["a", "b", "c"])


def test_a_subclass_elsewhere_does_not_hide_the_original(here):
    before = dict(reward_classes())
    (here / "finer.py").write_text(
        "from smpo_pipeline.rewards.pickscore import PickScore\n\n\nclass Finer(PickScore):\n    name = 'finer'\n"
    )
    assert parse_reward("finer:Finer")[0].__name__ == "Finer"
    reward_classes.cache_clear()
    assert reward_classes() == before
    assert {"pickscore", "clipscore", "hpsv2", "imagereward", "aesthetic", "toy-truth"} <= set(before)
