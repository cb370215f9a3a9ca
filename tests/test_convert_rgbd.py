"""NYUv2, ScanNet, ARKitScenes: miniature trees in the published layouts, with planted depth.

The writers here know the formats from their publishers' documents, not from the converters.
"""

import io
import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mofo.data import sens
from mofo.data.convert import arkitscenes, nyuv2, scannet
from mofo.data.sample import Sample, decode_image
from mofo.geometry import unproject


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=kind)
    return buffer.getvalue()


def only(samples) -> Sample:
    (sample,) = samples
    sample.check()
    return sample


# NYUv2.

NYU_DEPTHS = {(100, 200): 1.2345, (479, 639): 9.75, (0, 0): 0.71}  # (row, column)


def write_nyu(folder: Path, frames: int = 3) -> np.ndarray:
    """The labelled file as MATLAB writes it, (row, column, ..., frame), and the pictures in it."""
    images = np.zeros((480, 640, 3, frames), np.uint8)
    images[:48] = np.stack([noise(48, 640, seed) for seed in range(frames)], axis=-1)
    raw = np.zeros((480, 640, frames), np.float32)
    for (row, column), metres in NYU_DEPTHS.items():
        raw[row, column, 1] = metres
    raw[7, 8, :2] = 10.0  # clamped by the toolbox
    raw[5, 5, 2] = 3.0
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        # HDF5 sees MATLAB's columns-first arrays with their axes reversed.
        file["images"] = images.T
        file["rawDepths"] = raw.T
        file["depths"] = np.full(raw.T.shape, 5, np.float32)
    splits = {
        "trainNdxs": np.array([[2], [3]], np.uint16),
        "testNdxs": np.array([[1]], np.uint16),
    }
    savemat(folder / "splits.mat", splits)
    return images


def test_nyu_gives_the_raw_depth_of_each_picture_and_nothing_else(tmp_path: Path) -> None:
    images = write_nyu(tmp_path)
    items = nyuv2.find(tmp_path)
    assert [item.number for item in items] == [2, 3]
    sample = only(nyuv2.read(items[0]))
    np.testing.assert_array_equal(sample.image, images[..., 1])
    assert {tuple(at) for at in np.argwhere(sample.valid)} == set(NYU_DEPTHS)
    for at, metres in NYU_DEPTHS.items():
        assert sample.metres[at] == np.float32(metres)
    assert sample.key == "nyuv2_0002"
    assert sample.metric


def test_nyu_unprojects_as_its_toolbox_does(tmp_path: Path) -> None:
    write_nyu(tmp_path)
    sample = only(nyuv2.read(nyuv2.find(tmp_path)[0]))
    points = unproject(sample.metres, sample.intrinsics)
    for (row, column), metres in NYU_DEPTHS.items():
        # rgb_plane2rgb_world.m: meshgrid(1:640, 1:480)
        x = (column + 1 - 325.58244941119034) * metres / 518.85790117450188
        y = (row + 1 - 253.73616633400465) * metres / 519.46961112127485
        np.testing.assert_allclose(points[row, column], (x, y, metres), rtol=1e-6)


def test_nyu_splits_and_frames_without_depth(tmp_path: Path) -> None:
    write_nyu(tmp_path)
    (test,) = nyuv2.find(tmp_path, split="test")
    assert test.number == 1
    assert not list(nyuv2.read(test))  # all of it clamped
    assert len(nyuv2.find(tmp_path, split="all")) == 3
    with pytest.raises(ValueError, match="split is 'val'.*train.*test.*all"):
        nyuv2.find(tmp_path, split="val")
    (tmp_path / "splits.mat").unlink()
    assert len(nyuv2.find(tmp_path, split="all")) == 3
    with pytest.raises(ValueError, match="splits.mat"):
        nyuv2.find(tmp_path)
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["depths"] = np.zeros(3)
    with pytest.raises(ValueError, match="no array 'images'; it has .'depths'"):
        nyuv2.find(tmp_path, split="all")


# ScanNet. Colour 40x30, depth 64x48: coarser than depth, so that depths compete for a pixel.

COLOUR = np.array([[36.5, 0, 20.2], [0, 36.9, 14.6], [0, 0, 1]])
DEPTH = np.array([[57.8, 0, 31.5], [0, 57.8, 23.5], [0, 0, 1]])
SAME = np.eye(4)


def four(matrix: np.ndarray) -> bytes:
    whole = np.eye(4)
    whole[: len(matrix), : len(matrix)] = matrix
    return whole.astype("<f4").tobytes()


def write_sens(
    path: Path,
    codes: list[np.ndarray],
    *,
    moved: np.ndarray = SAME,
    version: int = 4,
    frames: int | None = None,
    compression: int = 1,
) -> list[bytes]:
    """A stream as SensorData.py reads one; returns the JPEGs in it."""
    jpegs = [encoded(noise(30, 40, seed), "JPEG") for seed in range(len(codes))]
    parts = [struct.pack("<I", version), struct.pack("<Q", 15), b"StructureSensor"]
    parts += [four(COLOUR), four(np.eye(4)), four(DEPTH), four(moved)]
    parts += [struct.pack("<i", 2), struct.pack("<i", compression)]
    parts += [struct.pack("<I", side) for side in (40, 30, 64, 48)]
    parts += [struct.pack("<f", 1000.0)]
    parts += [struct.pack("<Q", len(codes) if frames is None else frames)]
    for jpeg, each in zip(jpegs, codes, strict=True):
        raw = each.astype("<u2").tobytes()
        depth = zlib.compress(raw) if compression == 1 else raw
        parts += [four(np.eye(4)), struct.pack("<QQ", 0, 0)]
        parts += [struct.pack("<Q", len(jpeg)), struct.pack("<Q", len(depth)), jpeg, depth]
    parts += [struct.pack("<Q", 0)]  # no motion readings
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(parts))
    return jpegs


def planted(seed: int, count: int = 400) -> np.ndarray:
    rng = np.random.default_rng(seed)
    codes = np.zeros(48 * 64, np.uint16)
    codes[rng.choice(codes.size, count, replace=False)] = rng.integers(400, 9000, count)
    return codes.reshape(48, 64)


def seen(codes: np.ndarray, moved: np.ndarray) -> dict[tuple[int, int], float]:
    """By colour pixel the nearest depth, one depth pixel after the other."""
    k_colour, k_depth = COLOUR.astype(np.float32), DEPTH.astype(np.float32)
    nearest: dict[tuple[int, int], float] = {}
    for row, column in np.argwhere(codes):
        z = codes[row, column] / 1000
        x = (column - float(k_depth[0, 2])) / float(k_depth[0, 0]) * z
        y = (row - float(k_depth[1, 2])) / float(k_depth[1, 1]) * z
        x, y, z = (moved @ (x, y, z, 1))[:3]
        u = round(x / z * float(k_colour[0, 0]) + float(k_colour[0, 2]))
        v = round(y / z * float(k_colour[1, 1]) + float(k_colour[1, 2]))
        if 0 <= u < 40 and 0 <= v < 30:
            nearest[v, u] = min(z, nearest.get((v, u), np.inf))
    return nearest


def beside() -> np.ndarray:
    """A depth camera 5 cm to the side, turned by a degree."""
    a = np.radians(1.0)
    turn = [[np.cos(a), 0, np.sin(a), 0.05], [0, 1, 0, -0.01], [-np.sin(a), 0, np.cos(a), 0.002]]
    return np.array([*turn, [0, 0, 0, 1]], np.float32).astype(np.float64)


@pytest.mark.parametrize("moved", [SAME, beside()], ids=["one camera", "two cameras"])
def test_scannet_puts_each_depth_where_the_colour_camera_sees_it(
    tmp_path: Path, moved: np.ndarray
) -> None:
    codes = [planted(1), np.zeros((48, 64)), planted(2)]
    path = tmp_path / "scans" / "scene0012_03" / "scene0012_03.sens"
    jpegs = write_sens(path, codes, moved=moved)
    items = scannet.find(tmp_path)
    samples = [list(scannet.read(item)) for item in items]
    assert [len(each) for each in samples] == [1, 0, 1]  # the second has no depth
    for index in (0, 2):
        sample = only(samples[index])
        expected = seen(codes[index], moved)
        assert {tuple(at) for at in np.argwhere(sample.valid)} == set(expected)
        assert len(expected) < np.count_nonzero(codes[index])  # some competed
        for at, z in expected.items():
            assert sample.metres[at] == np.float32(z)
        assert sample.key == f"scene0012_03_{index:06d}"
        assert sample.image_bytes == jpegs[index]
        np.testing.assert_array_equal(sample.image, decode_image(jpegs[index]))
        assert sample.depth_scale == (0.001 if moved is SAME else None)
        assert sample.intrinsics[0, 2] == np.float32(20.2) + 0.5
        assert sample.intrinsics[1, 1] == np.float32(36.9)


def test_scannet_takes_each_nth_frame_and_reads_raw_depth(tmp_path: Path) -> None:
    codes = [planted(seed) for seed in range(5)]
    write_sens(tmp_path / "scene0000_00.sens", codes, compression=0)
    items = scannet.find(tmp_path, every=2)
    assert [item.index for item in items] == [0, 2, 4]
    assert only(scannet.read(items[1])).valid.sum() == len(seen(codes[2], SAME))
    with pytest.raises(ValueError, match="every is 0"):
        scannet.find(tmp_path, every=0)


def test_a_cut_stream_gives_the_frames_before_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "scene0000_00.sens"
    write_sens(path, [planted(1), planted(2)])
    path.write_bytes(path.read_bytes()[:-20])
    first, second = scannet.find(tmp_path)
    assert only(scannet.read(first)).valid.any()
    with pytest.raises(ValueError, match="frame 1 of 2 is missing.*download it again"):
        list(scannet.read(second))


def test_a_damaged_stream_is_refused_before_it_costs_memory(tmp_path: Path) -> None:
    path = tmp_path / "scene0000_00.sens"
    write_sens(path, [planted(1)], frames=2**62)
    with pytest.raises(ValueError, match="frames do not fit"):
        scannet.find(tmp_path)
    write_sens(path, [planted(1)], version=3)
    with pytest.raises(ValueError, match="version 3"):
        scannet.find(tmp_path)
    write_sens(path, [planted(1)], compression=2)
    with pytest.raises(ValueError, match="depth by 2"):
        scannet.find(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="ends within its header"):
        scannet.find(tmp_path)
    bomb = tmp_path / "bomb.sens"
    write_sens(bomb, [np.zeros((4800, 640))])  # a hundred times too much
    with pytest.raises(ValueError, match="not 64x48"):
        sens.read_frame(bomb, 0)


# ARKitScenes.

FX, FY, CX, CY = 26.3, 26.9, 15.4, 11.1
NAME = "41069021_305.244"


def write_arkit(
    video: Path,
    *,
    wide: str = "lowres_wide",
    depth: str = "lowres_depth",
    size: tuple[int, int] = (24, 32),
    camera: str | None = NAME,
    confidence: bool = False,
    names: tuple[str, ...] = (NAME,),
) -> np.ndarray:
    """One video; two depths, the second at a pixel of low confidence; returns the picture."""
    for folder in (wide, depth, f"{wide}_intrinsics", "confidence"):
        (video / folder).mkdir(parents=True, exist_ok=True)
    picture = noise(*size)
    codes = np.zeros(size, np.uint16)
    codes[2, 30], codes[15, 9] = 1234, 4321
    sure = np.full(size, 2, np.uint8)
    sure[15, 9] = 1
    for name in names:
        Image.fromarray(picture).save(video / wide / f"{name}.png")
        Image.fromarray(codes).save(video / depth / f"{name}.png")
        if confidence:
            Image.fromarray(sure).save(video / "confidence" / f"{name}.png")
    if camera:
        text = f"{size[1]} {size[0]} {FX} {FY} {CX} {CY}"
        (video / f"{wide}_intrinsics" / f"{camera}.pincam").write_text(text)
    return picture


def write_skies(source: Path, sky: str, video: str = "41069021") -> None:
    source.mkdir(parents=True, exist_ok=True)
    (source / "metadata.csv").write_text(
        f"video_id,visit_id,fold,sky_direction,is_in_upsampling\n{video},42,Training,{sky},True\n"
    )


# Where x (right) and y (down) of the sensor point once the sky is up.
UPRIGHT = {
    "Up": lambda x, y: (x, y),
    "Left": lambda x, y: (-y, x),
    "Right": lambda x, y: (y, -x),
    "Down": lambda x, y: (-x, -y),
}


@pytest.mark.parametrize("sky", list(UPRIGHT))
def test_arkit_frames_are_turned_upright_with_depth_and_camera(tmp_path: Path, sky: str) -> None:
    picture = write_arkit(tmp_path / "Training" / "41069021")
    write_skies(tmp_path, sky)
    (item,) = arkitscenes.find(tmp_path)
    sample = only(arkitscenes.read(item))
    assert sample.key == "41069021_305_244"
    assert sample.valid.sum() == 2
    points = unproject(sample.metres, sample.intrinsics)
    for row, column, metres in ((2, 30, 1.234), (15, 9, 4.321)):
        (at,) = np.argwhere((sample.image == picture[row, column]).all(axis=-1))
        assert sample.metres[tuple(at)] == np.float32(metres)
        x, y = (column - CX) / FX * metres, (row - CY) / FY * metres
        expected = (*UPRIGHT[sky](x, y), metres)
        np.testing.assert_allclose(points[tuple(at)], expected, rtol=1e-6, atol=1e-9)
    published = item.image.read_bytes()
    assert sample.image_bytes == (published if sky == "Up" else None)
    assert sorted(sample.image.reshape(-1, 3).tolist()) == sorted(picture.reshape(-1, 3).tolist())


def test_arkit_keeps_what_the_tablet_is_sure_of(tmp_path: Path) -> None:
    write_arkit(tmp_path / "Validation" / "41069021", confidence=True)
    write_skies(tmp_path, "Up")
    sample = only(arkitscenes.read(arkitscenes.find(tmp_path)[0]))
    assert np.argwhere(sample.valid).tolist() == [[2, 30]]


def test_arkit_reads_its_three_sets(tmp_path: Path) -> None:
    threedod, upsampling = tmp_path / "3dod", tmp_path / "upsampling"
    write_arkit(threedod / "Training" / "41069021" / "41069021_frames")
    write_skies(threedod, "Up")
    assert only(arkitscenes.read(arkitscenes.find(threedod)[0])).intrinsics is not None
    write_arkit(
        upsampling / "Training" / "41069021",
        wide="wide",
        depth="highres_depth",
        size=(36, 48),
        camera=None,
        confidence=True,  # of the tablet's depth, not of the scanner's
    )
    write_skies(upsampling, "Left")
    sample = only(arkitscenes.read(arkitscenes.find(upsampling, highres=True)[0]))
    assert sample.image.shape == (48, 36, 3)
    assert sample.valid.sum() == 2
    assert sample.intrinsics is None
    with pytest.raises(ValueError, match="no pair of picture and depth(.|\n)*highres_depth"):
        arkitscenes.find(threedod, highres=True)


def test_arkit_pairs_by_name_and_forgives_a_camera_a_millisecond(tmp_path: Path) -> None:
    video = tmp_path / "Training" / "41069021"
    names = ("41069021_99.983", "41069021_100.000", "41069021_100.016")
    write_arkit(video, names=names, camera="41069021_99.999")
    write_skies(tmp_path, "Up")
    (video / "lowres_depth" / "41069021_100.016.png").unlink()
    first, second = arkitscenes.find(tmp_path)
    assert (first.image.stem, second.image.stem) == names[:2]
    assert first.camera is None
    assert second.camera is not None
    assert arkitscenes.find(tmp_path, every=2) == [first]


def test_arkit_says_what_is_missing(tmp_path: Path) -> None:
    video = tmp_path / "Training" / "41069021"
    write_arkit(video)
    with pytest.raises(ValueError, match="metadata.csv is missing"):
        arkitscenes.find(tmp_path)
    write_skies(tmp_path, "Up", video="40000000")
    with pytest.raises(ValueError, match="video 41069021 is None.*Up.*look at the video"):
        arkitscenes.find(tmp_path)
    write_skies(tmp_path, "Up")
    camera = video / "lowres_wide_intrinsics" / f"{NAME}.pincam"
    camera.write_text(f"640 480 {FX} {FY} {CX} {CY}")
    with pytest.raises(ValueError, match="is for 640x480, but the picture is 32x24"):
        list(arkitscenes.read(arkitscenes.find(tmp_path)[0]))


@pytest.mark.parametrize("converter", [nyuv2, scannet, arkitscenes])
def test_an_empty_folder_is_refused_with_the_expected_tree(tmp_path: Path, converter) -> None:
    write_skies(tmp_path, "Up")
    with pytest.raises(ValueError, match="expected\n  SOURCE/"):
        converter.find(tmp_path)
