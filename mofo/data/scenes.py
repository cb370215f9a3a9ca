"""Generated scenes: rooms and streets with exact metric depth and a caption of what is visible.

`generate(seed, split=..., kind=...)` is a pure function of its arguments. `split="test"` is the
same world, held out:
- seeds: the splits draw from different random streams, so seed 3 of one is not seed 3 of the other;
- layouts: an arrangement (which thing stands in which slot) belongs to one split, by its checksum;
- numbers of the layout (sizes of rooms and streets, height and field of view of the camera) and of
  the textures (shades of a colour, periods of a pattern) come from the comb of `Draw.held`: ten
  teeth, of which test owns two and train the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mofo.data.sample import Sample
from mofo.data.world.raycast import Camera, View, render
from mofo.data.world.rooms import compose_room
from mofo.data.world.staging import COLOURS, SPLITS, Draw, Scene, Thing
from mofo.data.world.streets import compose_street

KINDS = {"room": compose_room, "street": compose_street}
LOOKS = (*COLOURS, "wooden", "brick", "tiled", "checkered", "striped")
OBJECTS = (
    *("sofa", "bed", "table", "chair", "shelf", "cabinet", "lamp", "plant", "ball", "box"),
    *("rug", "window", "picture", "door"),
    *("house", "tower", "car", "bus", "tree", "lamp post", "hedge"),
)

FURTHEST = 80.0  # metres; what lies beyond counts as not measured
NEAREST = {"room": 0.5, "street": 1.5}
SEEN_SHARE = 0.012  # of the picture that a thing must fill to be named
SEEN_OF_ITSELF = 0.35  # of its own silhouette that must not be hidden
AROUND_SHARE = 0.06  # of the picture that walls, floor or sky must fill to be named
LARGEST_SHARE = 0.45  # of the picture that one thing may fill
MAX_WORDS = 18
PLURALS = {"shelf": "shelves", "box": "boxes", "bus": "buses"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "many")


def generate(
    seed: int, *, split: str = "train", kind: str | None = None, size: tuple[int, int] = (64, 64)
) -> Sample:
    """Image, z-depth, intrinsics and caption of a scene.

    The sky and what lies beyond `FURTHEST` are not valid. Pixel centres are at halves, so the
    principal point is (w / 2, h / 2).
    """
    scene = compose(seed, split=split, kind=kind)
    camera, view = _best_view(scene, size)
    words_rng = np.random.default_rng([len(SPLITS), SPLITS.index(split), seed])
    valid = (view.shape >= 0) & (view.metres < FURTHEST)
    return Sample(
        key=f"{scene.kind}-{split}-{seed:08d}",
        picture=Image.fromarray(view.image),
        metres=np.where(valid, view.metres, np.float32(0)),
        valid=valid,
        intrinsics=camera.intrinsics(size),
        captions=(describe(scene, view, words_rng),),
        metric=True,
        source="scenes",
        licence="Apache-2.0",
    )


def compose(seed: int, *, split: str = "train", kind: str | None = None) -> Scene:
    """The scene of a seed, before any camera looks at it."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, but must be one of {', '.join(SPLITS)}")
    if kind is not None and kind not in KINDS:
        raise ValueError(
            f"kind is {kind!r}, but must be one of {', '.join(KINDS)}; leave it out for any"
        )
    if seed < 0:
        raise ValueError(f"seed is {seed}, but must be 0 or more")
    draw = Draw(np.random.default_rng([SPLITS.index(split), seed]), split)
    drawn = draw.pick(tuple(KINDS))
    return KINDS[kind or drawn](draw)


def look(scene: Scene, camera: Camera, size: tuple[int, int]) -> View:
    """What a camera sees of the scene."""
    return render(
        scene.shapes, scene.lights, camera, ambient=scene.ambient, sky=scene.sky, size=size
    )


def visible(scene: Scene, view: View) -> list[Thing]:
    """Things large enough and not too hidden to be named, largest first."""
    least = SEEN_SHARE * view.shape.size
    seen = {
        owner: count
        for owner, count in view.seen.items()
        if owner >= 0 and count >= max(least, SEEN_OF_ITSELF * view.covered[owner])
    }
    return [scene.things[owner] for owner in sorted(seen, key=seen.__getitem__, reverse=True)]


def describe(scene: Scene, view: View, rng: np.random.Generator) -> str:
    """One sentence of at most `MAX_WORDS` words, in one of three orders."""
    counts: dict[Thing, int] = {}
    for thing in visible(scene, view):
        counts[thing] = counts.get(thing, 0) + 1
    pixels = np.bincount(view.shape.reshape(-1) + 1, minlength=len(scene.shapes) + 1)
    around = [
        phrase
        for phrase, parts in scene.surroundings
        if sum(pixels[part + 1] for part in parts) > AROUND_SHARE * view.shape.size
    ]
    rng.shuffle(around)
    around = around[: int(rng.integers(1, 3))]
    left = MAX_WORDS - len(f"a {scene.kind} with and".split())
    left -= sum(len(phrase.split()) for phrase in around)
    things = []
    for phrase in (_phrase(thing, count) for thing, count in counts.items()):
        left -= len(phrase.split())
        if left < 0:
            break
        things.append(phrase)
    order = int(rng.integers(3))
    if order == 1:
        rng.shuffle(things)
    listed = _listed([*around, *things] if order == 2 else [*things, *around])
    return f"a {scene.kind} with {listed}" if listed else f"a {scene.kind}"


def _best_view(scene: Scene, size: tuple[int, int]) -> tuple[Camera, View]:
    best, best_quality = None, -1.0
    for camera in scene.cameras:
        view = look(scene, camera, size)
        quality = _quality(scene, view)
        if quality > best_quality:
            best, best_quality = (camera, view), quality
        if quality >= 1:
            break
    assert best is not None
    return best


def _quality(scene: Scene, view: View) -> float:
    """1 for a picture worth keeping: nothing is too near or fills it, something can be named."""
    hit = view.shape >= 0
    if hit.mean() < 0.3:
        return 0.0
    near = min(float(view.metres[hit].min()) / NEAREST[scene.kind], 1.0)
    largest = max((count for owner, count in view.seen.items() if owner >= 0), default=0)
    filled = min(LARGEST_SHARE * view.shape.size / max(largest, 1), 1.0)
    return near * filled * (1.0 if visible(scene, view) else 0.5)


def _phrase(thing: Thing, count: int) -> str:
    if count > 1:
        noun = PLURALS.get(thing.noun, thing.noun + "s")
        return f"{NUMBERS[min(count, len(NUMBERS) - 1)]} {thing.look} {noun}".replace("  ", " ")
    named = f"{thing.look} {thing.noun}".strip()
    return f"an {named}" if named[0] in "aeiou" else f"a {named}"


def _listed(phrases: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(phrases[:-1]), *phrases[-1:]) if part)
