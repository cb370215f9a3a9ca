"""Samples of noise with depth that is all different, for tests of the data."""

import io

import numpy as np
from PIL import Image

from mofo.data.sample import Sample


def picture(number: int, *, size: tuple[int, int] = (24, 32), depth: bool = True) -> Sample:
    """A sample whose measured depths are all different, with a third of the pixels unmeasured."""
    rng = np.random.default_rng(number)
    metres = (rng.permutation(size[0] * size[1]).reshape(size) + 1).astype(np.float32) / 100
    valid = rng.random(size) > 1 / 3
    return Sample(
        key=f"picture-{number:04d}",
        picture=Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)),
        metres=np.where(valid, metres, np.float32(0)) if depth else None,
        valid=valid if depth else None,
        intrinsics=np.array([[30.0, 0, 16], [0, 30.0, 12], [0, 0, 1]]),
        captions=(f"picture number {number}, naïve",),
        metric=True,
        source="test",
        licence="CC0",
    )


def sparse(number: int, *, size: tuple[int, int] = (24, 32)) -> Sample:
    """A sample with 50 points, the sky above them, two captions and no intrinsics."""
    rng = np.random.default_rng(number)
    low, high = (0, size[0] / 2, 0.5), (size[1], size[0], 90)
    sky = np.zeros(size, bool)
    sky[: size[0] // 2] = rng.random((size[0] // 2, size[1])) < 0.5
    return Sample(
        key=f"sparse-{number:04d}",
        picture=Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)),
        points=rng.uniform(low, high, (50, 3)).astype(np.float32),
        sky=sky,
        captions=(f"sparse number {number}", "a road"),
        metric=False,
        source="test",
        licence="CC BY 4.0",
    )


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()
