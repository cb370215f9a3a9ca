"""Unprojection, the cloud's orientation, and what is written to disk."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import trimesh

from mofo import geometry
from mofo.geometry import Cloud, intrinsics_from_fov, on_edge, point_cloud, save_cloud, unproject


def test_default_field_of_view_is_65_degrees_vertical() -> None:
    k = intrinsics_from_fov(48, 64)
    assert 2 * np.degrees(np.arctan(24 / k[1, 1])) == pytest.approx(65)
    assert k[0, 0] == k[1, 1]
    assert (k[0, 2], k[1, 2]) == (32, 24)


@pytest.mark.parametrize("fov", [0.0, 180.0, -3.0])
def test_impossible_field_of_view_is_refused(fov) -> None:
    with pytest.raises(ValueError, match="between 0 and 180"):
        intrinsics_from_fov(4, 4, fov)


def test_projecting_unprojected_points_returns_pixel_centres_and_depth() -> None:
    depth = np.random.default_rng(0).uniform(1, 5, (6, 8))
    k = np.array([[7.0, 0, 3.2], [0, 9.0, 2.5], [0, 0, 1]])
    projected = unproject(depth, k) @ k.T
    assert np.allclose(projected[..., 2], depth)
    v, u = np.indices(depth.shape) + 0.5
    assert np.allclose(projected[..., 0] / depth, u)
    assert np.allclose(projected[..., 1] / depth, v)


def test_cloud_has_y_up_looks_down_minus_z_and_is_median_centred() -> None:
    depth = np.full((4, 6), 2.0)
    depth[:, 3:] = 2.06
    image = np.zeros((4, 6, 3), np.uint8)
    image[0] = 255  # the top row is white
    image[:, 3:, 2] = 200  # the far half is blue
    points, colours = point_cloud(depth, image, intrinsics_from_fov(4, 6))
    white, blue = colours[:, 0] == 255, colours[:, 2] == 200
    assert points[white, 1].min() > points[~white, 1].max()
    assert points[blue, 2].max() < points[colours[:, 2] == 0, 2].min()
    assert np.allclose(np.median(points, axis=0), 0, atol=1e-6)


def test_pixels_beside_a_depth_step_are_dropped() -> None:
    depth = np.ones((5, 6))
    depth[:, 3:] = 1.05
    edge = on_edge(depth, np.ones((5, 6), bool))
    assert (edge == np.isin(np.arange(6), [2, 3])).all()
    depth[:, 3:] = 1.039
    assert not on_edge(depth, np.ones((5, 6), bool)).any()


def test_the_edge_threshold_is_a_choice_and_zero_keeps_all() -> None:
    depth, image = np.ones((5, 6)), np.zeros((5, 6, 3), np.uint8)
    depth[:, 3:] = 1.05
    for edge_rtol, count in ((geometry.EDGE, 20), (0.051, 30), (0.01, 20), (0.0, 30)):
        cloud = point_cloud(depth, image, np.eye(3), edge_rtol=edge_rtol)
        assert len(cloud.points) == count
    assert len(point_cloud(depth, image, np.eye(3)).points) == 20


@pytest.mark.parametrize("edge_rtol", [-0.1, np.nan, np.inf])
def test_an_impossible_edge_threshold_is_refused(edge_rtol: float) -> None:
    with pytest.raises(ValueError, match="edge_rtol is .* 0 keeps edges"):
        point_cloud(np.ones((4, 4)), np.zeros((4, 4, 3), np.uint8), np.eye(3), edge_rtol=edge_rtol)


def test_depth_that_is_all_edges_says_what_keeps_them() -> None:
    depth = np.indices((6, 6)).sum(0) % 2 + 1.0
    with pytest.raises(ValueError, match="no point is left of 36 pixels.*pass 0 to keep them"):
        point_cloud(depth, np.zeros((6, 6, 3), np.uint8), np.eye(3))


def test_invalid_depth_neither_makes_points_nor_edges() -> None:
    depth = np.full((5, 5), 3.0)
    depth[2, 2], depth[0, 0], depth[4, 4] = np.nan, 0.0, 50.0
    valid = np.ones((5, 5), bool)
    valid[4, 4] = False
    image = np.zeros((5, 5, 3), np.uint8)
    assert len(point_cloud(depth, image, intrinsics_from_fov(5, 5), valid).points) == 22


def test_no_depth_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pixel has depth"):
        point_cloud(np.zeros((4, 4)), np.zeros((4, 4, 3), np.uint8), np.eye(3))


def test_cloud_is_thinned_evenly(monkeypatch) -> None:
    monkeypatch.setattr(geometry, "MAX_POINTS", 100)
    cloud = point_cloud(np.ones((20, 20)), np.zeros((20, 20, 3), np.uint8), np.eye(3))
    assert len(cloud.points) == 100


def test_a_lone_far_point_is_an_outlier() -> None:
    points = np.random.default_rng(0).normal(size=(200, 3))
    points[7] = 30.0
    assert geometry.outliers(points)[7]
    assert geometry.outliers(points).mean() < 0.2


def as_a_viewer_shows(path: Path) -> Cloud:
    """The points and colours of a file; a .glb's light is encoded as glTF tells a viewer to."""
    loaded = trimesh.load(path).dump()[0] if path.suffix == ".glb" else trimesh.load(path)
    colours = np.asarray(loaded.colors)[:, :3]
    if path.suffix == ".glb":
        light = colours / 255
        code = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
        colours = np.rint(255 * code).astype(np.uint8)
    return Cloud(np.asarray(loaded.vertices, np.float32), colours)


def glb_parts(path: Path) -> tuple[dict, bytes]:
    """The JSON and the binary chunk, cut by hand."""
    content = path.read_bytes()
    magic, version, total, length, kind = struct.unpack("<4sIII4s", content[:20])
    assert (magic, version, total, kind) == (b"glTF", 2, len(content), b"JSON")
    return json.loads(content[20 : 20 + length]), content[20 + length + 8 :]


@pytest.mark.parametrize("suffix", [".ply", ".glb"])
def test_points_and_colours_read_back(tmp_path, suffix) -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(50, 3)).astype(np.float32)
    colours = rng.integers(0, 256, (50, 3), dtype=np.uint8)
    save_cloud(points, colours, tmp_path / f"cloud{suffix}")
    back = as_a_viewer_shows(tmp_path / f"cloud{suffix}")
    assert np.allclose(back.points, points, atol=1e-6)
    lost = np.abs(back.colours.astype(int) - colours)
    assert lost.max() <= (0 if suffix == ".ply" else 6)
    assert lost[colours > 64].max() <= (0 if suffix == ".ply" else 1)
    assert [file.name for file in tmp_path.iterdir()] == [f"cloud{suffix}"]


def test_a_glb_holds_points_with_colours_as_linear_light(tmp_path) -> None:
    points = np.arange(12, dtype=np.float32).reshape(4, 3)
    colours = np.array([[255, 0, 0], [188, 188, 188], [0, 0, 255], [118, 0, 0]], np.uint8)
    save_cloud(points, colours, tmp_path / "cloud.glb")
    tree, binary = glb_parts(tmp_path / "cloud.glb")
    (primitive,) = (one for mesh in tree["meshes"] for one in mesh["primitives"])
    assert primitive["mode"] == 0  # POINTS
    where, colour = (tree["accessors"][primitive["attributes"][n]] for n in ("POSITION", "COLOR_0"))
    assert (where["componentType"], where["type"], where["count"]) == (5126, "VEC3", 4)
    assert (where["min"], where["max"]) == ([0, 1, 2], [9, 10, 11])
    assert (colour["componentType"], colour["type"], colour["count"]) == (5121, "VEC4", 4)
    assert colour["normalized"]
    start = tree["bufferViews"][colour["bufferView"]]["byteOffset"]
    light = np.frombuffer(binary, np.uint8, 16, start).reshape(4, 4)
    # 188 is half of the light and 118 is 18 % of it, by the definition of sRGB.
    assert light[:, :3].tolist() == [[255, 0, 0], [128, 128, 128], [0, 0, 255], [46, 0, 0]]
    assert (light[:, 3] == 255).all()
    assert "NORMAL" not in primitive["attributes"]  # without it a viewer adds no light of its own
    assert tree["materials"][primitive["material"]]["pbrMetallicRoughness"]["baseColorFactor"] == [
        1, 1, 1, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".ply", ".glb"])
def test_a_saved_cloud_looks_as_its_picture_did(tmp_path, suffix) -> None:
    """Red left, green right, blue above; what is below comes towards the viewer."""
    h, w = 60, 80
    image = np.zeros((h, w, 3), np.uint8)
    image[:, : w // 2], image[:, w // 2 :], image[:20] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    depth = np.repeat(np.linspace(4, 3, h)[:, None], w, axis=1)
    save_cloud(*point_cloud(depth, image, intrinsics_from_fov(h, w)), tmp_path / f"cloud{suffix}")
    cloud = as_a_viewer_shows(tmp_path / f"cloud{suffix}")
    picture = geometry.render(cloud, (h, w), yaw=0.0, pitch=0.0)
    shown = [tuple(picture[at]) for at in ((40, 20), (40, 60), (12, 20))]
    assert shown == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    blue = (cloud.colours == (0, 0, 255)).all(axis=1)
    assert cloud.points[blue, 2].max() < cloud.points[~blue, 2].min()  # farther down -Z
    # From the camera itself, every point is seen where its pixel was.
    seen = cloud.points - point_of_camera(depth)
    column = w / 2 + (h / 2 / np.tan(np.radians(32.5))) * seen[:, 0] / -seen[:, 2]
    row = h / 2 - (h / 2 / np.tan(np.radians(32.5))) * seen[:, 1] / -seen[:, 2]
    again = np.zeros_like(image)
    again[row.astype(int), column.astype(int)] = cloud.colours
    assert (again == image).all()


def point_of_camera(depth: np.ndarray) -> np.ndarray:
    """Where the camera stands in the cloud that `point_cloud` makes of depth without edges."""
    points = unproject(depth, intrinsics_from_fov(*depth.shape)) * (1, -1, -1)
    return -np.median(points.reshape(-1, 3), axis=0)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch) -> None:
    path = tmp_path / "cloud.ply"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_cloud(np.zeros((1, 3), np.float32), np.zeros((1, 3), np.uint8), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_an_unknown_cloud_format_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"ends in .ply or .glb"):
        save_cloud(np.zeros((1, 3), np.float32), np.zeros((1, 3), np.uint8), tmp_path / "cloud.obj")


def test_render_shows_the_nearer_of_two_points_on_one_ray() -> None:
    points = np.array([[0, 0, -1], [0, 0, 1], [-5, -5, 0], [5, 5, 0]], np.float32)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 255]], np.uint8)
    picture = geometry.render(Cloud(points, colours), (40, 40), yaw=0.0, pitch=0.0)
    assert (picture[20, 20] == (0, 255, 0)).all()
