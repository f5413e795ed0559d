from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from smpo_common.errors import UserError
from smpo_pipeline.rewards import load_reward, parse_reward
from tests.rewards.helpers import assert_independent, batch
from tests.tiny.stable_diffusion import make_tiny_clip, make_tiny_model


@pytest.fixture(scope="module")
def folder(folders):
    return folders["pickscore"]


def test_equals_the_model_cards_recipe_one_image_at_a_time(folder):
    """The steps of the PickScore model card without its logit scale, in float64 from the features on."""
    pictures, prompts = batch()
    # Not AutoProcessor: with torchvision installed it now uses another implementation than when the card was written.
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
    model = CLIPModel.from_pretrained(folder).eval()
    expected = []
    for image, prompt in zip(pictures, prompts, strict=True):
        # The card passes PIL images, whose layout the processor guesses; here it is given.
        pixels = processor.image_processor(np.asarray(image), input_data_format="channels_last", return_tensors="pt")
        tokens = processor.tokenizer(prompt, padding=True, truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            image_D = model.get_image_features(**pixels).pooler_output[0].double()
            text_D = model.get_text_features(**tokens).pooler_output[0].double()
        expected.append(float(image_D @ text_D / image_D.norm() / text_D.norm()))
    scores = load_reward(f"pickscore={folder}", "cpu").score(pictures, prompts)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.ptp(scores) > 0.05


def test_scores_with_gradient(folder):
    """Those of ``score`` up to 8 bits: to rounding where nothing is resized; and the slope of the score itself."""
    reward = load_reward(f"pickscore={folder}", "cpu")
    stream = np.random.default_rng(0)
    for shape, tolerance in (((32, 32), 1e-5), ((96, 64), 5e-3)):
        coarse = stream.integers(0, 256, (2, 4, 4, 3))
        pixels = np.kron(coarse, np.ones((1, shape[0] // 4, shape[1] // 4, 1))).astype(np.uint8)
        images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).requires_grad_()
        found = reward.score_tensor(images, ["a cat", "a dog"])
        wanted = reward.score([Image.fromarray(each) for each in pixels], ["a cat", "a dog"])
        np.testing.assert_allclose(found.detach(), wanted, atol=tolerance)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    along = gradient / gradient.norm()
    inside = images.detach() * 0.8 + 0.1
    (gradient,) = torch.autograd.grad(reward.score_tensor(inside.requires_grad_(), ["a cat", "a dog"]).sum(), inside)
    ends = [reward.score_tensor(inside.detach() + sign * 0.01 * along, ["a cat", "a dog"]).sum() for sign in (1, -1)]
    assert float(ends[0] - ends[1]) / 0.02 == pytest.approx(float((gradient * along).sum()), rel=0.02)


def test_does_not_depend_on_neighbours_or_order(folder):
    assert_independent(load_reward(f"clipscore={folder}", "cpu"))


def test_the_fingerprint_is_of_the_weights(folder, tmp_path):
    same = load_reward(f"pickscore={make_tiny_clip(tmp_path / 'same')}", "cpu")
    other = load_reward(f"pickscore={make_tiny_clip(tmp_path / 'other', seed=1)}", "cpu")
    reward = load_reward(f"pickscore={folder}", "cpu")
    assert reward.fingerprint == same.fingerprint != other.fingerprint
    assert (reward.name, reward.unit, reward.model) == ("pickscore", "cosine", str(folder))


def test_wrong_use_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"--reward pickscore:1: .*smpo-train"):
        parse_reward("pickscore:1")
    with pytest.raises(UserError, match=r"--reward pickscore clipscore$"):
        parse_reward("pickscore,clipscore")
    with pytest.raises(UserError, match="--reward pikscore: .*pickscore"):
        load_reward("pikscore", "cpu")
    with pytest.raises(UserError, match=f"no such folder: {tmp_path / 'nothing'}"):
        load_reward(f"pickscore={tmp_path / 'nothing'}", "cpu")
    model = make_tiny_model(tmp_path / "sd")
    with pytest.raises(UserError, match=r"is a 'clip_text_model' model|cannot be loaded"):
        load_reward(f"pickscore={model / 'text_encoder'}", "cpu")
    with pytest.raises(UserError, match="takes no model"):
        load_reward(f"toy-truth={folder}", "cpu")
    # A checkpoint with fewer layers: transformers would silently initialise the missing ones at random.
    bad = make_tiny_clip(tmp_path / "bad")
    config = CLIPConfig.from_pretrained(bad)
    config.vision_config.num_hidden_layers = 3
    config.save_pretrained(bad)
    with pytest.raises(UserError, match=r"lacks \d+ weights"):
        load_reward(f"pickscore={bad}", "cpu")
    assert folder.is_dir()
