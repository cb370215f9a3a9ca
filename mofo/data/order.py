"""The order of samples: a pure function of (seed, position), computed without counting up to it.

Position p (0, 1, 2, ...) of the global order lies in block p // 1000. A block holds every source in
exact proportion to its weight (in thousandths of the total, at least one), permuted; so the k-th
time a source is taken is known from p alone. Its k-th sample lies in epoch k // n of the source,
whose shards are permuted, then its samples inside windows of a few shards: reads stay local, and
an epoch holds each sample once. Ranks, workers and restarts do not enter.

`Buckets` gives the samples of an optimiser step one shape without stretching any. It only moves
positions about inside chunks of CHUNK steps: the samples of a chunk are sorted by the aspect that
is nearest to theirs and cut into steps, which are shuffled. So all of the above still holds,
nothing is counted up to, and the state is still one position. A step at the border of two aspects
holds both and takes that of the sample in its middle: what is of another aspect is cropped more.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

BLOCK = 1000  # positions; weights such as 0.25 or 0.333 come out exact
WINDOW = 4  # shards whose samples are mixed with one another
CHUNK = 64  # steps of which each takes one of the aspects, so at most a fifth lies at a border
MAX_ASPECT = 4.0  # KITTI has 3.3; what is longer is cropped
ASPECTS_PER_OCTAVE = 3  # so at most 11 % of an image is cropped away, 6 % on average


def stream(seed: int, *marks: int | str) -> np.random.Generator:
    """The random stream named by `marks` under `seed`; other marks, other stream."""
    words = [zlib.crc32(mark.encode()) if isinstance(mark, str) else mark for mark in marks]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *words])))


class Recent(dict):
    """The last few values of a function of a tuple; unlike lru_cache, a worker can be sent one."""

    def __init__(self, function: Callable[..., Any], size: int) -> None:
        super().__init__()
        self.function, self.size = function, size

    def __missing__(self, arguments: tuple) -> Any:
        if len(self) >= self.size:
            del self[next(iter(self))]
        self[arguments] = value = self.function(*arguments)
        return value


class Mixture:
    """Which source a position takes, and which of its turns that is."""

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        if not weights or not all(np.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(
                f"weights are {list(weights)}, but each must be positive; to leave a source out, "
                "drop its row"
            )
        self.seed = seed
        self.shares = share(weights, BLOCK)
        self._block = Recent(self._permute_block, size=8)

    def __call__(self, position: int) -> tuple[int, int]:
        """Source at `position`, and how often it was taken before."""
        block, offset = divmod(position, BLOCK)
        sources, turns = self._block[block,]
        source = int(sources[offset])
        return source, block * self.shares[source] + int(turns[offset])

    def _permute_block(self, block: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        sources = np.repeat(np.arange(len(self.shares)), self.shares)
        sources = stream(self.seed, "mixture", block).permutation(sources)
        turns = np.zeros(BLOCK, np.int64)
        for source, count in enumerate(self.shares):
            turns[sources == source] = np.arange(count)
        return sources, turns


def share(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to `weights`, each at least 1, that add up to `total`."""
    if len(weights) > total:
        raise ValueError(f"{len(weights)} sources, but a block has room for {total}; merge some")
    exact = np.asarray(weights, np.float64) / sum(weights) * total
    # Rounding keeps 0.29 * 100 = 28.999... from losing its last unit.
    shares = np.maximum(np.floor(exact.round(6)), 1).astype(np.int64)
    while shares.sum() < total:
        shares[np.argmax(exact - shares)] += 1
    while shares.sum() > total:
        shares[np.argmax(np.where(shares > 1, shares - exact, -np.inf))] -= 1
    return shares.tolist()


class Permutation:
    """The running order of one source: turn k -> index of a sample."""

    def __init__(self, starts: Int64[np.ndarray, " n"], *, seed: int, name: str) -> None:
        """`starts`: index of the first sample of each shard, and behind them the total."""
        self.starts, self.seed, self.name = starts, seed, name
        self._shards = Recent(self._permute_shards, size=2)
        self._window = Recent(self._permute_window, size=4)

    def __call__(self, turn: int, skip: int = 0) -> int:
        """Sample for `turn`; `skip` moves on within the same epoch, round and round."""
        total = int(self.starts[-1])
        epoch, offset = divmod(turn, total)
        offset = (offset + skip) % total
        _, ends = self._shards[epoch,]
        window = int(np.searchsorted(ends, offset, side="right")) // WINDOW
        first = int(ends[window * WINDOW - 1]) if window else 0
        return int(self._window[epoch, window][offset - first])

    def _permute_shards(
        self, epoch: int
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Shards of an epoch in order, and after how many samples each of them ends."""
        shards = stream(self.seed, "shards", self.name, epoch).permutation(len(self.starts) - 1)
        return shards, np.cumsum(np.diff(self.starts)[shards])

    def _permute_window(self, epoch: int, window: int) -> Int64[np.ndarray, " n"]:
        shards = self._shards[epoch,][0][window * WINDOW : (window + 1) * WINDOW]
        samples = [np.arange(int(self.starts[i]), int(self.starts[i + 1])) for i in shards]
        rng = stream(self.seed, "samples", self.name, epoch, window)
        return rng.permutation(np.concatenate(samples))


def bucket_sizes(size: tuple[int, int], patch: int) -> list[tuple[int, int]]:
    """Heights and widths in whole patches, from tall to wide, each of about the area of `size`."""
    area = size[0] * size[1] / patch**2
    most = round(ASPECTS_PER_OCTAVE * np.log2(MAX_ASPECT))
    rows = (
        max(1, round(np.sqrt(area / 2 ** (step / ASPECTS_PER_OCTAVE))))
        for step in range(-most, most + 1)
    )
    # A small picture has fewer heights than there are aspects.
    return [(h * patch, max(1, round(area / h)) * patch) for h in dict.fromkeys(rows)]


class Buckets:
    """Which sample of the plain order stands at a position, and the shape of its step."""

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        shape: Callable[[int], tuple[int, int]],
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        """`shape`: height and width of the image at a position of the plain order."""
        self.sizes, self.shape = list(sizes), shape
        self.batch_size, self.seed = batch_size, seed
        self._aspects = np.log([w / h for h, w in sizes])
        self._chunk = Recent(self._sort_chunk, size=2)

    def __call__(self, position: int) -> tuple[int, tuple[int, int]]:
        """The position in the plain order, and (h, w) of all samples of this step."""
        chunk, offset = divmod(position, CHUNK * self.batch_size)
        places, buckets = self._chunk[chunk,]
        return int(places[offset]), self.sizes[buckets[offset // self.batch_size]]

    def _sort_chunk(self, chunk: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " k"]]:
        """Places in the plain order, step by step, and the bucket of each step."""
        first = chunk * CHUNK * self.batch_size
        places = np.arange(first, first + CHUNK * self.batch_size)
        shapes = np.array([self.shape(int(place)) for place in places], np.float64)
        aspects = np.log(shapes[:, 1] / shapes[:, 0])
        nearest = np.abs(aspects[:, None] - self._aspects).argmin(1)
        order = np.argsort(nearest, kind="stable").reshape(CHUNK, self.batch_size)
        order = stream(self.seed, "buckets", chunk).permutation(order)
        return places[order].ravel(), nearest[order[:, self.batch_size // 2]]
