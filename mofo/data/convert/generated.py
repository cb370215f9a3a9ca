"""Ray-cast rooms and streets (`mofo.data.scenes`) as samples.

To make a set of them:

    make("data/made/scenes", converter="generated", split="train", count=2000, seed=0)
"""

from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import get_context

from mofo.data.sample import Sample
from mofo.data.scenes import generate

VERSION = 1
PROCESSES = 2
# Seeds of one set; sets whose `seed` differs share no scene.
SEEDS = 1_000_000


def convert(
    *, split: str, count: int, seed: int = 0, size: Sequence[int] = (64, 64)
) -> Iterator[Sample]:
    """Yield `count` scenes of `split`, always the same ones for the same arguments."""
    if not 0 < count <= SEEDS:
        raise ValueError(f"count is {count}, but must be in 1..{SEEDS}; use another seed for more")
    h, w = size
    scene = partial(generate, split=split, size=(h, w))
    with get_context("fork").Pool(PROCESSES) as pool:
        yield from pool.imap(scene, range(seed * SEEDS, seed * SEEDS + count), chunksize=16)
