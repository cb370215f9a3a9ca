"""Buckets: the plain order, moved about inside chunks so that each step has one shape."""

from collections import Counter

import numpy as np
import pytest

from mofo.data.order import CHUNK, MAX_ASPECT, Buckets, bucket_sizes, stream

SIZES = bucket_sizes((64, 64), 8)
BATCH = 6


def shape(place: int) -> tuple[int, int]:
    """Any of three aspects, at random."""
    number = stream(7, place).integers(3)
    return ((48, 64), (100, 50), (33, 133))[number]


def buckets(seed: int = 0) -> Buckets:
    return Buckets(SIZES, shape, batch_size=BATCH, seed=seed)


def nearest(place: int) -> tuple[int, int]:
    h, w = shape(place)
    return min(SIZES, key=lambda size: abs(np.log(size[1] / size[0]) - np.log(w / h)))


@pytest.mark.parametrize(("size", "patch"), [((512, 512), 16), ((64, 64), 8), ((384, 640), 16)])
def test_sizes_are_whole_patches_of_one_area_from_tall_to_wide(size: tuple, patch: int) -> None:
    sizes = bucket_sizes(size, patch)
    aspects = [w / h for h, w in sizes]
    assert aspects == sorted(set(aspects))
    assert aspects[0] <= 1 / MAX_ASPECT * 1.1
    assert aspects[-1] >= MAX_ASPECT / 1.1
    for h, w in sizes:
        assert h % patch == w % patch == 0
        assert h * w == pytest.approx(size[0] * size[1], rel=0.1)


def test_a_square_size_is_one_of_its_buckets() -> None:
    assert (512, 512) in bucket_sizes((512, 512), 16)


def test_a_chunk_holds_what_it_holds_without_buckets() -> None:
    order = buckets()
    for chunk in (0, 5):
        positions = range(chunk * CHUNK * BATCH, (chunk + 1) * CHUNK * BATCH)
        assert sorted(order(position)[0] for position in positions) == list(positions)


def test_a_step_has_one_size_and_few_hold_samples_of_two_aspects() -> None:
    order = buckets()
    mixed = 0
    for step in range(CHUNK):
        taken = [order(step * BATCH + i) for i in range(BATCH)]
        (size,) = {size for _, size in taken}
        aspects = Counter(nearest(place) for place, _ in taken)
        assert size in aspects
        mixed += len(aspects) > 1
    assert mixed <= 2  # three aspects have two borders


def test_shapes_come_in_no_order() -> None:
    order = buckets()
    sizes = [order(step * BATCH)[1] for step in range(CHUNK)]
    changes = sum(a != b for a, b in zip(sizes, sizes[1:], strict=False))
    assert changes > CHUNK / 3


def test_a_position_tells_its_sample_wherever_one_begins() -> None:
    order, other = buckets(), buckets(1)
    forward = [order(position) for position in range(2 * CHUNK * BATCH)]
    order = buckets()
    assert [order(position) for position in reversed(range(2 * CHUNK * BATCH))] == forward[::-1]
    assert [other(position) for position in range(CHUNK * BATCH)] != forward[: CHUNK * BATCH]
    far = 10**12 * CHUNK * BATCH
    assert abs(buckets()(far)[0] - far) < CHUNK * BATCH
