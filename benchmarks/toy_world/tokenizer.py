"""The world's CLIPTokenizer: every word of a caption is one token, anything else is spelled in bytes."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from smpo_pipeline.toy.world import words

MAX_TOKENS = 16
"""Tokens of a text, start and end included: captions of the world have ten."""

_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer with the vocabulary of the world.

    All 256 bytes are in the vocabulary, so that any text, in any script, can be tokenised.
    """
    merges = _merges(words())
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + _WORD_END for letter in letters), *("".join(pair) for pair in merges), _START, _END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    with tempfile.TemporaryDirectory() as folder:
        # Through files, as every CLIP tokenizer is distributed: the reader is the one that users have.
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(
            folder, bos_token=_START, eos_token=_END, unk_token=_END, pad_token=_END, model_max_length=MAX_TOKENS
        )


def _merges(vocabulary_words: list[str]) -> list[tuple[str, str]]:
    """Byte pair merges, best first, that make each word one token.

    Each word is first spelled with the merges so far and only then completed: a later merge, being weaker, can
    therefore not disturb an earlier word.
    """
    merges: list[tuple[str, str]] = []
    for word in vocabulary_words:
        parts = _spell(word, merges)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    return merges


def _spell(word: str, merges: list[tuple[str, str]]) -> list[str]:
    parts = [*word[:-1], word[-1] + _WORD_END]
    rank = {pair: index for index, pair in enumerate(merges)}
    while True:
        ranked = [(rank[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in rank]
        if not ranked:
            return parts
        place = min(ranked)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
