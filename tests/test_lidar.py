"""LiDAR returns in a camera: where they fall, which one a pixel keeps, which ones it cannot see."""

import numpy as np
import pytest
from planted import quaternion, rodrigues

from mofo.data import lidar


def test_a_quaternion_and_a_translation_are_the_transform_they_name() -> None:
    axis, angle = (1.0, -2.0, 0.5), 2.1
    matrix = lidar.transform(3 * np.array(quaternion(axis, angle)), np.array([1.0, 2, 3]))
    np.testing.assert_allclose(matrix[:3, :3], rodrigues(axis, angle), atol=1e-15)
    assert lidar.move(np.array([[0.0, 0, 0]]), matrix).tolist() == [[1, 2, 3]]


def test_a_pixel_keeps_its_nearest_return_and_nothing_lies_outside() -> None:
    w, h = 200, 100
    uvz = np.array(
        [
            (10.2, 20.7, 9.0),
            (10.9, 20.1, 8.8),
            (-0.1, 20, 5),
            (w - 1e-9, 20, 5),  # in float32 that is w
            (50, h, 5),
            (50, 50, np.inf),
            (np.nan, 50, 5),
            (np.float64(99.9999999), 60.5, 9),
        ]
    )
    kept = lidar.visible(uvz, 10.0, (h, w))
    assert kept.tolist() == np.float32([(10.9, 20.1, 8.8), (100, 60.5, 9)]).tolist()


def test_nothing_behind_the_camera_is_projected() -> None:
    k = np.array([[50.0, 0, 32], [0, 60, 24], [0, 0, 1]])
    points = np.array([(1.0, 2, 4), (1, 2, -4), (1, 2, 0)])
    assert lidar.project(points, k).tolist() == [[44.5, 54, 4]]


def directions() -> np.ndarray:
    """Of a scanner: 0.4 degrees between lines, 0.17 within."""
    elevation, azimuth = np.radians(np.mgrid[-12:3:0.4, -35:35:0.17])
    flat = np.cos(elevation)
    rays = [np.sin(azimuth) * flat, -np.sin(elevation), np.cos(azimuth) * flat]
    return np.stack(rays, axis=-1).reshape(-1, 3)


@pytest.mark.parametrize("scanner", [(0.0, -0.1, -0.3), (0.4, -0.2, 0.0), (-0.3, 0.1, -0.2)])
def test_a_plane_seen_through_a_nearer_one_is_dropped(scanner: tuple[float, ...]) -> None:
    near, far, half = 8.0, 30.0, np.array([2.0, 1.0])  # a board before a wall
    place, size = np.array(scanner), (375, 1242)
    k = np.array([[720.0, 0, 621], [0, 720, 188], [0, 0, 1]])
    rays = directions()
    on_board = place + rays * ((near - place[2]) / rays[:, 2:])
    on_wall = place + rays * ((far - place[2]) / rays[:, 2:])
    hits = (np.abs(on_board[:, :2]) < half).all(1)
    points = np.where(hits[:, None], on_board, on_wall)
    # The camera looks at a point of the wall through the plane of the board.
    crossing = np.abs(points[:, :2]) * near / points[:, 2:]
    hidden = ~hits & (crossing < half).all(1)
    uvz = lidar.project(points, k)
    inside = ((uvz[:, :2] >= 0) & (uvz[:, :2] < (size[1], size[0]))).all(1)
    kept = {tuple(row) for row in lidar.visible(uvz, 720.0, size).tolist()}
    seen = np.array([tuple(row) in kept for row in uvz.astype(np.float32).tolist()])
    assert (hidden & inside).sum() > 30
    assert not (hidden & seen).any()
    assert seen[hits & inside].all()
    # What is lost of the wall lies within the window about the board.
    window = 2 * near / 100
    around = (crossing < half + window).all(1)
    assert seen[inside & ~hits & ~around].mean() > 0.999


def test_road_and_walls_hide_nothing_of_themselves() -> None:
    place, size = np.array([0.0, -0.1, -0.3]), (375, 1242)
    k = np.array([[720.0, 0, 621], [0, 720, 188], [0, 0, 1]])
    rays = directions()
    with np.errstate(divide="ignore"):
        road = np.where(rays[:, 1] > 0, (1.3 - place[1]) / rays[:, 1], np.inf)
        walls = np.where(rays[:, 0] > 0, 3.0, -2.0) / rays[:, 0]
        end = (90 - place[2]) / rays[:, 2]
    points = place + rays * np.minimum(np.minimum(road, walls), end)[:, None]
    uvz = lidar.project(points, k).astype(np.float32)
    u, v, _ = uvz.T
    uvz = uvz[(u >= 0) & (u < size[1]) & (v >= 0) & (v < size[0])]
    pixels = {(int(u), int(v)) for u, v, _ in uvz.tolist()}
    assert len(pixels) > 5000
    assert len(lidar.visible(uvz, 720.0, size)) == len(pixels)
