"""Unprojection, the cloud's orientation, and what is written to disk."""

import os

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


@pytest.mark.parametrize("suffix", [".ply", ".glb"])
def test_points_and_colours_read_back(tmp_path, suffix) -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(50, 3)).astype(np.float32)
    colours = rng.integers(0, 256, (50, 3), dtype=np.uint8)
    save_cloud(points, colours, tmp_path / f"cloud{suffix}")
    back = trimesh.load_scene(tmp_path / f"cloud{suffix}").dump()[0]
    assert np.allclose(back.vertices, points, atol=1e-6)
    assert (np.asarray(back.colors)[:, :3] == colours).all()
    assert [file.name for file in tmp_path.iterdir()] == [f"cloud{suffix}"]


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
