"""Compare with the authors' package ``hpsv2`` and with OpenCLIP, on the same weights."""

from __future__ import annotations

import copy
import gzip
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from smpo_common.errors import UserError
from smpo_pipeline.rewards import load_reward
from smpo_pipeline.rewards.hpsv2 import clean, fit_into_square
from tests.pictures import picture
from tests.rewards.helpers import PROMPTS, assert_independent, batch, odd_pictures
from tests.tiny.rewards import clip_vocabulary, open_clip_config, random_open_clip_state, save_clip_tokenizer


@pytest.fixture(scope="module")
def authors():
    """hpsv2's own OpenCLIP.

    Its release lacks the vocabulary that it reads on import; OpenCLIP's is the same file. It imports a progress bar for
    downloads (clint, of 2015), for which an empty module stands in.
    """
    read, opened = gzip.open, []
    with pytest.MonkeyPatch.context() as patch:

        def open_vocabulary(path, *arguments, **options):
            opened.append(path)
            return read(clip_vocabulary(), *arguments, **options)

        patch.setattr(gzip, "open", open_vocabulary)
        bar = types.ModuleType("clint.textui")
        bar.progress = None
        patch.setitem(sys.modules, "clint", types.ModuleType("clint"))
        patch.setitem(sys.modules, "clint.textui", bar)
        from hpsv2.src import open_clip
    assert len(opened) == 1
    assert opened[0].endswith("hpsv2/src/open_clip/bpe_simple_vocab_16e6.txt.gz")
    return open_clip


@pytest.fixture(scope="module")
def their_model(authors, tmp_path_factory):
    """Make model and transform as the authors' ``img_score.py`` does."""
    (config := tmp_path_factory.mktemp("config") / "tiny.json").write_text(json.dumps(open_clip_config()))
    authors.add_model_config(config)
    model, _, transform = authors.create_model_and_transforms("tiny", light_augmentation=True, output_dict=True)
    model.load_state_dict(random_open_clip_state())
    return model.eval(), transform


def theirs_works(image, side) -> bool:
    """Whether the authors' transform works: it adds no borders if the longer side fits, and fails on a side of 0."""
    return (max(image.size) != side or image.size == (side, side)) and round(
        min(image.size) * side / max(image.size)
    ) > 0


def test_equals_the_authors_package(folders, authors, their_model):
    model, transform = their_model
    pairs = [each for each in zip(*batch(), strict=True) if theirs_works(each[0], 32)]
    expected = []
    for image, prompt in pairs:
        with torch.no_grad():
            outputs = model(transform(image)[None], authors.tokenize([prompt]))
        expected.append(float((outputs["image_features"] @ outputs["text_features"].T).diagonal()))
    scores = load_reward(f"hpsv2={folders['hpsv2']}", "cpu").score(*zip(*pairs, strict=True))
    assert len(scores) > 17
    assert np.ptp(scores) > 0.05
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)


def test_does_not_depend_on_neighbours_or_order(folders):
    assert_independent(load_reward(f"hpsv2={folders['hpsv2']}", "cpu"))


def test_equals_todays_open_clip(folders):
    """The same weights in OpenCLIP's current release, on the pixels of the transform above."""
    import open_clip

    model = open_clip.CLIP(**open_clip_config()).eval()
    model.load_state_dict(random_open_clip_state())
    pictures, prompts = batch()
    pixels = torch.stack([fit_into_square(image, 32) for image in pictures])
    with torch.no_grad():
        image_ND = model.encode_image(pixels, normalize=True)
        text_ND = model.encode_text(open_clip.tokenize(prompts), normalize=True)
    scores = load_reward(f"hpsv2={folders['hpsv2']}", "cpu").score(pictures, prompts)
    np.testing.assert_allclose(scores, (image_ND * text_ND).sum(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [224, 32])
def test_the_transform_is_the_authors(authors, side):
    theirs = authors.image_transform(side, is_train=False, resize_longest_max=True)
    for image in odd_pictures():
        if theirs_works(image, side):
            torch.testing.assert_close(fit_into_square(image, side), theirs(image), atol=1e-5, rtol=0)


def test_an_image_that_needs_no_scaling_gets_its_borders(authors):
    """The authors' transform would not pad it; the expected value is their arithmetic on the padded image."""
    image, padded = picture(32, 17), Image.new("RGB", (32, 32))
    padded.paste(image, (0, 7))
    expected = authors.image_transform(32, is_train=False, resize_longest_max=True)(padded)
    torch.testing.assert_close(fit_into_square(image, 32), expected)


def test_the_tokens_are_the_authors(authors, tmp_path):
    tokenizer = save_clip_tokenizer(tmp_path)
    options = {"padding": "max_length", "truncation": True, "max_length": 77, "split_special_tokens": True}
    for prompt in PROMPTS:
        ours = tokenizer(clean(prompt), **options)
        theirs = authors.tokenize([prompt])[0].tolist()
        assert [token * mask for token, mask in zip(ours.input_ids, ours.attention_mask, strict=True)] == theirs


@pytest.mark.slow
def test_v2_1_is_the_same_file_with_other_weights(folders, tmp_path):
    save_clip_tokenizer(tmp_path)
    state = random_open_clip_state(seed=3)
    save_file(state, tmp_path / "HPS_v2.1.safetensors")
    first = load_reward(f"hpsv2={folders['hpsv2']}", "cpu")
    second = load_reward(f"hpsv2={tmp_path}", "cpu")
    half = {f"module.{name}": value.clone() for name, value in state.items()}
    torch.save(half, tmp_path / "same.pt")
    same = load_reward(f"hpsv2={tmp_path / 'same.pt'}", "cpu")
    assert first.fingerprint != second.fingerprint == same.fingerprint
    assert (second.name, second.unit, second.model) == ("hpsv2", "cosine", str(tmp_path))
    assert np.abs(first.score(*batch()) - second.score(*batch())).max() > 0.01


@pytest.mark.slow
def test_other_weights_are_one_line(folders, tmp_path):
    def refused(change, message):
        state = copy.deepcopy(random_open_clip_state())
        change(state)
        torch.save(state, tmp_path / "bad.pt")
        with pytest.raises(UserError, match=message):
            load_reward(f"hpsv2={tmp_path / 'bad.pt'}", "cpu")

    save_clip_tokenizer(tmp_path)
    refused(lambda state: state.pop("visual.proj"), "OpenCLIP state dict: .*visual.proj")
    refused(lambda state: state.update({"visual.proj": torch.zeros(96, 64)}), "ViT-H-14: .*widths .* 96, 64 and 64")
    refused(lambda state: state.update({"visual.attnpool": torch.zeros(1)}), "ViT-H-14: .* visual.attnpool")
    refused(lambda state: state.pop("visual.transformer.resblocks.0.mlp.c_fc.bias"), r"lacks 1 weights, first .*fc1")
    refused(
        lambda state: state.update({"visual.transformer.resblocks.0.mlp.c_fc.bias": torch.zeros(7)}),
        r"1 weights of another shape, first .*fc1\.bias",
    )
    refused(lambda state: state.update({"token_embedding.weight": torch.zeros(100, 64)}), "49408 tokens, .* 100")
