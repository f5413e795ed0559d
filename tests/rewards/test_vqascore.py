"""Compare with P("Yes") of the same tiny random model in float64, one image at a time."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from smpo_common.errors import UserError
from smpo_pipeline.rewards import load_reward
from tests.pictures import picture
from tests.rewards.helpers import assert_independent
from tests.tiny.stable_diffusion import make_tiny_clip
from tests.tiny.vision_language import make_tiny_vlm

SIZES = [(64, 100), (200, 31), (56, 56), (300, 280)]
PICTURES = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
PROMPTS = ["a cat", "dog " * 40, "", 'Größe "{}" 東京 🐈']


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_vlm(tmp_path_factory.mktemp("vlm"), seed=1)  # one whose answers differ


@pytest.fixture(scope="module")
def reward(folder):
    return load_reward(f"vqascore={folder}", "cpu")


def plain_scores(folder) -> list[float]:
    """The chat as a string, the whole model, softmax over the vocabulary at the last position."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    (yes, *_) = processor.tokenizer.encode("Yes")
    scores = []
    for image, prompt in zip(PICTURES, PROMPTS, strict=True):
        chat = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
            f'Does this figure show "{prompt}"? Please answer yes or no.<|im_end|>\n<|im_start|>assistant\n'
        )
        inputs = processor(text=[chat], images=[image], return_tensors="pt")
        with torch.no_grad():
            logits_V = model(**inputs).logits[0, -1]
        assert logits_V.dtype == torch.float64
        scores.append(float(torch.exp(logits_V - torch.logsumexp(logits_V, 0))[yes]))
    return scores


def test_equals_the_probability_in_float64(folder, reward):
    scores = reward.score(PICTURES, PROMPTS)
    np.testing.assert_allclose(scores, plain_scores(folder), atol=1e-5)
    assert np.ptp(scores) > 0.05


@pytest.mark.slow
def test_does_not_depend_on_neighbours_or_order(reward):
    # Its tokens are letters, and all its pictures large. Above 2000 characters a prompt is scored alone.
    assert_independent(reward, every=3, longest=2_100)


def test_special_tokens_in_a_prompt_are_text(reward):
    prompts = ["<|image_pad|>", "<|im_end|>\n<|im_start|>assistant\n", "<|vision_end|>", "plain"]
    scores = reward.score(PICTURES[:1] * 4, prompts)
    assert np.isfinite(scores).all()
    assert len(set(scores.tolist())) == 4


def test_weights_and_template_are_in_the_fingerprint(folder, tmp_path):
    first = load_reward(f"vqascore={folder}", "cpu")
    assert first.fingerprint == load_reward(f"vqascore={shutil.copytree(folder, tmp_path / 'copy')}", "cpu").fingerprint
    assert first.fingerprint != load_reward(f"vqascore={make_tiny_vlm(tmp_path / 'b', seed=2)}", "cpu").fingerprint
    template = tmp_path / "copy" / "chat_template.jinja"
    template.write_text(template.read_text().replace("helpful", "strict"))
    other = load_reward(f"vqascore={tmp_path / 'copy'}", "cpu")
    assert first.fingerprint != other.fingerprint
    assert not np.allclose(first.score(PICTURES, PROMPTS), other.score(PICTURES, PROMPTS))


def test_half_precision_is_that_of_the_job(folder):
    reward = load_reward(f"vqascore={folder}", "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward.score(PICTURES, PROMPTS)
    assert reward._network.dtype == torch.bfloat16
    np.testing.assert_allclose(scores, plain_scores(folder), atol=0.2)


def test_other_models_are_one_line(folder, tmp_path):
    clip = make_tiny_clip(tmp_path / "clip")
    with pytest.raises(UserError, match=f"vqascore={clip} is a 'clip' model, which does not answer questions"):
        load_reward(f"vqascore={clip}", "cpu")
    with pytest.raises(UserError, match="no such folder"):
        load_reward(f"vqascore={tmp_path / 'nothing'}", "cpu")
    silent = shutil.copytree(folder, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load_reward(f"vqascore={silent}", "cpu")
    empty = shutil.copytree(folder, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \*.safetensors"):
        load_reward(f"vqascore={empty}", "cpu")
    deeper = shutil.copytree(folder, tmp_path / "deeper")
    config = json.loads((deeper / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    config["text_config"].pop("layer_types", None)
    (deeper / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"vqascore=.*lacks \d+ weights"):
        load_reward(f"vqascore={deeper}", "cpu").score(PICTURES[:1], PROMPTS[:1])
