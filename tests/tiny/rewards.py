"""Tiny random reward models in the files that the real ones come in, with the real ones' vocabularies of characters."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.tiny.stable_diffusion import make_tiny_clip

_UNIT = 16
_CONTEXT = 77


def clip_vocabulary() -> Path:
    """CLIP's merges, as OpenCLIP ships them."""
    return Path(find_spec("open_clip").submodule_search_locations[0], "bpe_simple_vocab_16e6.txt.gz")


def save_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's own tokenizer, of 49,408 tokens, as transformers stores it."""
    lines = gzip.decompress(clip_vocabulary().read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(line.split()) for line in lines)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=_CONTEXT)


def open_clip_config(depth: int = 2, image_size: int = 32, patch: int = 8) -> dict:
    """What OpenCLIP builds the tiny model from: ViT-H-14's proportions."""
    return {
        "embed_dim": 4 * _UNIT,
        "vision_cfg": {
            "image_size": image_size,
            "layers": depth,
            "width": 5 * _UNIT,
            "head_width": 5,
            "patch_size": patch,
        },
        "text_cfg": {"context_length": _CONTEXT, "vocab_size": 49408, "width": 4 * _UNIT, "heads": 16, "layers": depth},
    }


def random_open_clip_state(seed: int = 0, depth: int = 2, image_size: int = 32, patch: int = 8) -> dict:
    """An OpenCLIP state dict, written out by hand: what the real checkpoints hold, only smaller."""
    image, text, embedding, grid = 5 * _UNIT, 4 * _UNIT, 4 * _UNIT, image_size // patch
    shapes = {
        "positional_embedding": (_CONTEXT, text),
        "text_projection": (text, embedding),
        "token_embedding.weight": (49408, text),
        "visual.class_embedding": (image,),
        "visual.positional_embedding": (grid * grid + 1, image),
        "visual.proj": (image, embedding),
        "visual.conv1.weight": (image, 3, patch, patch),
    }
    norms = {"ln_final": text, "visual.ln_pre": image, "visual.ln_post": image}
    for tower, width in (("", text), ("visual.", image)):
        for number in range(depth):
            block = f"{tower}transformer.resblocks.{number}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            shapes[f"{block}.attn.in_proj_weight"], shapes[f"{block}.attn.in_proj_bias"] = (
                (3 * width, width),
                (3 * width,),
            )
            for name, out, into in (("attn.out_proj", 1, 1), ("mlp.c_fc", 4, 1), ("mlp.c_proj", 1, 4)):
                shapes[f"{block}.{name}.weight"], shapes[f"{block}.{name}.bias"] = (
                    (out * width, into * width),
                    (out * width,),
                )
    random = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(shape, generator=random) * (0.5 if "embedding" in name else 0.15)
        for name, shape in shapes.items()
    }
    for name, width in norms.items():
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=random)
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=random)
    return state | {"logit_scale": torch.tensor(4.6)}


def make_tiny_hpsv2(folder: Path, seed: int = 0) -> Path:
    """A folder with a checkpoint as the authors store theirs, and CLIP's tokenizer."""
    save_clip_tokenizer(folder)
    torch.save(
        {"epoch": 0, "name": "tiny", "state_dict": random_open_clip_state(seed)}, folder / "HPS_v2_compressed.pt"
    )
    return folder


def make_tiny_aesthetic(folder: Path, seed: int = 0, width: int = 16) -> Path:
    """A folder with a tiny CLIP and the head's file."""
    make_tiny_clip(folder, seed)
    random = torch.Generator().manual_seed(seed)
    state = {}
    for number, (into, out) in zip((0, 2, 4, 6, 7), ((width, 24), (24, 12), (12, 8), (8, 4), (4, 1)), strict=True):
        state[f"layers.{number}.weight"] = 2 * torch.randn(out, into, generator=random) / into**0.5
        state[f"layers.{number}.bias"] = torch.randn(out, generator=random)
    torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder


_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "and", "un", "##ic", "##ode", ",")


def make_tiny_image_reward(folder: Path, seed: int = 0) -> Path:
    """A folder with a checkpoint, ``med_config.json`` and a BERT tokenizer of letters and a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*_WORDS, *(letter for letter in letters if letter != "a"), *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    config = {
        "vocab_size": len(words) + 2,
        "hidden_size": 768,  # the head's width, fixed in the package
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
        "hidden_act": "gelu",
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "pad_token_id": 0,
        "add_type_embeddings": False,
        "add_cross_attention": True,
        "encoder_width": 64,
        "model_type": "bert",
        "architectures": ["BertModel"],
    }
    (folder / "med_config.json").write_text(json.dumps(config))
    torch.save(random_image_reward_state(config, seed), folder / "ImageReward.pt")
    return folder


def random_image_reward_state(config: dict, seed: int = 0, width: int = 64, depth: int = 2, patch: int = 16) -> dict:
    """An ImageReward's weights by name, written out by hand; the head's spread makes scores differ."""
    text, inner, tokens = config["hidden_size"], config["intermediate_size"], config["max_position_embeddings"]
    tower, bert = "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{tower}.cls_token": (1, 1, width),
        f"{tower}.pos_embed": (1, (224 // patch) ** 2 + 1, width),
        f"{tower}.patch_embed.proj.weight": (width, 3, patch, patch),
        f"{tower}.patch_embed.proj.bias": (width,),
        f"{bert}.embeddings.word_embeddings.weight": (config["vocab_size"], text),
        f"{bert}.embeddings.position_embeddings.weight": (tokens, text),
    }
    linear, norms = {"blip.vision_proj": (256, width), "blip.text_proj": (256, text)}, {f"{tower}.norm": width}
    for number in range(depth):
        block = f"{tower}.blocks.{number}"
        norms |= {f"{block}.norm1": width, f"{block}.norm2": width}
        linear |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        linear |= {f"{block}.mlp.fc1": (4 * width, width), f"{block}.mlp.fc2": (width, 4 * width)}
    norms[f"{bert}.embeddings.LayerNorm"] = text
    for number in range(config["num_hidden_layers"]):
        layer = f"{bert}.encoder.layer.{number}"
        for attention, into in (("attention", text), ("crossattention", width)):
            linear[f"{layer}.{attention}.self.query"] = (text, text)
            linear[f"{layer}.{attention}.self.key"] = linear[f"{layer}.{attention}.self.value"] = (text, into)
            linear[f"{layer}.{attention}.output.dense"] = (text, text)
            norms[f"{layer}.{attention}.output.LayerNorm"] = text
        linear |= {f"{layer}.intermediate.dense": (inner, text), f"{layer}.output.dense": (text, inner)}
        norms[f"{layer}.output.LayerNorm"] = text
    sizes = (text, 1024, 128, 64, 16, 1)
    linear |= {f"mlp.layers.{n}": (sizes[i + 1], sizes[i]) for i, n in enumerate((0, 2, 4, 6, 7))}
    random = torch.Generator().manual_seed(seed)
    state = {name: 0.3 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    for name, (out, into) in linear.items():
        state[f"{name}.weight"] = torch.randn(out, into, generator=random) / into**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=random)
    for name, size in norms.items():
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(size, generator=random)
        state[f"{name}.bias"] = 0.2 * torch.randn(size, generator=random)
    return state | {f"{bert}.embeddings.position_ids": torch.arange(tokens)[None]}
