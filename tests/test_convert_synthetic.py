"""Hypersim, Virtual KITTI 2, TartanAir: miniature trees in the published layouts, planted depth.

The writers here know the formats from their publishers' documents, not from the converters.
"""

import csv
import io
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from mofo.data.convert import hypersim, tartanair, vkitti2
from mofo.data.sample import Sample
from mofo.geometry import unproject


def encoded(height: int, width: int, kind: str, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (seed, 100, 200)).save(buffer, format=kind)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


def only(samples) -> Sample:
    (sample,) = samples
    sample.check()
    return sample


# Hypersim. Two rows of metadata_camera_parameters.csv: the usual camera, and one that is tilted
# about both axes and shifted.

MATRICES = {
    "ai_001_001": (0.5773502886169104, 0, 0, 0, 0.4330127164626828, 0, 0, 0, -1.0),
    "ai_042_003": (
        *(0.5813867895573526, 0.0, -0.0, 0.0, 0.44599980827670044, -0.01189332795487541),
        *(-0.1337189640239258, 0.03567998386462623, -1.0244455108528754),
    ),
}
H, W = 48, 64


def write_cameras(folder: Path, matrices=MATRICES) -> None:
    names = [f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3)]
    with open(folder / "metadata_camera_parameters.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["scene_name", "settings_output_img_width", *names, "M_proj_00"])
        for scene, matrix in matrices.items():
            writer.writerow([scene, 1024.0, *map(repr, map(float, matrix)), 1.7])


def write_hypersim(folder: Path, scene: str, distance: np.ndarray) -> bytes:
    images = folder / scene / "images"
    geometry = images / "scene_cam_00_geometry_hdf5"
    geometry.mkdir(parents=True)
    with h5py.File(geometry / "frame.0007.depth_meters.hdf5", "w") as file:
        file["dataset"] = distance
    jpeg = encoded(H, W, "JPEG")
    return write(images / "scene_cam_00_final_preview" / "frame.0007.tonemap.jpg", jpeg)


def hit(scene: str, row: int, column: int, distance: float) -> np.ndarray:
    """The point, in Hypersim's camera, that the centre of a pixel sees at a distance."""
    u = -1 + (column + 0.5) * 2 / W
    v = 1 - (row + 0.5) * 2 / H
    ray = np.array(MATRICES[scene]).reshape(3, 3) @ (u, v, 1)
    return ray / np.linalg.norm(ray) * distance


PIXELS = [(0, 0, 2.5), (47, 63, 3.25), (24, 10, 7.0), (5, 50, 1.125)]  # row, column, distance


def planted_distance() -> np.ndarray:
    distance = np.full((H, W), np.nan)
    for row, column, metres in PIXELS:
        distance[row, column] = metres
    return distance.astype(np.float32)


def test_hypersim_turns_distance_into_depth(tmp_path: Path) -> None:
    write_cameras(tmp_path)
    jpeg = write_hypersim(tmp_path, "ai_001_001", planted_distance())
    (item,) = hypersim.find(tmp_path)
    sample = only(hypersim.read(item))
    assert sample.key == "ai_001_001_cam_00_0007"
    assert sample.image_bytes == jpeg
    assert {tuple(at) for at in np.argwhere(sample.valid)} == {pixel[:2] for pixel in PIXELS}
    points = unproject(sample.metres, sample.intrinsics)
    for row, column, distance in PIXELS:
        x, y, z = hit("ai_001_001", row, column, distance)
        np.testing.assert_allclose(sample.metres[row, column], -z, rtol=1e-7)
        np.testing.assert_allclose(points[row, column], (x, -y, -z), rtol=1e-6)
    focal = 886.81 * W / 1024
    expected = [[focal, 0, W / 2], [0, focal, H / 2], [0, 0, 1]]
    np.testing.assert_allclose(sample.intrinsics, expected, rtol=1e-5, atol=1e-9)


def test_hypersim_tilted_lenses_keep_every_length_and_angle(tmp_path: Path) -> None:
    write_cameras(tmp_path)
    write_hypersim(tmp_path, "ai_042_003", planted_distance())
    sample = only(hypersim.read(hypersim.find(tmp_path)[0]))
    points = unproject(sample.metres, sample.intrinsics)
    ours = np.array([points[row, column] for row, column, _ in PIXELS])
    theirs = np.array([hit("ai_042_003", *pixel) for pixel in PIXELS]) * (1, -1, -1)
    # The same scene from the same place: a rotation apart, and not by nothing.
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, rtol=1e-6)
    assert np.linalg.det(ours[:3]) * np.linalg.det(theirs[:3]) > 0
    assert np.abs(ours - theirs).max() > 0.1


def test_hypersim_leaves_out_halves_and_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metadata_camera_parameters.csv is missing.*contrib"):
        hypersim.find(tmp_path)
    write_cameras(tmp_path)
    with pytest.raises(ValueError, match="expected\n  SOURCE/"):
        hypersim.find(tmp_path)
    write_hypersim(tmp_path, "ai_001_001", np.full((H, W), np.nan))
    preview = tmp_path / "ai_001_001" / "images" / "scene_cam_00_final_preview"
    write(preview / "frame.0008.tonemap.jpg", encoded(H, W, "JPEG"))
    (item,) = hypersim.find(tmp_path)
    assert not list(hypersim.read(item))  # nothing was hit
    write_cameras(tmp_path, {})
    with pytest.raises(ValueError, match="no scene ai_001_001"):
        hypersim.find(tmp_path)
    (tmp_path / "metadata_camera_parameters.csv").write_text("scene_name\n")
    with pytest.raises(ValueError, match="no column .*M_cam_from_uv_00"):
        hypersim.find(tmp_path)


# Virtual KITTI 2.


def write_vkitti(folder: Path, codes: np.ndarray) -> dict[str, bytes]:
    """Two cameras, one frame; the second camera is another, to tell rows apart."""
    weather = folder / "Scene01" / "15-deg-left"
    write(
        weather / "intrinsic.txt",
        b"frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]\n"
        b"0 0 725.0087 725.0087 620.5 187\n0 1 700.5 701.5 620.5 187\n"
        b"3 0 725.0087 725.0087 620.5 187\n3 1 711.5 712.5 610.5 180\n",
    )
    jpegs = {}
    for camera in (0, 1):
        buffer = io.BytesIO()
        Image.fromarray(codes).save(buffer, format="PNG")
        frames = weather / "frames"
        write(frames / "depth" / f"Camera_{camera}" / "depth_00003.png", buffer.getvalue())
        jpeg = encoded(*codes.shape, "JPEG", seed=camera)
        jpegs[f"Scene01_15-deg-left_Camera_{camera}_00003"] = jpeg
        write(frames / "rgb" / f"Camera_{camera}" / "rgb_00003.jpg", jpeg)
    return jpegs


def test_vkitti_reads_centimetres_and_sets_the_sky_apart(tmp_path: Path) -> None:
    codes = np.full((40, 120), 65535, np.uint16)
    codes[30, 100], codes[39, 0], codes[20, 20] = 1234, 65534, 0
    jpegs = write_vkitti(tmp_path, codes)
    samples = [only(vkitti2.read(item)) for item in vkitti2.find(tmp_path)]
    assert {sample.key: sample.image_bytes for sample in samples} == jpegs
    sample = samples[1]
    assert np.argwhere(sample.valid).tolist() == [[30, 100], [39, 0]]
    assert sample.metres[30, 100] == np.float32(12.34)
    assert sample.metres[39, 0] == np.float32(655.34)
    np.testing.assert_array_equal(sample.sky, codes == 65535)
    assert not sample.sky[20, 20]
    # Row "3 1", its pixels counted from 0.
    x, y, z = unproject(sample.metres, sample.intrinsics)[30, 100]
    assert z == np.float32(12.34)
    np.testing.assert_allclose(x, (100 - 610.5) / 711.5 * 12.34, rtol=1e-6)
    np.testing.assert_allclose(y, (30 - 180) / 712.5 * 12.34, rtol=1e-6)


def test_the_axis_of_vkitti_meets_the_middle_of_the_picture(tmp_path: Path) -> None:
    write_vkitti(tmp_path, np.full((375, 1242), 100, np.uint16))
    first = only(vkitti2.read(vkitti2.find(tmp_path)[0]))
    assert first.intrinsics[:2, 2].tolist() == [1242 / 2, 375 / 2]


def test_vkitti_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected\n  SOURCE/"):
        vkitti2.find(tmp_path)
    write_vkitti(tmp_path, np.full((4, 4), 65535, np.uint16))
    assert not list(vkitti2.read(vkitti2.find(tmp_path)[0]))  # all sky
    weather = tmp_path / "Scene01" / "15-deg-left"
    (weather / "frames" / "depth" / "Camera_0" / "depth_00003.png").unlink()
    assert [item.key[-7:] for item in vkitti2.find(tmp_path)] == ["1_00003"]
    (weather / "intrinsic.txt").write_text("frame cameraID\n0 0 1 1 1 1\n")
    with pytest.raises(ValueError, match=r"no frame, camera \(3, 1\)"):
        vkitti2.find(tmp_path)
    (weather / "intrinsic.txt").unlink()
    with pytest.raises(ValueError, match="intrinsic.txt is missing; unpack .*textgt"):
        vkitti2.find(tmp_path)


# TartanAir.


def write_tartan(folder: Path, depth: np.ndarray) -> dict[str, bytes]:
    flight = folder / "abandonedfactory" / "Easy" / "P001"
    pngs = {}
    for seed, side in enumerate(("left", "right")):
        buffer = io.BytesIO()
        np.save(buffer, depth + np.float32(seed))
        write(flight / f"depth_{side}" / f"000042_{side}_depth.npy", buffer.getvalue())
        png = encoded(480, 640, "PNG", seed)
        write(flight / f"image_{side}" / f"000042_{side}.png", png)
        pngs[f"abandonedfactory_Easy_P001_000042_{side}"] = png
    return pngs


def test_tartanair_reads_both_eyes_and_sets_the_sky_apart(tmp_path: Path) -> None:
    depth = np.full((480, 640), 10000, np.float32)
    depth[100, 0], depth[470, 639], depth[0, 0] = 12.3456, 998.5, np.nan
    pngs = write_tartan(tmp_path, depth)
    left, right = (only(tartanair.read(item)) for item in tartanair.find(tmp_path))
    assert {sample.key: sample.image_bytes for sample in (left, right)} == pngs
    assert np.argwhere(left.valid).tolist() == [[100, 0], [470, 639]]
    assert left.metres[100, 0] == np.float32(12.3456)
    assert left.metres[470, 639] == np.float32(998.5)
    assert right.metres[100, 0] == np.float32(12.3456) + np.float32(1)
    np.testing.assert_array_equal(left.sky, depth == 10000)
    # 90 degrees from edge to edge: half a pixel further out, x would equal z.
    x, _, z = unproject(left.metres, left.intrinsics)[100, 0]
    np.testing.assert_allclose(x, -z * 319.5 / 320)


def test_tartanair_never_unpickles(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected\n  SOURCE/"):
        tartanair.find(tmp_path)
    write_tartan(tmp_path, np.ones((480, 640), np.float32))
    item = tartanair.find(tmp_path)[0]
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for data in (buffer.getvalue(), pickle.dumps(np.ones(3))):
        item.depth.write_bytes(data)
        with pytest.raises(ValueError, match="pickle"):
            list(tartanair.read(item))


def test_tartanair_refuses_pictures_of_another_camera(tmp_path: Path) -> None:
    write_tartan(tmp_path, np.ones((480, 640), np.float32))
    item = tartanair.find(tmp_path)[0]
    item.image.write_bytes(encoded(640, 640, "PNG"))
    with pytest.raises(ValueError, match="published intrinsics are those of"):
        list(tartanair.read(item))
