"""Ray-cast rooms and streets (`mofo.data.scenes`) as samples.

    mofo convert generated --split train --count 2000 --out data/made/scenes

The same options give the same scenes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mofo.data.sample import Sample
from mofo.data.scenes import generate
from mofo.data.world.staging import SPLITS

VERSION = 1
LICENCE = "Apache-2.0"
# Seeds of one set; sets whose `seed` differs share no scene.
SEEDS = 1_000_000
OPTIONS = {
    "split": "train or test; they share no layout, texture or seed",
    "count": "number of scenes, up to 1000000",
    "seed": "another one gives other scenes",
    "size": "height and width of the images in pixels, two numbers",
}


class Scene(NamedTuple):
    seed: int
    split: str
    size: tuple[int, int]


def find(*, split: str, count: int, seed: int = 0, size: Sequence[int] = (64, 64)) -> list[Scene]:
    """`count` scenes of `split`, always the same ones for the same arguments."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, but must be one of {', '.join(SPLITS)}")
    if not 0 < count <= SEEDS:
        raise ValueError(f"count is {count}, but must be in 1..{SEEDS}; use another seed for more")
    h, w = size
    return [Scene(number, split, (h, w)) for number in range(seed * SEEDS, seed * SEEDS + count)]


def read(item: Scene) -> Iterator[Sample]:
    yield generate(item.seed, split=item.split, size=item.size)
