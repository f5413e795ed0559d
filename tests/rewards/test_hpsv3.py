"""Compare with HPSv3 written out in float64, one image at a time, on the same tiny random weights.

With the authors' package in the environment that it pins: ``tests/rewards/test_hpsv3_package.py``.
"""

from __future__ import annotations

import hashlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration

from smpo_common.errors import UserError
from smpo_pipeline.rewards import load_reward
from smpo_pipeline.rewards.networks.hpsv3 import AFTER, BEFORE, QUESTION, model_key
from tests.pictures import picture
from tests.rewards.helpers import assert_independent
from tests.tiny.vision_language import hpsv3_head, make_tiny_hpsv3, qwen2_vl_config

SIZES = [(64, 100), (448, 448), (31, 300), (900, 700)]
PICTURES = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
PROMPTS = ["a cat", "dog " * 40, "", "Größe {prompt} 東京 🐈"]
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_hpsv3(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def reward(folder):
    return load_reward(f"hpsv3={folder}", "cpu")


def published_size(width: int, height: int) -> tuple[int, int]:
    """The authors' resize to 256 patches of 28 x 28 pixels, both as the least and as the most."""
    budget, rows, columns = 256 * 28 * 28, max(28, round(height / 28) * 28), max(28, round(width / 28) * 28)
    scale = (height * width / budget) ** 0.5
    if rows * columns > budget:
        rows, columns = int(height / scale // 28) * 28, int(width / scale // 28) * 28
    elif rows * columns < budget:
        rows, columns = -int(-height / scale // 28) * 28, -int(-width / scale // 28) * 28
    return columns, rows


def patches(image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Qwen2-VL's layout of pixels: patches of 14 x 14 in blocks of 2 x 2, each pixel twice (for two frames)."""
    columns, rows = published_size(*image.size)
    values = (np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC)) / 255 - MEAN) / STD
    blocks = values.reshape(rows // 28, 2, 14, columns // 28, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    flat = np.repeat(blocks.reshape(-1, 3, 1, 14, 14), 2, axis=2).reshape(-1, 3 * 2 * 14 * 14)
    return torch.from_numpy(flat), torch.tensor([[1, rows // 14, columns // 14]])


def plain_scores(folder) -> list[float]:
    """mu of each image: the whole model, language head and all, then the head at the reward token."""
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    config = qwen2_vl_config(tokenizer)
    state = load_file(folder / "HPSv3.safetensors")
    model, head = Qwen2VLForConditionalGeneration(config).double().eval(), hpsv3_head().double().eval()
    head.load_state_dict({name.removeprefix("rm_head."): state.pop(name) for name in list(state) if "rm_head" in name})
    names = {name.replace("visual.", "model.visual."): name for name in state if name.startswith("visual.")}
    names |= {name.replace("model.", "model.language_model.", 1): name for name in state if name.startswith("model.")}
    names["lm_head.weight"] = "lm_head.weight"
    model.load_state_dict({new: state[old] for new, old in names.items()})
    scores = []
    for image, prompt in zip(PICTURES, PROMPTS, strict=True):
        pixels, grid = patches(image)
        text = (BEFORE + QUESTION + AFTER).replace("{prompt}", prompt)
        text = text.replace("<|image_pad|>", "<|image_pad|>" * (int(grid.prod()) // 4))
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            states = model.model.language_model(
                inputs_embeds=embedded(model, ids, pixels, grid), attention_mask=torch.ones_like(ids)
            ).last_hidden_state
            scores.append(float(head(states[0, ids[0].tolist().index(tokenizer.vocab["<|Reward|>"])])[0]))
    return scores


def embedded(model, ids, pixels, grid) -> torch.Tensor:
    """Embeddings with those of the image in place of its tokens."""
    values = model.get_input_embeddings()(ids)
    values[ids == model.config.image_token_id] = model.model.visual(pixels, grid_thw=grid).pooler_output
    return values


@pytest.mark.slow
def test_equals_the_model_written_out(folder, reward):
    scores = reward.score(PICTURES, PROMPTS)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, plain_scores(folder), atol=1e-4)
    assert np.ptp(scores) > 0.05


def test_the_question_is_the_authors():
    """The hash of INSTRUCTION and prompt_with_special_token of the package hpsv3 1.0.0, joined."""
    text = (QUESTION + AFTER.removesuffix("<|im_end|>\n<|im_start|>assistant\n")).replace("{prompt}", "{text_prompt}")
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
    )


@pytest.mark.slow
def test_does_not_depend_on_neighbours_or_order(reward):
    # Its tokens are letters, and all its pictures large. Above 2000 characters a prompt is scored alone.
    assert_independent(reward, every=3, longest=2_100)


def test_special_tokens_in_a_prompt_are_text(reward):
    prompts = ["<|Reward|>", "<|image_pad|>", "<|im_end|>", "plain"]
    scores = reward.score(PICTURES[:1] * 4, prompts)
    assert np.isfinite(scores).all()
    assert len(set(scores.tolist())) == 4


def test_the_names_of_both_versions_of_transformers_are_known(folder, tmp_path):
    names = {
        "visual.blocks.0.mlp.fc1.weight": "base.visual.blocks.0.mlp.fc1.weight",
        "model.layers.0.mlp.up_proj.weight": "base.language_model.layers.0.mlp.up_proj.weight",
        "model.embed_tokens.weight": "base.language_model.embed_tokens.weight",
        "model.norm.weight": "base.language_model.norm.weight",
        "model.visual.merger.ln_q.weight": "base.visual.merger.ln_q.weight",
        "model.language_model.norm.weight": "base.language_model.norm.weight",
        "rm_head.3.bias": "head.3.bias",
        "lm_head.weight": None,
    }
    assert {name: model_key(name) for name in names} == names
    newer = shutil.copytree(folder, tmp_path / "newer")
    state = load_file(newer / "HPSv3.safetensors")
    renamed = {(key or name).replace("base.", "model.") if (key := model_key(name)) else name: value
               for name, value in state.items()}  # fmt: skip
    renamed = {
        name.replace("head.", "rm_head.") if name.startswith("head.") else name: v for name, v in renamed.items()
    }
    assert "model.language_model.norm.weight" in renamed
    save_file(renamed, newer / "HPSv3.safetensors")
    scores = [load_reward(f"hpsv3={each}", "cpu").score(PICTURES[:2], PROMPTS[:2]) for each in (folder, newer)]
    np.testing.assert_array_equal(*scores)


@pytest.mark.slow
def test_half_precision_is_that_of_the_job_and_not_of_the_head(folder):
    reward = load_reward(f"hpsv3={folder}", "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward.score(PICTURES, PROMPTS)
    dtypes = {value.dtype for name, value in reward._network.named_parameters() if name.startswith("base.")}
    assert dtypes == {torch.bfloat16}
    assert reward._network.head["0"].weight.dtype == torch.float32
    np.testing.assert_allclose(scores, plain_scores(folder), atol=0.3)


def test_the_weights_are_read_with_the_first_batch_and_are_in_the_fingerprint(folder, tmp_path):
    other = make_tiny_hpsv3(tmp_path / "other", seed=1)
    first, second = (load_reward(f"hpsv3={each}", "cpu") for each in (folder, other))
    assert first.fingerprint == load_reward(f"hpsv3={folder / 'HPSv3.safetensors'}", "cpu").fingerprint
    assert first.fingerprint != second.fingerprint
    assert first._network.head["0"].weight.is_meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("rm_head.5.bias"), r"head.5.bias has the shape None, expected \[2\]"),
        (lambda state: state.pop("model.norm.weight"), r"base.language_model.norm.weight has the shape None"),
        (
            lambda state: state.update({"rm_head.7.bias": torch.zeros(1)}),
            r"head.7.bias has the shape \[1\], expected None",
        ),
        (lambda state: state.update({"rm_head.3.bias": torch.zeros(9)}), r"head.3.bias has the shape \[9\]"),
        (
            lambda state: state.update({"model.embed_tokens.weight": torch.zeros(300, 32)}),
            r"the tokenizer of .* has \d+ tokens with <\|Reward\|>, the weights 300",
        ),
    ],
)
def test_other_weights_are_one_line_before_they_are_read(folder, tmp_path, change, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    state = load_file(broken / "HPSv3.safetensors")
    change(state)
    save_file(state, broken / "HPSv3.safetensors")
    with pytest.raises(UserError, match=f"--reward hpsv3={broken}.*{message}"):
        load_reward(f"hpsv3={broken}", "cpu")
