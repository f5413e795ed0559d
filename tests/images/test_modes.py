"""Every mode and depth of every format keeps its range."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from smpo_pipeline.images.decode import ImageRejectedError, decode_image
from tests.pictures import encode, picture

SRGB = ImageCms.createProfile("sRGB")

GREY = np.asarray(picture().convert("L"))
UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def tiff(values: bytes, bits: int, kind: int, *, white_is_zero: bool = False) -> bytes:
    """Build a grey TIFF of 40 x 30 samples; Pillow writes only a few kinds."""
    entries = {256: 40, 257: 30, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: 30}
    entries |= {279: len(values), 339: kind}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    directory = struct.pack("<H", len(entries)) + fields + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + directory


def twelve_bits(values: np.ndarray) -> bytes:
    """Pack two samples of 12 bits into three bytes."""
    first, second = values.reshape(-1, 2).T.astype(int)
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("bits", "kind", "white", "packed"),
    [
        (8, UNSIGNED, 255, "u1"),
        (12, UNSIGNED, 4095, None),
        (16, UNSIGNED, 65535, "<u2"),
        (16, SIGNED, 255, "<i2"),
        (16, SIGNED, 32767, "<i2"),
        (32, UNSIGNED, 65535, "<u4"),
        (32, SIGNED, 255, "<i4"),
        (32, FLOAT, 1, "<f4"),
        (32, FLOAT, 255, "<f4"),
    ],
)
def test_grey_of_any_depth_is_scaled_to_its_white(bits, kind, white, packed):
    values = GREY / 255 * white
    samples = np.rint(values) if kind != FLOAT else values
    packed_samples = samples.astype(packed).tobytes() if packed else twelve_bits(samples)
    np.testing.assert_array_equal(np.asarray(decode_image(tiff(packed_samples, bits, kind)))[..., 0], GREY)


@pytest.mark.parametrize(("bits", "kind", "packed"), [(8, UNSIGNED, "u1"), (16, UNSIGNED, "<u2"), (32, FLOAT, "<f4")])
def test_white_is_zero_is_inverted(bits, kind, packed):
    white = 1 if kind == FLOAT else 2**bits - 1
    samples = (white - GREY / 255 * white).astype(packed)
    decoded = np.asarray(decode_image(tiff(samples.tobytes(), bits, kind, white_is_zero=True)))
    assert np.abs(decoded[..., 0].astype(int) - GREY).max() <= 1


@pytest.mark.parametrize(
    ("packed", "values"),
    [
        ("<f4", [-0.1, 1]),
        ("<f4", [0, 1.1]),
        ("<f4", [0, 300]),
        ("<f4", [0, np.nan]),
        ("<f4", [0, np.inf]),
        ("<i4", [-1, 200]),
        ("<i4", [0, 1023]),
        ("<u4", [0, 2**32 - 1]),
    ],
)
def test_grey_with_an_unknown_white_is_rejected_not_clipped(packed, values):
    samples = np.resize(np.array(values, packed), 1200)
    with pytest.raises(ImageRejectedError, match="unknown white: "):
        decode_image(tiff(samples.tobytes(), 32, FLOAT if packed == "<f4" else SIGNED))


MODES = {
    "TIFF": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "BMP": ("1", "L", "P", "RGB"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P",),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_every_mode_keeps_its_range(kind, mode):
    """Grey steps from black to white, half transparent in modes with transparency."""
    steps = np.repeat([0, 255] if mode == "1" else [0, 64, 128, 192, 255], 8).astype(np.uint8)
    grey = Image.fromarray(np.tile(steps, (40, 1)))
    image = grey.convert("RGB")
    alpha = mode in ("LA", "PA", "RGBA")
    if mode == "LAB":
        image = ImageCms.profileToProfile(image, SRGB, ImageCms.createProfile("LAB"), outputMode="LAB")
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        image = grey.quantize(8).convert(mode) if mode in ("P", "PA") else image.convert(mode)
    if alpha:
        image.putalpha(128)
    data = encode(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == mode
    expected = 127 + steps[:, None] / 2 if alpha else steps[:, None]
    assert np.abs(np.asarray(decode_image(data)).astype(float) - expected).max() <= 3
