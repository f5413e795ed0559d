"""Tiny random language models, which newer pipelines read prompts with, and their tokenizers; without the network."""

from __future__ import annotations

from tokenizers.processors import TemplateProcessing
from transformers import (
    AddedToken,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

LANGUAGE_WIDTH = 32
"""Of the embeddings of all these models."""

_SIZES = {
    "hidden_size": LANGUAGE_WIDTH,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SYSTEM_WORDS = (
    "system Describe the image by detailing color shape size texture quantity text spatial relationships of objects "
    "and background user assistant"
)

_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
"""The part of Qwen3's that pipelines use."""


def make_qwen_tokenizer(*, words: bool = True) -> Qwen2Tokenizer:
    """Make a tokenizer of single bytes and, with ``words``, of the words of Qwen-Image's system message.

    That message has as many tokens as with the published tokenizer, of which the pipeline drops a fixed number.
    """
    letters = bytes_to_unicode().values()
    tokenizer = Qwen2Tokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    tokenizer.add_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    if words:
        both = [word for each in _SYSTEM_WORDS.split() for word in (f" {each}", each)]
        tokenizer.add_tokens([AddedToken(word, normalized=False) for word in both])
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def make_qwen_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Make a random Qwen2.5-VL, from torch's global generator."""
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        **_ids(tokenizer),
        **_SIZES,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": LANGUAGE_WIDTH,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def make_qwen3(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3ForCausalLM:
    """Make a random Qwen3, from torch's global generator."""
    config = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=layers, head_dim=8, **_ids(tokenizer), **_SIZES)
    return Qwen3ForCausalLM(config).eval()


def make_gemma_tokenizer() -> GemmaTokenizer:
    """Make a tokenizer of single bytes, which puts its first token before each text."""
    special = {f"<{name}>": number for number, name in enumerate(("pad", "eos", "bos", "unk", "mask"))}
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", *map(chr, range(ord("!"), 127))]
    vocab = special | {token: len(special) + number for number, token in enumerate(tokens)}
    tokenizer = GemmaTokenizer(vocab=vocab)
    # As the published tokenizer.json does, which the class alone does not.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", special["<bos>"])]
    )
    return tokenizer


def make_gemma2(tokenizer: GemmaTokenizer) -> Gemma2Model:
    """Make a random Gemma 2, from torch's global generator."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        num_hidden_layers=3,
        head_dim=8,
        query_pre_attn_scalar=8,
        **_ids(tokenizer),
        **_SIZES,
    )
    return Gemma2Model(config).eval()


def _ids(tokenizer) -> dict[str, int | None]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
