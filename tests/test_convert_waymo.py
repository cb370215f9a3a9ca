"""The Waymo Open Dataset v2 in small: its tables as published, in any order of rows."""

import io
import math
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from planted import SIZE, rodrigues
from pyarrow import parquet

from mofo.data.convert import waymo

SEGMENT = "10023947602400723454_1120_000_1140_000"
H, W = 6, 90  # of the range image
LENS = {"f_u": 60.0, "f_v": 61.0, "c_u": 31.5, "c_v": 24.25, "k1": 0.04, "k2": -0.3}
MOUNTS = {  # camera: its coordinates are x forward, y left, z up
    1: (rodrigues((0, 1, 0), 0.01), (1.5, 0.0, 2.1)),
    4: (rodrigues((0, 0, 1), 1.57), (1.4, 0.1, 2.1)),
}
SCANNER = (rodrigues((0, 0, 1), 0.8), (1.43, 0.0, 2.18))
INCLINATIONS = [-0.2, -0.12, -0.07, -0.03, -0.01, 0.02]  # from the lowest beam
TRIGGER, SHUTTER, DONE, POSED = 1000.0, 0.004, 1000.05, 1000.02
SPEED, TURNING = (8.0, -6.0, 0.2), (0.02, -0.03, 0.4)
Rows = list[dict]


def matrix(rotation: np.ndarray, place: tuple[float, ...]) -> np.ndarray:
    full = np.eye(4)
    full[:3, :3], full[:3, 3] = rotation, place
    return full


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


class Segment:
    """Three frames. Cells of the range image fall into pixels that stand apart."""

    times = (1552440195362591, 1552440195462591, 1552440195562591)

    def __init__(self, root: Path, direction: int = 2) -> None:
        self.root, self.direction = root, direction
        self.vehicle = matrix(rodrigues((0.02, 0.03, 1), 0.7), (250.0, -130.0, 20.0))
        self.cells = {time: self._cells(seed) for seed, time in enumerate(self.times)}
        tables = {
            "camera_image": ("CameraImageComponent", self._images()),
            "camera_calibration": ("CameraCalibrationComponent", self._cameras()),
            "lidar": ("LiDARComponent", self._scans("range")),
            "lidar_calibration": ("LiDARCalibrationComponent", self._scanners()),
            "lidar_pose": ("LiDARPoseComponent", self._scans("pose")[:3]),
            "lidar_camera_projection": ("LiDARCameraProjectionComponent", self._scans("cell")),
        }
        for seed, (name, (prefix, rows)) in enumerate(tables.items()):
            order = np.random.default_rng(seed).permutation(len(rows))
            named = [
                {k if k.startswith("key.") else f"[{prefix}].{k}": v for k, v in rows[i].items()}
                for i in order
            ]
            (root / name).mkdir()
            parquet.write_table(
                pa.Table.from_pylist(named), root / name / f"{SEGMENT}.parquet", row_group_size=3
            )

    def _cells(self, seed: int) -> dict[str, np.ndarray]:
        """Ranges, poses and pixels of the scanner on the roof, in the types they are stored in."""
        rng = np.random.default_rng(seed)
        r = np.zeros((H, W, 4), np.float32)
        pose = np.zeros((H, W, 6), np.float32)
        cell = np.zeros((H, W, 6), np.float32)
        # Straight ahead is in the middle of the image, left a quarter of a turn before.
        for camera, middle in ((1, W // 2), (4, W // 4)):
            for row in range(H):
                for k, column in enumerate(range(middle - 4, middle + 4)):
                    r[row, column, 0] = rng.uniform(20, 20.3)
                    pose[row, column] = (0.01, -0.02, 0.7 + k / 1000, 250 + k / 10, -130, 20.1)
                    pixel = (camera, 4 + 7 * k, 3 + 7 * row)
                    cell[row, column] = (*pixel, 0, 0, 0) if row % 2 else (7, 0, 0, *pixel)
        r[0, 0, 0] = 1.0  # without a pose, it would lie at the origin of the world
        cell[0, 0] = (4, 60, 47, 0, 0, 0)
        r[0, 1, 0], pose[0, 1], cell[0, 1] = -1, 1, (1, 60, 45, 0, 0, 0)  # no return
        return {"range": r, "pose": pose, "cell": cell}

    def _scans(self, kind: str) -> Rows:
        """Of the scanner on the roof first, then of another one, with other numbers."""
        rows = []
        for laser in (1, 2):
            for time in self.times:
                grid = self.cells[time][kind] if laser == 1 else np.ones((2, 3, 6), np.float32)
                row = {"key.segment_context_name": SEGMENT, "key.frame_timestamp_micros": time}
                for number in (1, 2):
                    name = f"range_image_return{number}"
                    row[f"{name}.values"] = pa.scalar(grid.ravel().tolist(), pa.list_(pa.float32()))
                    row[f"{name}.shape"] = pa.scalar(grid.shape, pa.list_(pa.int32(), 3))
                    grid = grid * 2
                rows.append({**row, "key.laser_name": pa.scalar(laser, pa.int8())})
        return rows

    def _images(self) -> Rows:
        vectors = {"linear": SPEED, "angular": TURNING}
        velocity = {
            f"velocity.{kind}_velocity.{axis}": value
            for kind, vector in vectors.items()
            for axis, value in zip("xyz", vector, strict=True)
        }
        return [
            {
                "key.segment_context_name": SEGMENT,
                "key.frame_timestamp_micros": time,
                "key.camera_name": pa.scalar(camera, pa.int8()),
                "image": jpeg(camera + index),
                "pose.transform": flat(self.vehicle),
                **velocity,
                "pose_timestamp": POSED,
                "rolling_shutter_params.shutter": SHUTTER,
                "rolling_shutter_params.camera_trigger_time": TRIGGER,
                "rolling_shutter_params.camera_readout_done_time": DONE,
            }
            for index, time in enumerate(self.times)
            for camera in MOUNTS
        ]

    def _cameras(self) -> Rows:
        return [
            {
                "key.segment_context_name": SEGMENT,
                "key.camera_name": camera,
                **{f"intrinsic.{name}": value for name, value in LENS.items()},
                "extrinsic.transform": flat(matrix(*mount)),
                "width": SIZE[1],
                "height": SIZE[0],
                "rolling_shutter_direction": self.direction,
            }
            for camera, mount in MOUNTS.items()
        ]

    def _scanners(self) -> Rows:
        return [
            {
                "key.segment_context_name": SEGMENT,
                "key.laser_name": laser,
                "extrinsic.transform": flat(matrix(*SCANNER) if laser == 1 else np.eye(4)),
                "beam_inclination.min": -0.3,
                "beam_inclination.max": 0.1,
                "beam_inclination.values": INCLINATIONS if laser == 1 else None,
            }
            for laser in (1, 2)
        ]

    def expected(self, camera: int, time: int) -> dict[tuple[int, int], float]:
        """Depth by pixel, cell by cell."""
        grids = self.cells[time]
        depths = {}
        for row in range(H):
            for column in range(W):
                cell = grids["cell"][row, column]
                for slot in (0, 3):
                    if cell[slot] == camera and grids["pose"][row, column].any():
                        x, y = int(cell[slot + 1]), int(cell[slot + 2])
                        point = self._point(row, column, time)
                        if grids["range"][row, column, 0] > 0:
                            depths[y, x] = self._depth(point, camera, x + 0.5, y + 0.5)
        return depths

    def _point(self, row: int, column: int, time: int) -> np.ndarray:
        """A cell in the world: range image, scanner, vehicle at the time of the cell."""
        distance = float(self.cells[time]["range"][row, column, 0])
        # The middle column looks along the vehicle, so the scanner's own yaw comes off.
        azimuth = math.pi - 2 * math.pi * (column + 0.5) / W - 0.8
        inclination = INCLINATIONS[H - 1 - row]
        local = distance * np.array(
            [
                math.cos(inclination) * math.cos(azimuth),
                math.cos(inclination) * math.sin(azimuth),
                math.sin(inclination),
            ]
        )
        roll, pitch, yaw, *place = self.cells[time]["pose"][row, column].astype(float)
        turn = rodrigues((0, 0, 1), yaw) @ rodrigues((0, 1, 0), pitch) @ rodrigues((1, 0, 0), roll)
        return turn @ (SCANNER[0] @ local + SCANNER[1]) + place

    def _depth(self, point: np.ndarray, camera: int, u: float, v: float) -> float:
        """Along the axis of the camera where the vehicle has carried it when (u, v) is read."""
        parts = {1: v / SIZE[0], 2: u / SIZE[1], 3: 1 - v / SIZE[0], 4: 1 - u / SIZE[1]}
        readout = DONE - TRIGGER - SHUTTER
        late = 0.0
        if self.direction != 5:
            late = TRIGGER + SHUTTER / 2 + readout * parts[self.direction] - POSED
        x, y, z = TURNING
        turned = np.eye(3) + late * np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        vehicle = self.vehicle.copy()
        vehicle[:3, :3] = vehicle[:3, :3] @ turned
        vehicle[:3, 3] += late * np.array(SPEED)
        rotation, place = MOUNTS[camera]
        position = vehicle[:3, :3] @ place + vehicle[:3, 3]
        return float((point - position) @ vehicle[:3, :3] @ rotation[:, 0])


def flat(transform: np.ndarray) -> pa.Scalar:
    return pa.scalar(transform.ravel().tolist(), pa.list_(pa.float64(), 16))


@pytest.mark.parametrize("direction", [1, 2, 3, 4, 5])
def test_waymo_gives_each_pixel_its_depth_when_it_was_read(tmp_path: Path, direction: int) -> None:
    tree = Segment(tmp_path, direction)
    (item,) = waymo.find(tmp_path)
    samples = list(waymo.read(pickle.loads(pickle.dumps(item))))
    names = {1: "FRONT", 4: "SIDE_LEFT"}
    frames = [(time, camera) for time in tree.times for camera in names]
    assert [s.key for s in samples] == [f"{SEGMENT}_{t}_{names[camera]}" for t, camera in frames]
    for index, (sample, (time, camera)) in enumerate(zip(samples, frames, strict=True)):
        expected = tree.expected(camera, time)
        assert len(expected) == 8 * H
        sample.check()
        assert sample.depth is not None
        metres, valid = sample.depth
        assert {(int(v), int(u)) for v, u in np.argwhere(valid)} == set(expected)
        for pixel, depth in expected.items():
            assert metres[pixel] == pytest.approx(depth, rel=2e-7)
        k = [[60, 0, 31.5], [0, 61, 24.25], [0, 0, 1]]
        np.testing.assert_array_equal(sample.intrinsics, k)
        assert sample.image_bytes == jpeg(camera + index // 2)


def test_waymo_reads_a_segment_in_runs_of_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Segment(tmp_path)
    whole = [sample.key for item in waymo.find(tmp_path) for sample in waymo.read(item)]
    monkeypatch.setattr(waymo, "FRAMES", 2)
    items = waymo.find(tmp_path)
    assert [len(item.times) for item in items] == [2, 1]
    assert [sample.key for item in items for sample in waymo.read(item)] == whole


def test_waymo_names_what_is_missing(tmp_path: Path) -> None:
    Segment(tmp_path)
    (item,) = waymo.find(tmp_path)
    path = tmp_path / "lidar_pose" / f"{SEGMENT}.parquet"
    parquet.write_table(parquet.read_table(path).slice(0, 2), path)
    with pytest.raises(ValueError, match="lacks a row of lidar, lidar_pose"):
        list(waymo.read(item))
    path.unlink()
    with pytest.raises(ValueError, match=f"lacks lidar_pose/{SEGMENT}"):
        waymo.find(tmp_path)


def test_waymo_refuses_a_readout_it_does_not_know(tmp_path: Path) -> None:
    Segment(tmp_path, direction=0)
    with pytest.raises(ValueError, match="rolling_shutter_direction is 0"):
        next(waymo.read(waymo.find(tmp_path)[0]))
