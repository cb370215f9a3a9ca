"""COLMAP projects: trees as they are published, depth where it was put.

The scene and the files are written here, with scipy's rotations and a projection of its own; the
package only reads them.
"""

import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from mofo.data.convert import colmap
from mofo.data.sample import Sample

WIDTH, HEIGHT = 320, 240
NUMBERS = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2, "RADIAL": 3, "OPENCV": 4}
LENSES = {
    "SIMPLE_PINHOLE": (300.0, 160.5, 118.0),
    "PINHOLE": (300.0, 310.0, 160.5, 118.0),
    "SIMPLE_RADIAL": (300.0, 160.5, 118.0, -0.08),
    "RADIAL": (300.0, 160.5, 118.0, -0.08, 0.03),
    "OPENCV": (300.0, 310.0, 160.5, 118.0, -0.08, 0.03, 0.004, -0.003),
}
# Rotation by x, y, z in degrees, and translation, of the cameras.
POSES = [
    ((0, 0, 0), (0, 0, 0)),
    ((10, -20, 5), (0.5, 0.1, 0.2)),
    ((-15, 25, 170), (-0.3, 0.2, 0.5)),
    ((5, 8, -90), (0.2, -0.4, 1.0)),
]
NAMES = ["0.jpg", "left cam/frame.1.jpg", "left cam/frame.2.jpg", "z.jpg"]


class View(NamedTuple):
    number: int
    rotation: Rotation
    translation: np.ndarray
    name: str
    seen: list[tuple[float, float, int]]  # x, y, number of the point or -1


class Scene(NamedTuple):
    model: str
    lens: tuple[float, ...]
    views: list[View]
    points: dict[int, tuple[np.ndarray, float, list[tuple[int, int]]]]  # place, error, track


def bend(model: str, lens: tuple[float, ...], local: np.ndarray) -> tuple[float, float]:
    """The pixel of one point in camera coordinates."""
    x, y = local[0] / local[2], local[1] / local[2]
    if model == "SIMPLE_PINHOLE":
        return lens[0] * x + lens[1], lens[0] * y + lens[2]
    if model == "PINHOLE":
        return lens[0] * x + lens[2], lens[1] * y + lens[3]
    r2 = x**2 + y**2
    if model in ("SIMPLE_RADIAL", "RADIAL"):
        grown = 1 + lens[3] * r2 + (lens[4] * r2**2 if model == "RADIAL" else 0)
        return lens[0] * x * grown + lens[1], lens[0] * y * grown + lens[2]
    fx, fy, cx, cy, k1, k2, p1, p2 = lens
    grown = 1 + k1 * r2 + k2 * r2**2
    u = x * grown + 2 * p1 * x * y + p2 * (r2 + 2 * x**2)
    v = y * grown + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y
    return fx * u + cx, fy * v + cy


def make_scene(model: str = "PINHOLE") -> Scene:
    """Each view sees each point that falls into it, between keypoints that are no points."""
    places = np.random.default_rng(0).uniform((-2, -2, 3), (2, 2, 9), (60, 3))
    points = {10 + 7 * k: (place, 0.0, []) for k, place in enumerate(places)}
    views = []
    for number, ((angles, translation), name) in enumerate(zip(POSES, NAMES, strict=True), start=3):
        rotation = Rotation.from_euler("xyz", angles, degrees=True)
        seen = [(1.0, 2.0, -1)]
        for key, (place, _, track) in points.items():
            local = rotation.apply(place) + translation
            u, v = bend(model, LENSES[model], local)
            if local[2] > 0 and 0 < u < WIDTH and 0 < v < HEIGHT:
                track.append((number, len(seen)))
                seen += [(u, v, key), (5.0, 6.0, -1)]
        views.append(View(number, rotation, np.array(translation, float), name, seen))
    return Scene(model, LENSES[model], views, points)


def write_binary(folder: Path, scene: Scene) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    camera = struct.pack("<iiQQ", 1, NUMBERS.get(scene.model, 8), WIDTH, HEIGHT)
    lens = struct.pack(f"<{len(scene.lens)}d", *scene.lens)
    (folder / "cameras.bin").write_bytes(struct.pack("<Q", 1) + camera + lens)
    data = struct.pack("<Q", len(scene.views))
    for view in scene.views:
        pose = (*view.rotation.as_quat(scalar_first=True), *view.translation)
        data += struct.pack("<i7di", view.number, *pose, 1) + view.name.encode() + b"\0"
        data += struct.pack("<Q", len(view.seen))
        data += b"".join(struct.pack("<ddq", *row) for row in view.seen)
    (folder / "images.bin").write_bytes(data)
    data = struct.pack("<Q", len(scene.points))
    for key, (place, error, track) in reversed(scene.points.items()):
        data += struct.pack("<Q3d3BdQ", key, *place, 1, 2, 3, error, len(track))
        data += b"".join(struct.pack("<ii", *row) for row in track)
    (folder / "points3D.bin").write_bytes(data)


def write_text(folder: Path, scene: Scene) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    words = [1, scene.model, WIDTH, HEIGHT, *scene.lens]
    (folder / "cameras.txt").write_text(f"# Camera list\n{' '.join(map(str, words))}\n")
    lines = ["# Image list with two lines of data per image:"]
    for view in scene.views:
        pose = (*view.rotation.as_quat(scalar_first=True), *view.translation)
        lines.append(" ".join(map(str, (view.number, *pose, 1, view.name))))
        lines.append(" ".join(str(value) for row in view.seen for value in row))
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    lines = ["# 3D point list"]
    for key, (place, error, track) in scene.points.items():
        ends = [value for row in track for value in row]
        lines.append(" ".join(map(str, (key, *place, 1, 2, 3, error, *ends))))
    (folder / "points3D.txt").write_text("\n".join(lines) + "\n")


def write_project(
    root: Path,
    scene: Scene,
    write: Callable[[Path, Scene], None] = write_binary,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Path:
    write(root / "sparse/0", scene)
    for view in scene.views:
        path = root / "images" / view.name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "grey").save(path)
    return root


def convert(source: Path, **options: object) -> dict[str, Sample]:
    """Samples by key, each checked, of items that went to another process and came back."""
    items = pickle.loads(pickle.dumps(colmap.find(source, **options)))
    samples = [sample for item in items for sample in colmap.read(item)]
    for sample in samples:
        sample.check()
    assert len({sample.key for sample in samples}) == len(samples)
    return {sample.key: sample for sample in samples}


def expected(scene: Scene, view: View) -> np.ndarray:
    """u, v, z of what a view sees, computed point by point."""
    rows = []
    for _, _, key in view.seen:
        if key >= 0:
            local = view.rotation.apply(scene.points[key][0]) + view.translation
            rows.append((*bend(scene.model, scene.lens, local), local[2]))
    return np.array(rows)


@pytest.mark.parametrize("write", [write_binary, write_text])
@pytest.mark.parametrize("model", LENSES)
def test_each_point_stands_at_its_pixel_with_its_depth(
    tmp_path: Path, model: str, write: Callable
) -> None:
    scene = make_scene(model)
    source = write_project(tmp_path, scene, write)
    # Observations farther than this from our projection would be missing below.
    samples = convert(source, min_track=1, max_error=1e-3)
    assert list(samples) == ["0", "left cam_frame_1", "left cam_frame_2", "z"]
    for view, sample in zip(scene.views, samples.values(), strict=True):
        truth = expected(scene, view)
        assert len(truth) > 10
        points = sample.points
        assert points is not None
        assert points.shape == truth.shape
        assert np.abs(points[:, :2] - truth[:, :2]).max() < 1e-3
        np.testing.assert_allclose(points[:, 2], truth[:, 2], rtol=1e-6)
        assert not sample.metric
        assert sample.image_bytes == (source / "images" / view.name).read_bytes()
    if "PINHOLE" in model:
        fx, fy = scene.lens[0], scene.lens[-3] if model == "PINHOLE" else scene.lens[0]
        k = np.array([[fx, 0, 160.5], [0, fy, 118.0], [0, 0, 1]])
        np.testing.assert_array_equal(samples["0"].intrinsics, k)
    else:
        assert samples["0"].intrinsics is None


def test_a_view_without_observations_gives_nothing(tmp_path: Path) -> None:
    scene = make_scene()
    scene.views[1].seen.clear()
    for write in (write_text, write_binary):
        samples = convert(write_project(tmp_path / write.__name__, scene, write))
        assert list(samples) == ["0", "left cam_frame_2", "z"]


def test_points_that_too_few_views_agree_on_are_left_out(tmp_path: Path) -> None:
    scene = make_scene()
    # All of this holds in view 0, so seen[1] is the first point's observation, and so on.
    keys = [key for _, _, key in scene.views[0].seen if key >= 0]
    short, wrong, unknown, moved, behind, *_ = keys
    points = {key: (place, 0.5, [(1, 0)] * 3) for key, (place, _, _) in scene.points.items()}
    points[short] = (points[short][0], 0.5, [(1, 0)] * 2)
    points[wrong] = (points[wrong][0], 2.5, [(1, 0)] * 3)
    points[unknown] = (points[unknown][0], -1.0, [(1, 0)] * 3)
    points[behind] = (-points[behind][0], 0.5, [(1, 0)] * 3)
    view = scene.views[0]
    seen = [(u + 3.0 * (key == moved), v, key) for u, v, key in view.seen]
    scene = Scene(scene.model, scene.lens, [view._replace(seen=seen)], points)
    source = write_project(tmp_path, scene)
    truth = expected(scene, view)

    def kept(**options: object) -> set[int]:
        points = convert(source, **options)["0"].points
        assert points is not None
        return {keys[np.abs(truth[:, 2] - z).argmin()] for z in points[:, 2]}

    assert kept() == set(keys) - {short, wrong, moved, behind}
    assert kept(min_track=2) == set(keys) - {wrong, moved, behind}
    assert kept(max_error=2.7) == set(keys) - {short, moved, behind}
    assert kept(max_error=3.1) == set(keys) - {short, behind}


def test_resized_images_of_a_nested_project_take_their_points_along(tmp_path: Path) -> None:
    scene = make_scene()
    for name in ("aa", "bb"):
        root = write_project(tmp_path / "1K" / name, scene, size=(WIDTH // 4, HEIGHT // 4))
        (root / "images").rename(root / "images_4")
        (root / "sparse").rename(root / "colmap")
        (root / "sparse").mkdir()
        (root / "colmap").rename(root / "sparse/sparse")
        (root / "sparse").rename(root / "colmap")
    samples = convert(
        tmp_path, model="colmap/sparse/0", images="images_4", min_track=1, metric=True, dataset="d"
    )
    assert len(samples) == 8
    sample = samples["1K_bb_z"]
    truth = expected(scene, scene.views[3])
    assert sample.points is not None
    np.testing.assert_allclose(sample.points[:, :2], truth[:, :2] / 4, atol=1e-4)
    np.testing.assert_allclose(sample.points[:, 2], truth[:, 2], rtol=1e-6)
    k = np.array([[75, 0, 40.125], [0, 77.5, 29.5], [0, 0, 1]])
    np.testing.assert_array_equal(sample.intrinsics, k)
    assert (sample.metric, sample.source) == (True, "d")


@pytest.mark.parametrize("size", [(240, 320), (320, 242), (158, 120)])
def test_an_image_of_another_shape_than_its_camera_is_refused(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    source = write_project(tmp_path, make_scene(), size=size)
    name = "x".join(map(str, size))
    with pytest.raises(ValueError, match=f"stored image is {name}, but its camera 320x240"):
        convert(source)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_points_turn_with_an_image_that_exif_turns(tmp_path: Path, orientation: int) -> None:
    scene = make_scene()
    view, truth = scene.views[3], expected(scene, scene.views[3])
    source = write_project(tmp_path, scene._replace(views=[view]))
    # The stored pixel of each point is marked with the number of the point.
    stored = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for number, (u, v, _) in enumerate(truth, start=1):
        stored[int(v), int(u), 0] = number
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(source / "images/z.jpg", "PNG", exif=exif)
    (sample,) = convert(source, min_track=1).values()
    assert sample.points is not None
    assert sample.intrinsics is not None
    u, v, z = sample.points.T.astype(np.float64)
    marks = sample.image[v.astype(int), u.astype(int), 0]
    np.testing.assert_array_equal(marks, np.arange(1, len(truth) + 1))
    # Neither turning nor mirroring changes how far from the camera a point is.
    rays = np.linalg.inv(sample.intrinsics) @ (u, v, np.ones_like(u))
    far = [np.linalg.norm(view.rotation.apply(scene.points[key][0]) + view.translation)
           for *_, key in view.seen if key >= 0]  # fmt: skip
    np.testing.assert_allclose(np.linalg.norm(rays * z, axis=0), far, rtol=1e-5)


@pytest.mark.parametrize("write", [write_binary, write_text])
def test_other_camera_models_are_refused_by_name(tmp_path: Path, write: Callable) -> None:
    scene = make_scene()._replace(model="SIMPLE_RADIAL_FISHEYE")
    with pytest.raises(ValueError, match="SIMPLE_RADIAL_FISHEYE is not read.*image_undistorter"):
        colmap.find(write_project(tmp_path, scene, write))


@pytest.mark.parametrize("file", ["cameras.bin", "images.bin", "points3D.bin"])
def test_a_truncated_model_is_named(tmp_path: Path, file: str) -> None:
    source = write_project(tmp_path, make_scene())
    path = source / "sparse/0" / file
    whole = path.read_bytes()
    for size in (*range(0, len(whole), 1 + len(whole) // 53), len(whole) - 1):
        path.write_bytes(whole[:size])
        colmap._points.cache_clear()
        with pytest.raises(ValueError, match=f"{file} cannot be read"):
            list(colmap.read(colmap.find(source)[0]))


@pytest.mark.parametrize(
    ("file", "offset"),
    [("cameras.bin", 0), ("images.bin", 0), ("images.bin", 78), ("points3D.bin", 0),
     ("points3D.bin", 51)],
)  # fmt: skip
def test_a_count_larger_than_the_file_allocates_nothing(
    tmp_path: Path, file: str, offset: int
) -> None:
    source = write_project(tmp_path, make_scene())
    path = source / "sparse/0" / file
    data = bytearray(path.read_bytes())
    data[offset : offset + 8] = struct.pack("<Q", 2**60)
    path.write_bytes(data)
    colmap._points.cache_clear()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{file} cannot be read"):
            convert(source)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "x/../../a.jpg", "x\\..\\a.jpg"])
@pytest.mark.parametrize("write", [write_binary, write_text])
def test_an_image_name_never_leaves_the_folder_of_images(
    tmp_path: Path, name: str, write: Callable
) -> None:
    scene = make_scene()
    source = write_project(tmp_path / "p", scene)
    for file in (source / "sparse/0").iterdir():
        file.unlink()
    write(source / "sparse/0", scene._replace(views=[scene.views[0]._replace(name=name)]))
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="is not a path inside the folder of images"):
        colmap.find(source)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no COLMAP project; expected PROJECT/sparse/0/cameras"):
        colmap.find(tmp_path)
    source = write_project(tmp_path, make_scene(), write_text)
    cameras = source / "sparse/0/cameras.txt"
    cameras.write_text(cameras.read_text().replace("1 PINHOLE", "2 PINHOLE"))
    with pytest.raises(ValueError, match=r"image '0.jpg' has camera 1, but there are \[2\]"):
        colmap.find(source)
    (source / "images").rename(source / "pictures")
    with pytest.raises(ValueError, match="no folder images"):
        colmap.find(source)
