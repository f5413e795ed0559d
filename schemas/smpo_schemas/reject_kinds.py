"""Kinds of reasons for a rejected row. Imports nothing: the decoder's child process has to start fast."""

from __future__ import annotations

from enum import StrEnum


class RejectKind(StrEnum):
    """Kinds of reasons; a reason is the kind, a colon, and details."""

    # The input row
    NO_PROMPT = "no prompt"
    NOT_TEXT = "not text"
    TEXT_TOO_LONG = "text too long"
    NOT_UNICODE = "not Unicode"
    BAD_LABEL = "bad label"
    VALUE_NOT_READABLE = "value not readable"
    NO_IMAGE = "no image"
    REPEATED_ID = "repeated pair_id"
    LOW_CONFIDENCE = "low confidence"
    # The image file
    IMAGE_NOT_READABLE = "image not readable"
    IMAGE_TOO_LARGE = "image too large"
    IMAGE_TOO_THIN = "image too thin"
    IMAGE_TOO_SLOW = "image too slow"
    UNKNOWN_WHITE = "unknown white"
    ASPECT_RATIOS = "aspect ratios too different"
    DECODER_HANGS = "decoder hangs"
    CRASHED_DECODER = "crashed the decoder"
    # The model
    CRASHES_WORKER = "crashes its worker"
    FAILS_ALONE = "fails alone"
    OUT_OF_MEMORY = "too little memory"
    NOT_FINITE = "not finite"
    NO_ANSWER = "no answer"
    ANSWER_NOT_READABLE = "answer not readable"
    # The scores, for invert
    NO_SCORE = "no score"
    OTHER_PAIR = "other pair"
    OTHER_IMAGES = "other images"
    # What `generate` kept, for invert
    NO_NOISE = "no noise"
    NO_LATENTS = "no latents"
    NO_STATES = "no states"
    # A prompt, for select
    ONE_IMAGE = "one image"
    ALL_EQUAL = "all equal"
    NO_FRONTIER_PAIR = "no frontier pair"
    GAP_TOO_SMALL = "gap too small"
    NO_CLEAR_ORDER = "no clear order"
    JUDGE_FAILED = "judge failed"
    IMAGES_MISSING = "images missing"


LEFT_OUT = frozenset({RejectKind.LOW_CONFIDENCE})
"""Kinds of rows that the user asked to leave out: they do not count against ``--max-reject-rate``."""
