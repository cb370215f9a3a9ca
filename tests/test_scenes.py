"""Generated scenes: exact depth, honest captions, held-out splits; and the sparsity patterns."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from mofo.data.scenes import (
    FURTHEST,
    KINDS,
    LOOKS,
    MAX_WORDS,
    NUMBERS,
    OBJECTS,
    PLURALS,
    compose,
    describe,
    generate,
    look,
)
from mofo.data.sparsity import PATTERNS, sparsify
from mofo.data.world.raycast import Camera, Light, Shape, render, turn
from mofo.data.world.staging import SPLITS, TEETH, TEST_TEETH, Draw, owner_of
from mofo.data.world.textures import Material

GREY = Material(colour=(0.5, 0.5, 0.5))
SIZE = (48, 64)


def points(metres, camera):
    """World coordinates of the pixel centres, from intrinsics and pose alone, in float64."""
    h, w = metres.shape
    column, row = np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)
    pixels = np.stack([column, row, np.ones_like(row)], -1)
    rays = pixels @ np.linalg.inv(camera.intrinsics((h, w))).T
    return (rays * metres[..., None].astype(float)) @ camera.axes.T + camera.place


def draw_shapes(shapes, camera, size=SIZE):
    sky = ((0.8, 0.9, 1.0), (0.3, 0.5, 0.9))
    lamp = Light(place=(0.3, 1.0, 0.2), colour=(0.5, 0.5, 0.5), sun=True)
    return render(shapes, [lamp], camera, ambient=(0.4, 0.4, 0.4), sky=sky, size=size)


@pytest.fixture(scope="module")
def scenes():
    return {
        (split, kind): [generate(seed, split=split, kind=kind) for seed in range(5)]
        for split in SPLITS
        for kind in KINDS
    }


def test_camera_axes_are_orthonormal_and_level():
    camera = Camera(place=(0.0, 1.0, 0.0), yaw=0.7, pitch=-0.4, fov=1.0)
    np.testing.assert_allclose(camera.axes.T @ camera.axes, np.eye(3), atol=1e-12)
    assert camera.axes[1, 0] == 0  # right is horizontal
    assert camera.axes[1, 1] < 0 < camera.axes[0, 2]  # down is down; forward turns towards x
    assert camera.axes[1, 2] < 0  # a negative pitch looks down


def test_ground_depth_is_that_of_the_plane():
    camera = Camera(place=(0.0, 1.6, 0.0), yaw=0.4, pitch=-0.2, fov=1.0)
    ground = Shape(form="quad", centre=(0.0, 0.0, 0.0), half=(1e3, 1.0, 1e3), material=GREY)
    view = draw_shapes([ground], camera)
    h, w = SIZE
    focal = h / 2 / np.tan(0.5)
    down = (np.arange(h) + 0.5 - h / 2) / focal
    # The ray (x, y, 1) falls by y cos(pitch) - sin(pitch) per metre of depth, whatever x is.
    fall = down * np.cos(-0.2) - np.sin(-0.2)
    expected = np.where(fall > 0, 1.6 / fall, 0)
    below = (fall > 0.01) & (expected < 300)
    np.testing.assert_allclose(
        view.metres[below], np.repeat(expected[below, None], w, 1), rtol=2e-5
    )
    assert (view.metres[fall <= 0] == 0).all()
    assert (view.shape[fall <= 0] == -1).all()


def test_ball_depth_is_z_depth_not_distance():
    camera = Camera(place=(0.0, 0.0, 0.0), yaw=0.0, pitch=0.0, fov=1.2)
    ball = Shape(form="ball", centre=(1.5, 0.5, 6.0), half=(1.2, 1.2, 1.2), material=GREY)
    view = draw_shapes([ball], camera, (64, 64))
    focal = 32 / np.tan(0.6)
    row, column = np.mgrid[:64, :64] + 0.5
    ray = np.stack([(column - 32) / focal, -(row - 32) / focal, np.ones((64, 64))], -1)
    centre = np.array([1.5, 0.5, 6.0])
    a, b = (ray**2).sum(-1), ray @ centre
    square = b**2 - a * (centre @ centre - 1.2**2)
    expected = np.where(square > 0, (b - np.sqrt(np.maximum(square, 0))) / a, 0)
    assert ((view.metres > 0) == (square > 0)).mean() > 0.999
    both = (view.metres > 0) & (square > 1e-3)
    assert both.sum() > 100
    np.testing.assert_allclose(view.metres[both], expected[both], rtol=1e-5)


@pytest.mark.parametrize("form", ["box", "ball", "cylinder", "prism"])
def test_points_of_a_turned_solid_lie_on_its_surface(form):
    camera = Camera(place=(0.4, 1.9, -4.0), yaw=0.05, pitch=-0.3, fov=0.9)
    half, frame = (0.9, 0.6, 1.3), turn(0.8)
    shape = Shape(form=form, centre=(0.2, 0.6, 0.3), half=half, axes=frame, material=GREY)
    view = draw_shapes([shape], camera)
    hit = view.metres > 0
    assert hit.sum() > 200
    x, y, z = ((points(view.metres, camera)[hit] - shape.centre) @ frame / half).T
    surface = {
        "box": np.maximum.reduce([abs(x), abs(y), abs(z)]),
        "ball": np.sqrt(x**2 + y**2 + z**2),
        "cylinder": np.maximum(np.hypot(x, z), abs(y)),
        "prism": np.maximum.reduce([-y, abs(z), 2 * abs(x) + y]),
    }[form]
    np.testing.assert_allclose(surface, 1, atol=2e-5)


def test_the_nearer_shape_hides_the_farther():
    camera = Camera(place=(0.0, 0.0, 0.0), yaw=0.0, pitch=0.0, fov=0.8)
    near = Shape(form="box", centre=(0.0, 0.0, 3.0), half=(0.3, 0.3, 0.1), material=GREY, owner=0)
    far = Shape(form="box", centre=(0.0, 0.0, 6.0), half=(1.0, 1.0, 0.1), material=GREY, owner=1)
    for shapes in ([near, far], [far, near]):
        view = draw_shapes(shapes, camera)
        assert view.metres[24, 32] == pytest.approx(2.9, rel=1e-6)
        assert view.seen[0] == view.covered[0]
        assert 0 < view.seen[1] < view.covered[1]


def test_a_shape_between_ground_and_sun_casts_a_shadow():
    camera = Camera(place=(0.0, 3.0, -4.0), yaw=0.0, pitch=-0.6, fov=0.8)
    ground = Shape(form="quad", centre=(0.0, 0.0, 0.0), half=(9.0, 1.0, 9.0), material=GREY)
    plate = Shape(form="box", centre=(0.0, 9.0, 0.0), half=(0.5, 0.1, 0.5), material=GREY)
    sun = Light(place=(0.0, 1.0, 0.0), colour=(0.5, 0.5, 0.5), sun=True)
    lamp = Light(place=(0.0, 18.0, 0.0), colour=(0.5, 0.5, 0.5), reach=99.0)
    sky = ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    for light, reach in ((sun, 0.5), (lamp, 1.0)):  # half way up to a lamp a shadow doubles
        view = render([ground, plate], [light], camera, ambient=(0.2,) * 3, sky=sky, size=SIZE)
        x, _, z = np.moveaxis(points(view.metres, camera), -1, 0)
        outside = np.maximum(abs(x), abs(z)) - reach
        brightness = view.image.mean(-1)
        assert brightness[outside < -0.2].max() < brightness[(outside > 0.3) & (z < 3)].min()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_samples_are_measured_depth_with_their_sky_left_out(scenes, split, kind):
    nearest = {"room": 0.3, "street": 0.5}[kind]
    for sample in scenes[split, kind]:
        sample.check()
        assert sample.image.shape == (64, 64, 3)
        assert (sample.metres[~sample.valid] == 0).all()
        measured = sample.metres[sample.valid]
        assert nearest < measured.min() <= measured.max() < FURTHEST
        assert sample.intrinsics[0, 2] == 32
        if kind == "room":
            assert sample.valid.all()


def test_sky_is_never_valid():
    sample = generate(0, kind="street", size=(32, 40))
    scene = compose(0, kind="street")
    empty = scene.cameras[0]
    up = Camera(place=(0.0, 40.0, 0.0), yaw=empty.yaw, pitch=1.0, fov=0.8)
    view = look(scene, up, (32, 40))
    assert (view.shape == -1).all()
    assert (view.metres == 0).all()
    assert sample.valid.shape == (32, 40)


def test_floor_points_lie_at_height_zero():
    scene = compose(3, kind="room")
    for camera in scene.cameras[:3]:
        view = look(scene, camera, SIZE)
        floor = view.shape == 0
        height = points(view.metres, camera)[floor][:, 1]
        np.testing.assert_allclose(height, 0, atol=1e-4)


def test_a_seed_is_a_picture():
    for kind in (None, *KINDS):
        first, second = generate(5, kind=kind), generate(5, kind=kind)
        for name in ("image", "metres", "valid", "intrinsics"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        assert (first.key, first.captions) == (second.key, second.captions)
    assert not np.array_equal(generate(5, kind="room").image, generate(6, kind="room").image)
    assert generate(5).key.split("-")[0] == compose(5).kind


def test_splits_share_no_scene_arrangement_or_number(scenes):
    for kind in KINDS:
        train, test = ({s.image.tobytes() for s in scenes[split, kind]} for split in SPLITS)
        assert not train & test
        arrangements = {
            split: {compose(seed, split=split, kind=kind).arrangement for seed in range(15)}
            for split in SPLITS
        }
        for split, found in arrangements.items():
            assert {owner_of(arrangement) for arrangement in found} == {split}
    for split in SPLITS:
        draw = Draw(np.random.default_rng(0), split)
        teeth = {int((draw.held(-3.0, 7.0) + 3.0) / 10 * TEETH) for _ in range(400)}
        assert teeth == {i for i in range(TEETH) if (i in TEST_TEETH) == (split == "test")}


def test_textures_of_the_splits_are_disjoint():
    def colours(split):
        scenes = (compose(s, split=split, kind=k) for s in range(6) for k in KINDS)
        return {shape.material for scene in scenes for shape in scene.shapes}

    # Glass, tyres and lights have one colour in the whole world; whatever is drawn differs.
    shared = colours("train") & colours("test")
    assert all(material.pattern == "plain" and material.period == 1 for material in shared)
    assert len(shared) < 10
    names = ("red", "blue")
    train, test = (
        {Draw(np.random.default_rng(s), split).shade(n) for s in range(50) for n in names}
        for split in SPLITS
    )
    assert not train & test


def test_captions_use_the_vocabulary(scenes):
    nouns = {
        word
        for noun in OBJECTS
        for one in (noun, PLURALS.get(noun, noun + "s"))
        for word in one.split()
    }
    known = nouns | set(LOOKS) | set(NUMBERS) | set(KINDS)
    known |= set(["a", "an", "and", "with", "sky", "clear", "cloudy", "sunset", "walls", "floor"])
    for samples in scenes.values():
        for sample in samples:
            (caption,) = sample.captions
            words = re.findall(r"[a-z]+", caption)
            assert set(words) <= known, caption
            assert len(words) <= MAX_WORDS
            assert caption.startswith(f"a {sample.key.split('-')[0]}")


def test_captions_name_only_what_is_visible():
    for kind, seed in itertools.product(KINDS, range(6)):
        scene = compose(seed, kind=kind)
        view = look(scene, scene.cameras[0], (64, 64))
        owners = np.array([shape.owner for shape in scene.shapes] + [-1])[view.shape]
        counts = Counter()
        for number, thing in enumerate(scene.things):
            filled = (owners == number).sum()
            named = filled >= 0.012 * 64 * 64 and filled >= 0.35 * view.covered[number]
            counts[thing] += bool(named)
        allowed = {
            phrase
            for phrase, parts in scene.surroundings
            if np.isin(view.shape, list(parts)).mean() > 0.06
        }
        for thing, count in counts.items():
            noun = thing.noun if count == 1 else PLURALS.get(thing.noun, thing.noun + "s")
            article = "an" if f"{thing.look}{thing.noun}"[0] in "aeiou" else "a"
            number = article if count == 1 else NUMBERS[min(count, 7)]
            if count:
                allowed.add(" ".join(filter(None, [number, thing.look, noun])))
        caption = describe(scene, view, np.random.default_rng(seed))
        named = re.split(", | and ", caption.removeprefix(f"a {kind} with "))
        assert set(named) <= allowed
        assert len(set(named)) == len(named)


def test_the_mean_depth_map_does_not_explain_test_scenes():
    size = (32, 32)
    train = [generate(seed, size=size) for seed in range(60)]
    mean = sum(s.metres.astype(float) for s in train) / sum(s.valid for s in train)
    errors = []
    for sample in (generate(seed, split="test", size=size) for seed in range(40)):
        depth, guess = sample.metres[sample.valid].astype(float), mean[sample.valid]
        inputs = np.stack([guess, np.ones_like(guess)], 1)
        fitted = inputs @ np.linalg.lstsq(inputs, depth)[0]
        errors.append(np.mean(abs(np.maximum(fitted, 1e-3) - depth) / depth))
    assert np.mean(errors) > 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "train, test"),
        ({"kind": "forest"}, "room, street"),
    ],
)
def test_unknown_split_or_kind_says_what_there_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(0, **arguments)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed is -1"):
        generate(-1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [(64, 64), (37, 90), (5, 4)])
def test_patterns_keep_measured_pixels_only(pattern, size):
    for seed in range(3):
        sample = generate(seed, kind="street", size=size)
        masks = [
            sparsify(
                sample.image,
                sample.metres,
                sample.valid,
                pattern=pattern,
                max_kept=0.15,
                rng=np.random.default_rng(seed),
            )
            for _ in range(2)
        ]
        np.testing.assert_array_equal(*masks)
        assert not (masks[0] & ~sample.valid).any()
        assert (sample.metres[masks[0]] > 0).all()
        assert 1 <= masks[0].sum() <= 0.15 * masks[0].size


def test_each_pattern_keeps_its_share():
    shares = {pattern: [] for pattern in PATTERNS}
    for seed in range(12):
        sample = generate(seed)
        for pattern, kept in shares.items():
            rng = np.random.default_rng(seed)
            mask = PATTERNS[pattern](sample.image, sample.metres, sample.valid, rng)
            kept.append(mask.mean())
    assert 0.009 < min(shares["sfm"]) <= max(shares["sfm"]) <= 0.08
    assert 0.02 < np.mean(shares["lidar"]) < 0.3
    assert 0.3 < np.mean(shares["rgbd"]) < 0.9
    assert np.mean(shares["rgbd"]) < np.mean(shares["dense"])


def test_lidar_scans_rows_and_sfm_seeks_texture():
    image = np.full((64, 64, 3), 90, np.uint8)
    image[:, 32:] = 200
    metres, valid = np.full((64, 64), 5, np.float32), np.ones((64, 64), bool)
    scan = PATTERNS["lidar"](image, metres, valid, np.random.default_rng(0))
    assert (scan.sum(1) == 0).sum() > 20
    found = PATTERNS["sfm"](image, metres, valid, np.random.default_rng(0))
    assert found[:, 30:34].mean() > 10 * found[:, :30].mean()


def test_rgbd_has_holes_at_edges_and_in_the_dark():
    image = np.full((64, 64, 3), 120, np.uint8)
    image[:16] = 0
    metres = np.full((64, 64), 2, np.float32)
    metres[:, 32:] = 4
    kept = np.mean(
        [
            PATTERNS["rgbd"](image, metres, metres > 0, np.random.default_rng(seed))
            for seed in range(20)
        ],
        axis=0,
    )
    assert (kept[:, 31:33] == 0).all()
    assert kept[:16].mean() < 0.3 < kept[20:, :30].mean()


def test_an_image_without_depth_keeps_nothing():
    image, metres = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.float32)
    for pattern in PATTERNS:
        rng = np.random.default_rng(0)
        none = np.zeros((8, 8), bool)
        mask = sparsify(image, metres, none, pattern=pattern, max_kept=0.5, rng=rng)
        assert not mask.any()
        one = none.copy()
        one[3, 4] = True
        mask = sparsify(image, metres + one, one, pattern=pattern, max_kept=0.01, rng=rng)
        np.testing.assert_array_equal(mask, one)


def test_unknown_pattern_or_share_says_what_is_accepted():
    image, metres = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.float32)
    arguments = {"rng": np.random.default_rng(0)}
    with pytest.raises(ValueError, match="dense, lidar, sfm, rgbd"):
        sparsify(image, metres, metres > 0, pattern="radar", max_kept=0.1, **arguments)
    with pytest.raises(ValueError, match="max_kept is 0"):
        sparsify(image, metres, metres > 0, pattern="dense", max_kept=0.0, **arguments)
