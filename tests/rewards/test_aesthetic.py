"""Compare with the published steps: OpenAI's preprocessing by torchvision, CLIP's embedding, the head."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import CLIPModel

from smpo_common.errors import UserError
from smpo_pipeline.rewards import load_reward
from smpo_pipeline.rewards.networks.pixels import clip_pixels
from tests.rewards.helpers import assert_independent, batch, odd_pictures
from tests.tiny.rewards import make_tiny_aesthetic


def openai_transform(side: int) -> Compose:
    """The transform that ``clip.load`` of OpenAI's CLIP returns, from ``clip.py``."""
    return Compose(
        [
            Resize(side, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(side),
            lambda image: image.convert("RGB"),
            ToTensor(),
            Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )


class PublishedHead(nn.Module):
    """The authors' module with their dropout layers, in the tiny model's sizes."""

    def __init__(self, sizes=(16, 24, 12, 8, 4, 1)):
        super().__init__()
        linear = [nn.Linear(into, out) for into, out in pairwise(sizes)]
        first, second, third, fourth, last = linear
        self.layers = nn.Sequential(
            first, nn.Dropout(0.2), second, nn.Dropout(0.2), third, nn.Dropout(0.1), fourth, last
        )

    def forward(self, values):
        return self.layers(values)


@pytest.mark.parametrize("side", [32, 224, 31])
def test_the_transform_is_openais(side):
    theirs = openai_transform(side)
    for image in odd_pictures():
        torch.testing.assert_close(clip_pixels(image, side), theirs(image), atol=1e-6, rtol=0)


def test_scores_with_gradient(folders):
    """Those of ``score``, to rounding where nothing is resized; and they depend on the pixels."""
    reward = load_reward(f"aesthetic={folders['aesthetic']}", "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).requires_grad_()
    found = reward.score_tensor(images, ["", ""])
    np.testing.assert_allclose(found.detach(), reward.score([Image.fromarray(each) for each in pixels], ["", ""]), 1e-5)
    assert torch.autograd.grad(found.sum(), images)[0].abs().max() > 0


def test_equals_the_published_steps(folders):
    folder = folders["aesthetic"]
    clip, head, transform = CLIPModel.from_pretrained(folder).eval(), PublishedHead().eval(), openai_transform(32)
    head.load_state_dict(torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True))
    pictures, prompts = batch()
    expected = []
    for image in pictures:
        with torch.no_grad():
            features = clip.get_image_features(pixel_values=transform(image)[None]).pooler_output.numpy()
            length = np.atleast_1d(np.linalg.norm(features, 2, -1))
            length[length == 0] = 1
            expected.append(float(head(torch.from_numpy(features / np.expand_dims(length, -1)).float())))
    scores = load_reward(f"aesthetic={folder}", "cpu").score(pictures, prompts)
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)


def test_does_not_depend_on_neighbours_order_or_prompt(folders):
    reward = load_reward(f"aesthetic={folders['aesthetic']}", "cpu")
    assert_independent(reward)
    pictures, prompts = batch()
    np.testing.assert_array_equal(reward.score(pictures, prompts), reward.score(pictures, prompts[::-1]))


def test_the_head_may_be_named_by_its_file(folders):
    folder = folders["aesthetic"]
    whole = load_reward(f"aesthetic={folder}", "cpu")
    by_file = load_reward(f"aesthetic={folder / 'sac+logos+ava1-l14-linearMSE.pth'}", "cpu")
    assert whole.fingerprint == by_file.fingerprint
    assert whole.unit == "rating from 1 to 10"


def test_both_parts_are_in_the_fingerprint(folders, tmp_path):
    first = load_reward(f"aesthetic={folders['aesthetic']}", "cpu").fingerprint
    folder = make_tiny_aesthetic(tmp_path)
    assert load_reward(f"aesthetic={folder}", "cpu").fingerprint == first
    head = torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    torch.save({name: 1.01 * value for name, value in head.items()}, folder / "sac+logos+ava1-l14-linearMSE.pth")
    assert load_reward(f"aesthetic={folder}", "cpu").fingerprint != first


def test_other_weights_are_one_line(tmp_path):
    with pytest.raises(UserError, match="give aesthetic=PATH of sac"):
        load_reward("aesthetic", "cpu")
    folder = make_tiny_aesthetic(tmp_path)
    file = folder / "sac+logos+ava1-l14-linearMSE.pth"
    good = torch.load(file, weights_only=True)

    def refused(change, message):
        state = dict(good)
        change(state)
        torch.save(state, file)
        with pytest.raises(UserError, match=message):
            load_reward(f"aesthetic={folder}", "cpu")

    refused(lambda state: state.update({"layers.0.weight": torch.zeros(24, 20)}), "16 .*head takes 20")
    refused(lambda state: state.pop("layers.2.bias"), "aesthetic head .* difference: layers.2.bias")
    refused(lambda state: state.update({"visual.proj": torch.zeros(1)}), "aesthetic head .* difference: visual.proj")
    refused(
        lambda state: state.update({"layers.4.weight": torch.zeros(8, 11)}),
        "aesthetic head: .*16 to 24, 24 to 12, 11 to 8",
    )
    refused(lambda state: state.update({"layers.7.bias": torch.zeros(3)}), "layers.7 ")
