"""Compare with the authors' package: through our adapter, and as it ran unpatched with transformers 4.55.4."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from transformers import modeling_utils

from smpo_common.errors import UserError
from smpo_pipeline.images.decode import decode_image
from smpo_pipeline.rewards import load_reward
from smpo_pipeline.rewards.networks import image_reward
from tests.pictures import all_kinds
from tests.rewards.helpers import assert_independent, batch
from tests.tiny.rewards import make_tiny_image_reward

_PROMPTS = [
    "a cat and a dog",
    "",
    "dog " * 500,
    "Ünïcode 東京 🐈",
    "cat",
    "[ENC] dog, [DEC]cat [SEP] x",
    "A CAT &amp; “dogs” don't\n\tun-do  3000 things",
]
_MEASURED = {
    "jpeg": 0.08089730888605118,
    "large": 0.3265272378921509,
    "grey": 1.3457403182983398,
    "cmyk": -0.09477060288190842,
    "rgba": -0.5883329510688782,
    "palette": -0.38590729236602783,
    "bilevel": 0.1569458395242691,
    "sixteen": 1.1613537073135376,
    "rotated": -0.2488732486963272,
    "webp": 0.22296233475208282,
    "one pixel": 0.4641607701778412,
    "narrow": -0.7757613658905029,
    "flat": 0.3272072970867157,
}
"""What ``ImageReward.load(...).score(prompt, image)`` gave for these weights, each kind of image under the next prompt.

image-reward 1.5, transformers 4.55.4, timm 0.6.13, torchvision 0.28.0, torch 2.13.0 on CPU, none of them patched,
except that the tokenizer came from the folder, the image tower was as small as the weights, and ``clip`` was empty.
"""


@pytest.fixture(scope="module")
def reward(folders):
    return load_reward(f"imagereward={folders['imagereward']}", "cpu")


def test_equals_the_package_before_transformers_5(reward):
    assert list(_MEASURED) == list(all_kinds())
    pictures = [decode_image(data) for data in all_kinds().values()]
    prompts = [_PROMPTS[number % len(_PROMPTS)] for number in range(len(pictures))]
    np.testing.assert_allclose(reward.score(pictures, prompts), list(_MEASURED.values()), atol=1e-5, rtol=0)


def test_equals_the_authors_score_one_image_at_a_time(reward):
    pictures, prompts = batch()
    theirs = [reward._model.score(prompt, image) for image, prompt in zip(pictures, prompts, strict=True)]
    np.testing.assert_allclose(reward.score(pictures, prompts), theirs, atol=1e-5, rtol=0)


def test_does_not_depend_on_neighbours_or_order(reward):
    assert_independent(reward)


@pytest.mark.slow
def test_only_this_reward_needs_torchvision_and_the_process_is_left_as_it_was(folders):
    """Load the other rewards without torchvision; then check that ImageReward restores warnings, log and modules."""
    others = [f"{name}={folder}" for name, folder in folders.items() if name != "imagereward"]
    code = f"""
import sys
sys.modules["torchvision"] = sys.modules["timm"] = None
import warnings, transformers
from transformers import modeling_utils
from smpo_pipeline.rewards import load_reward
for spec in {others}:
    load_reward(spec, "cpu")
del sys.modules["torchvision"], sys.modules["timm"]
transformers.logging.set_verbosity_info()
filters, names = list(warnings.filters), set(vars(modeling_utils))
load_reward("imagereward={folders["imagereward"]}", "cpu")
assert "torchvision" in sys.modules
assert warnings.filters == filters, warnings.filters
assert transformers.logging.get_verbosity() == transformers.logging.INFO
assert set(vars(modeling_utils)) == names
assert not any(name.split(".")[0] in ("ImageReward", "clip", "datasets") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_other_weights_are_one_line(folders, tmp_path):
    folder = make_tiny_image_reward(tmp_path)
    good = torch.load(folder / "ImageReward.pt", weights_only=True)

    def refused(change, message):
        state = dict(good)
        change(state)
        torch.save(state, folder / "ImageReward.pt")
        with pytest.raises(UserError, match=message):
            load_reward(f"imagereward={folder}", "cpu")

    refused(lambda state: state.pop("mlp.layers.7.bias"), "--reward imagereward=.* lacks 1 weights.* mlp.layers.7.bias")
    refused(lambda state: state.update({"mlp.extra": torch.zeros(1)}), "1 .*weights.* mlp.extra")
    refused(
        lambda state: state.update({"mlp.layers.7.bias": torch.zeros(2)}),
        r"mlp.layers.7.bias is \[2\] instead of \[1\]",
    )
    refused(lambda state: state.pop("blip.visual_encoder.patch_embed.proj.weight"), "has no image tower")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    refused(dict.copy, r"the tokenizer has 7 tokens, .*med_config.json says 8\d")
    settings = json.loads((folder / "med_config.json").read_text())
    for content in ("", "[]", '{"vocab_size"', json.dumps(settings | {"hidden_act": "nonsense"})):
        shutil.copy(folders["imagereward"] / "vocab.txt", folder)
        (folder / "med_config.json").write_text(content)
        refused(dict.copy, "med_config.json cannot be loaded: ")
    (folder / "med_config.json").unlink()
    refused(dict.copy, "no med_config.json")


def test_a_missing_package_is_one_line(folders, monkeypatch):
    image_reward._import.cache_clear()
    monkeypatch.setattr(image_reward.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'smpo-diffusion\[imagereward\]'"):
        load_reward(f"imagereward={folders['imagereward']}", "cpu")


def test_a_package_that_cannot_be_imported_is_one_line(folders, monkeypatch):
    image_reward._import.cache_clear()
    for name in [name for name in sys.modules if name.startswith("smpo_image_reward")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models.hub", None)
    before = transformers.logging.get_verbosity(), list(warnings.filters), set(vars(modeling_utils))
    with pytest.raises(UserError, match="--reward imagereward: .* cannot be imported: .*timm"):
        load_reward(f"imagereward={folders['imagereward']}", "cpu")
    assert (transformers.logging.get_verbosity(), list(warnings.filters), set(vars(modeling_utils))) == before
    image_reward._import.cache_clear()
