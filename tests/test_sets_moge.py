"""MoGe's prepared layout, and sets in HDF5: NYUv2's .mat files and Spring's disparity."""

import io
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from published import codes, other, picture, png16, rows, tar, unpack, zipped
from scipy.io import savemat

from mofo.data.logdepth import decode_log_depth
from mofo.evaluation.benchmark import Row, open_row
from mofo.evaluation.sets.view import nearest_measured, reproject, turn_ahead

GOLDEN = np.load(Path(__file__).parent / "golden/eval_golden_public.npz")
CENTRED = [[0.9, 0, 0.5], [0, 1.2, 0.5], [0, 0, 1]]
SIZE = (12, 16)


def instance(depth: bytes, intrinsics: list = CENTRED, size: tuple[int, int] = SIZE) -> dict:
    return {
        "image.jpg": picture(3, size, "JPEG"),
        "depth.png": depth,
        "meta.json": json.dumps({"intrinsics": intrinsics}).encode(),
    }


def moge_files(**instances: dict[str, bytes]) -> dict[str, bytes]:
    files = {".index.txt": "\n".join(f"a.b/{name}" for name in instances).encode()}
    for name, members in instances.items():
        files |= {f"a.b/{name}/{file}": data for file, data in members.items()}
    return files


def moge_row(tmp_path: Path, files: dict[str, bytes], name: str = "NYUv2", **changes) -> Row:
    row = rows("moge", tmp_path)[name]
    unpack(Path(row.source), files)
    return replace(row, **{"count": len(files) // 3, "size": list(SIZE), **changes})


def test_codes_and_depths_are_those_of_moges_own_writer_and_reader() -> None:
    data = GOLDEN["moge_depth_png/png_bytes"].tobytes()
    expected = GOLDEN["moge_depth_png/decoded"]
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(np.array(opened), GOLDEN["moge_depth_png/codes_u16"])
        near, far = float(opened.info["near"]), float(opened.info["far"])
    found = decode_log_depth(data)
    np.testing.assert_array_equal(found.valid, np.isfinite(expected))
    np.testing.assert_array_equal(found.sky, np.isposinf(expected))
    depth, truth = found.depth[found.valid], expected[found.valid]
    # The reference's own last bit depends on the processor's powf.
    np.testing.assert_array_max_ulp(depth, truth, maxulp=1)
    assert (depth != truth).mean() < 0.005
    again = 1 + np.rint(65533 * np.log(depth.astype(np.float64) / near) / np.log(far / near))
    np.testing.assert_array_equal(again, GOLDEN["moge_depth_png/codes_u16"][found.valid])


def test_an_image_that_is_already_the_view_stays_as_it_is(tmp_path: Path) -> None:
    planted = {(0, 0): 1, (5, 7): 65534, (11, 15): 30000, (3, 3): 65535}
    depth = codes(SIZE, planted, near="0.5", far="8.0")
    row = moge_row(tmp_path, moge_files(x=instance(depth)))
    images = open_row(row)
    sample = images.read(0)
    assert list(images.keys) == ["a_b_x_image"]
    with Image.open(Path(row.source) / "a.b/x/image.jpg") as opened:
        np.testing.assert_array_equal(sample.image, np.array(opened))
    assert sample.valid is not None
    assert sample.metres is not None
    assert {(int(y), int(x)) for y, x in np.argwhere(sample.valid)} == set(planted) - {(3, 3)}
    middle = 0.5 ** (1 - 29999 / 65533) * 8 ** (29999 / 65533)
    for at, expected in (((0, 0), 0.5), ((5, 7), 8.0), ((11, 15), middle)):
        assert sample.metres[at] == pytest.approx(expected, rel=1e-6)
    assert sample.intrinsics is not None
    np.testing.assert_allclose(sample.intrinsics, [[14.4, 0, 8], [0, 14.4, 6], [0, 0, 1]])
    assert sample.metric


def test_far_outliers_go_before_the_unit_is_applied(tmp_path: Path) -> None:
    values = np.full(SIZE, 1)
    values[0, 0], values[0, 1] = 65534, 32768  # 4000 and 63 times the nearest
    depth = png16(values, near="2", far="8000", unit="0.5")
    row = moge_row(tmp_path, moge_files(x=instance(depth)))
    sample = open_row(other(row, options={"unit": 0.01})).read(0)
    assert sample.valid is not None
    assert sample.metres is not None
    assert np.argwhere(~sample.valid).tolist() == [[0, 0]]
    assert sample.metres[0, 1] == pytest.approx(0.01 * np.sqrt(8000 * 2) * 0.5, rel=2e-4)
    assert sample.metres[5, 5] == pytest.approx(0.01, rel=1e-6)
    strict = open_row(other(row, options={"drop": 50})).read(0)
    assert strict.valid is not None
    assert (~strict.valid).sum() == 2


def test_an_image_without_known_depth_is_an_error_and_not_a_constant(tmp_path: Path) -> None:
    sky = {(1, 1): 65535}
    files = moge_files(
        x=instance(codes(SIZE, sky, near="1", far="2")),
        y=instance(codes(SIZE, {(1, 1): 5}, near="1", far="2")),
    )
    images = open_row(moge_row(tmp_path, files))
    with pytest.raises(ValueError, match=r"a.b/x/depth.png: no pixel has known depth"):
        images.read(0)
    assert images.read(1).metres is not None


def test_a_prepared_set_that_is_not_as_described_is_refused(tmp_path: Path) -> None:
    good = instance(codes(SIZE, {(1, 1): 5}, near="1", far="2"))
    row = moge_row(tmp_path, moge_files(x=good))
    unpack(tmp_path / "few", moge_files(x=good, y=good))
    (tmp_path / "few/a.b/y/meta.json").unlink()
    with pytest.raises(ValueError, match="a.b/y/meta.json; fetch and unzip the set from hugg"):
        open_row(replace(row, source=str(tmp_path / "few")))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="lacks 1 files: .index.txt; fetch"):
        open_row(replace(row, source=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="size is null, but MoGe's view needs"):
        open_row(replace(row, size=None))
    with pytest.raises(ValueError, match="options are not those of a moge reader: .*'units'"):
        open_row(other(row, options={"units": 2}))
    for members, reason in (
        ({"depth.png": codes(SIZE, {(1, 1): 5})}, "depth.png is damaged .*with near and far"),
        ({"meta.json": b'{"intrinsics": [[0, 1]]}'}, "meta.json is damaged .*must be 3x3"),
        ({"meta.json": b"{}"}, "meta.json is damaged .*KeyError"),
        ({"image.jpg": good["image.jpg"][:99]}, "image.jpg is damaged"),
    ):
        unpack(Path(row.source), moge_files(x=good | members))
        with pytest.raises(ValueError, match=reason):
            open_row(row).read(0)


def test_a_zip_of_a_prepared_set_is_read_in_place(tmp_path: Path) -> None:
    files = moge_files(x=instance(codes(SIZE, {(1, 1): 5}, near="1", far="2")))
    row = moge_row(tmp_path, files)
    packed = str(zipped(tmp_path / "NYUv2.zip", files, "NYUv2/"))
    there = open_row(other(row, source=packed, options={"under": "NYUv2"}))
    here = open_row(row)
    assert there.list_sha256 == here.list_sha256
    np.testing.assert_array_equal(there.read(0).image, here.read(0).image)


@pytest.mark.parametrize("off", [(0.5, 0.5), (0.56, 0.47), (0.42, 0.6)])
def test_depth_of_a_plane_is_that_of_the_turned_camera(off: tuple[float, float]) -> None:
    raw, size = (90, 160), (60, 80)
    k = np.array([[0.8, 0, off[0]], [0, 0.8 * 160 / 90, off[1]], [0, 0, 1]])
    normal, distance = np.array([0.2, -0.1, 1.0]), 4.0  # the points with normal . p = distance

    def plane(inverse: np.ndarray, turned: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        h, w = shape
        u, v = np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h)
        rays = np.stack([u, v, np.ones_like(u)], -1) @ inverse.T
        return distance / (rays @ turned)

    depth = plane(np.linalg.inv(k), normal, raw).astype(np.float32)
    grey = np.zeros((*raw, 3), np.uint8)
    view = reproject(grey, depth, np.ones(raw, bool), k, size)
    turn = turn_ahead(np.linalg.inv(k) @ (0.5, 0.5, 1.0))
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    expected = plane(np.linalg.inv(view.intrinsics), turn @ normal, size)
    assert view.valid.mean() > 0.98
    # A sample is at most about a pixel off: 0.8 % of this plane's depth.
    error = np.abs(view.depth / expected - 1)[view.valid]
    assert error.max() < 0.02
    assert error.mean() < 0.005
    fx, fy = view.intrinsics[0, 0] * size[1], view.intrinsics[1, 1] * size[0]
    assert fx == pytest.approx(fy)  # square pixels
    inside = k @ turn.T @ np.linalg.inv(view.intrinsics)
    corners = np.array([[0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]]) @ inside.T
    corners = corners[:, :2] / corners[:, 2:]
    assert ((corners > -1e-9) & (corners < 1 + 1e-9)).all()
    # The largest view: some corner of it lies on the image's edge.
    assert min(np.abs(corners).min(), np.abs(1 - corners).min()) < 1e-6


def test_resized_depth_is_that_of_the_nearest_measured_pixel_of_a_window() -> None:
    rng = np.random.default_rng(0)
    grids = ((7, 9), (3, 4)), ((12, 8), (12, 5)), ((5, 6), (11, 7)), ((10, 10), (9, 9))
    for shape, size in grids:
        depth = rng.permutation(shape[0] * shape[1]).reshape(shape).astype(np.float32) + 1
        valid = rng.random(shape) < 0.5
        found, covered = nearest_measured(depth, valid, size)
        steps = [max(1.0, a / b) for a, b in zip(shape, size, strict=True)]
        for i, j in np.ndindex(size):
            centre = [(at + 0.5) * a / b for at, a, b in zip((i, j), shape, size, strict=True)]
            first = [round(c - step / 2) for c, step in zip(centre, steps, strict=True)]
            ranges = [range(f, f + int(np.ceil(s))) for f, s in zip(first, steps, strict=True)]
            window = [(y, x) for y in ranges[0] for x in ranges[1]]
            inside = [at for at in window if 0 <= at[0] < shape[0] and 0 <= at[1] < shape[1]]
            near = [at for at in inside if valid[at]]
            assert covered[i, j] == bool(near)
            if near:
                off = [(y + 0.5 - centre[0]) ** 2 + (x + 0.5 - centre[1]) ** 2 for y, x in near]
                assert found[i, j] == depth[near[int(np.argmin(off))]]


def write_mat(folder: Path, raw: dict[int, np.ndarray], scenes: dict[int, str]) -> None:
    """The labelled set of 1449 images, of which most are left out, with the axes of MATLAB."""
    count, (h, w) = max(raw), (480, 640)
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        images = file.create_dataset("images", (count, 3, w, h), np.uint8, chunks=(1, 3, w, h))
        depths = file.create_dataset("rawDepths", (count, w, h), np.float32, chunks=(1, w, h))
        names = file.create_dataset("scenes", (1, count), h5py.ref_dtype)
        for number, values in raw.items():
            images[number - 1] = np.full((3, w, h), number, np.uint8)
            images[number - 1, 1, 2, 5] = 99  # green, column 2, row 5
            depths[number - 1] = values.T
            text = np.array([[ord(letter)] for letter in scenes[number]], np.uint16)
            file[f"#refs#/{number}"] = text
            names[0, number - 1] = file[f"#refs#/{number}"].ref
    test = np.array(sorted(raw), np.uint16)[:, None]
    savemat(folder / "splits.mat", {"testNdxs": test, "trainNdxs": test[:0]})


def test_the_official_nyu_files_give_the_truth_list_and_keys_of_the_archive(tmp_path) -> None:
    rng = np.random.default_rng(0)
    scenes = {1: "kitchen_0004", 2: "kitchen_0004", 9: "office_0005"}
    raw, files = {}, {}
    for number, scene in scenes.items():
        blocks = rng.uniform(0, 11, (48, 64)) * (rng.random((48, 64)) > 0.3)
        raw[number] = blocks.repeat(10, axis=0).repeat(10, axis=1).astype(np.float32)
        millimetres = (raw[number] * 1000).astype(np.uint16)
        files[f"test/{scene}/rgb_{number:04d}.png"] = picture(number, (480, 640))
        files[f"test/{scene}/depth_{number:04d}.png"] = png16(millimetres)
        files[f"test/{scene}/filled_{number:04d}.png"] = b""
    archive = replace(rows("marigold", tmp_path)["NYUv2"], count=3)
    tar(Path(archive.source), files)
    official = replace(rows("nyu_mat", tmp_path)["NYUv2"], count=3)
    write_mat(Path(official.source).parent, raw, scenes)
    expected, found = open_row(archive), open_row(official)
    assert found.list_sha256 == expected.list_sha256
    assert list(found.keys) == list(expected.keys)
    for index, number in enumerate(scenes):
        one, two = expected.read(index), found.read(index)
        assert one.metres is not None
        np.testing.assert_array_equal(two.metres, one.metres)
        np.testing.assert_array_equal(two.valid, one.valid)
        assert two.image[5, 2].tolist() == [number, 99, number]
        assert two.image[2, 5].tolist() == [number] * 3


def test_official_nyu_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    row = rows("nyu_mat", tmp_path)["NYUv2"]
    with pytest.raises(ValueError, match=r"labeled.mat, .*splits.mat is missing; fetch nyu_depth"):
        open_row(row)
    folder = Path(row.source).parent
    write_mat(folder, {1: np.ones((480, 640), np.float32)}, {1: "den_0001"})
    with pytest.raises(ValueError, match="has 1 images, but the set has 654; fetch"):
        open_row(row)
    with h5py.File(row.source, "r+") as file:
        del file["rawDepths"]
    with pytest.raises(ValueError, match=r"image 1 is damaged .*no array 'rawDepths', only \['#re"):
        open_row(replace(row, count=1)).read(0)
    Path(row.source).write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(ValueError, match=r"is damaged \(OSError"):
        open_row(row)


def test_spring_depth_is_focal_times_baseline_over_every_second_disparity(tmp_path: Path) -> None:
    row, files = rows("scale", tmp_path)["Spring"], {}
    for scene, frame, focal in (("0002", 2, 2000.0), ("0001", 1, 1000.0)):
        disparity = np.full((8, 12), 777.0, np.float32)
        disparity[::2, ::2] = 0  # sky
        disparity[2, 4], disparity[4, 0], disparity[6, 6] = 6.5, 13, np.nan
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file.create_dataset("disparity", data=disparity, compression="gzip")
        files |= {
            f"{scene}/frame_left/frame_left_{frame:04d}.png": picture(1, (4, 6)),
            f"{scene}/frame_right/frame_right_{frame:04d}.png": b"not looked at",
            f"{scene}/disp1_left/disp1_left_{frame:04d}.dsp5": buffer.getvalue(),
            f"{scene}/cam_data/intrinsics.txt": f"5 5 9 9\n{focal} {focal} 3 2\n".encode()
            if frame == 2
            else f"{focal} {focal} 3 2\n".encode(),
        }
    unpack(Path(row.source), files)
    images = open_row(row)
    assert list(images.keys) == [
        "0001_frame_left_frame_left_0001",
        "0002_frame_left_frame_left_0002",
    ]
    for index, focal in enumerate((1000, 2000)):
        sample = images.read(index)
        assert sample.valid is not None
        assert sample.metres is not None
        assert np.argwhere(sample.valid).tolist() == [[1, 2], [2, 0]]
        assert sample.metres[1, 2] == pytest.approx(focal * 0.065 / 6.5, rel=1e-6)
        assert sample.metres[2, 0] == pytest.approx(focal * 0.065 / 13, rel=1e-6)
        assert not sample.metric
    (Path(row.source) / "0001/cam_data/intrinsics.txt").unlink()
    with pytest.raises(ValueError, match="lacks 1 files: 0001/cam_data/intrinsics.txt; fetch"):
        open_row(row)
