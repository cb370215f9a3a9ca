"""KITTI, Argoverse 2 and DDAD in small: trees in the published layout, written here."""

import json
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from planted import (
    FORWARD,
    SIZE,
    assert_sees,
    from_matrix,
    lift,
    picture,
    quaternion,
    rodrigues,
    targets,
)
from pyarrow import feather

from mofo.data.convert import argoverse2, ddad, kitti, waymo

POSE = ("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")


@pytest.mark.parametrize("converter", [kitti, argoverse2, ddad, waymo])
def test_an_empty_folder_is_refused_with_the_tree_that_was_expected(
    converter: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="expected"):
        converter.find(tmp_path)


DRIVE = "2011_09_26_drive_0001_sync"
LENS = np.array([[50.0, 0, 31], [0, 52, 23], [0, 0, 1]])  # pixel centres from 0, as published
HALF = LENS + np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
SHIFTS = {"02": (2.5, 0.125, 0.0025), "03": (-24.0, 0.25, 0.003)}


def rounded(numbers: np.ndarray) -> tuple[str, np.ndarray]:
    """Numbers as KITTI prints them, and what then stands there."""
    text = " ".join(f"{number:e}" for number in np.ravel(numbers))
    return text, np.array(text.split(), float).reshape(np.shape(numbers))


class Kitti:
    """One drive: frame 5 annotated for camera 2; frame 6 with a scan; frame 7 with an empty one."""

    def __init__(self, root: Path) -> None:
        self.root, self.drive = root, root / "2011_09_26" / DRIVE
        rotation, self.r = rounded(rodrigues((1, 2, 3), 0.02) @ FORWARD)
        shift, self.t = rounded(np.array([-0.004, -0.076, -0.27]))
        rectify, self.rect = rounded(rodrigues((3, 1, -1), 0.01))
        rows = ["calib_time: 09-Jan-2012 13:57:47", "corner_dist: 9.950000e-02"]
        for camera in ("00", *SHIFTS):
            rows.append(f"R_rect_{camera}: {rectify if camera == '00' else '1 0 0 0 1 0 0 0 1'}")
            p = np.column_stack([LENS, SHIFTS.get(camera, (0, 0, 0))])
            rows.append(f"P_rect_{camera}: {rounded(p)[0]}")
        self.drive.mkdir(parents=True)
        self.drive.with_name("calib_cam_to_cam.txt").write_text("\n".join(rows) + "\n")
        self.drive.with_name("calib_velo_to_cam.txt").write_text(
            f"calib_time: 15-Mar-2012 11:37:16\nR: {rotation}\nT: {shift}\n"
            "delta_f: 0.000000e+00 0.000000e+00\ndelta_c: 0.000000e+00 0.000000e+00\n"
        )
        self.pictures = {
            (camera, frame): picture(self.drive / f"image_{camera}/data/{frame:010d}.png", frame)
            for camera in SHIFTS
            for frame in (5, 6, 7)
        }

    def write_scan(self, frame: int, uvz: np.ndarray) -> np.ndarray:
        """Returns that camera 2 sees at `uvz` (half-integer centres); as float32, to be told of."""
        rectified = lift(uvz, HALF) - np.linalg.inv(LENS) @ SHIFTS["02"]
        points = ((rectified @ self.rect) - self.t) @ self.r  # inverses of rotations: transposed
        path = self.drive / "velodyne_points/data" / f"{frame:010d}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = np.column_stack([points, np.ones(len(points))]).astype("<f4")
        data.tofile(path)
        return data[:, :3].astype(float)

    def in_camera(self, points: np.ndarray, camera: str) -> np.ndarray:
        """By the formula of the kit: P_rect R_rect_00 (R|T) x, then off the intrinsics."""
        p = np.column_stack([LENS, SHIFTS[camera]])
        seen = [p @ np.append(self.rect @ (self.r @ point + self.t), 1) for point in points]
        return np.array(seen) @ np.linalg.inv(LENS).T

    def annotate(self, part: str, frame: int, codes: np.ndarray) -> None:
        folder = self.root / part / DRIVE / "proj_depth/groundtruth/image_02"
        folder.mkdir(parents=True)
        Image.fromarray(codes).save(folder / f"{frame:010d}.png")


@pytest.fixture
def kitti_tree(tmp_path: Path) -> Kitti:
    return Kitti(tmp_path)


def test_kitti_reads_annotated_depth_exactly(kitti_tree: Kitti) -> None:
    codes = np.zeros(SIZE, np.uint16)
    codes[10, 20], codes[47, 63], codes[0, 0] = 5120, 65535, 1
    kitti_tree.annotate("val", 5, codes)
    (item,) = kitti.find(kitti_tree.root)
    (sample,) = kitti.read(pickle.loads(pickle.dumps(item)))
    assert sample.metres is not None
    assert sample.valid is not None
    assert np.array_equal(sample.metres, codes.astype(np.float32) / 256)
    assert np.array_equal(sample.valid, codes > 0)
    assert (sample.key, sample.depth_scale) == (f"{DRIVE}_image_02_0000000005", 1 / 256)
    assert sample.image_bytes == kitti_tree.pictures["02", 5]
    assert sample.intrinsics is not None
    assert np.array_equal(sample.intrinsics, HALF)


def test_kitti_projects_the_scan_into_both_cameras_where_nothing_is_annotated(
    kitti_tree: Kitti,
) -> None:
    kitti_tree.annotate("train", 5, np.full(SIZE, 256, np.uint16))
    planted = targets(1)
    extra = np.array([(30, 20, -20.0), (-9, 20, 20), (planted[0, 0], planted[0, 1], 20.9)])
    points = kitti_tree.write_scan(6, np.concatenate([planted, extra]))
    kitti_tree.write_scan(7, np.array([(30, 20, -20.0)]))
    samples = {s.key: s for item in kitti.find(kitti_tree.root) for s in kitti.read(item)}
    assert list(samples) == [
        f"{DRIVE}_image_{name}" for name in ("02_0000000005", "02_0000000006", "03_0000000006")
    ]
    for camera in SHIFTS:
        sample = samples[f"{DRIVE}_image_{camera}_0000000006"]
        assert_sees(sample, kitti_tree.in_camera(points, camera), HALF, least=30)
        assert sample.image_bytes == kitti_tree.pictures[camera, 6]


def test_kitti_leaves_out_the_drives_a_list_names(kitti_tree: Kitti, tmp_path: Path) -> None:
    kitti_tree.write_scan(6, targets(1))
    listing = tmp_path / "list.txt"
    listing.write_text("2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png 721.5\n")
    assert len(kitti.find(tmp_path, exclude=str(listing))) == 2
    listing.write_text(f"2011_09_26/{DRIVE}/image_02/data/0000000069.png 721.5\n")
    with pytest.raises(ValueError, match="left out: 1"):
        kitti.find(tmp_path, exclude=str(listing))


def test_kitti_names_a_calibration_that_lacks_a_camera(kitti_tree: Kitti) -> None:
    kitti_tree.write_scan(6, targets(1))
    path = kitti_tree.drive.with_name("calib_cam_to_cam.txt")
    path.write_text(path.read_text().replace("P_rect_02", "P_rect_04"))
    with pytest.raises(ValueError, match="P_rect_02"):
        next(kitti.read(kitti.find(kitti_tree.root)[0]))


LOG = "7fab2350-7eaf-3b7e-a39d-6937a4c1bede"
START, MS = 315966265259836000, 1_000_000


class Argoverse2:
    """One log of one sweep, driven at 10 m/s while turning, with two ring cameras."""

    mounts = {
        "ring_front_center": (((0, 1, 0), 0.05), FORWARD.T, (1.6, 0.0, 1.4)),
        "ring_side_left": (
            ((1, 1, 0), 0.1),
            rodrigues((0, 0, 1), 1.5) @ FORWARD.T,
            (1.3, 0.3, 1.4),
        ),
    }
    lens = np.array([[50.25, 0, 30.5], [0, 50.25, 24.75], [0, 0, 1]])

    def __init__(self, root: Path) -> None:
        self.log = root / LOG
        self.log.mkdir()
        self.city = {
            time: (((0.1, 0, 1), 0.3 + index / 50), (700 + index / 2, 1200 - index / 3, -24.0))
            for index, time in enumerate(START + MS * np.array([0, 3, 43, 53, 93, 103]))
        }
        poses = [(int(time), *quaternion(*turn), *at) for time, (turn, at) in self.city.items()]
        self._table("city_SE3_egovehicle", ["timestamp_ns", *POSE], poses)
        self.rotations = {
            name: rodrigues(*turn) @ base for name, (turn, base, _) in self.mounts.items()
        }
        rows = [
            (name, *from_matrix(self.rotations[name]), *at)
            for name, (_, _, at) in self.mounts.items()
        ]
        self._table("calibration/egovehicle_SE3_sensor", ["sensor_name", *POSE], rows)
        columns = ["sensor_name", "fx_px", "fy_px", "cx_px", "cy_px", "k1", "height_px", "width_px"]
        k = self.lens
        lens = (k[0, 0], k[1, 1], k[0, 2] - 0.5, k[1, 2] - 0.5, -0.3, *SIZE)
        self._table("calibration/intrinsics", columns, [(name, *lens) for name in self.mounts])

    def _table(self, name: str, columns: list[str], rows: list[tuple]) -> None:
        path = self.log / f"{name}.feather"
        path.parent.mkdir(exist_ok=True, parents=True)
        values = [list(column) for column in zip(*rows, strict=True)]
        feather.write_feather(pa.table(dict(zip(columns, values, strict=True))), str(path))

    def write_picture(self, camera: str, milliseconds: int) -> bytes:
        name = f"{START + milliseconds * MS}.jpg"
        return picture(self.log / "sensors/cameras" / camera / name, milliseconds)

    def at(self, camera: str, milliseconds: int) -> tuple[np.ndarray, np.ndarray]:
        """Rotation and place of a camera in the city when it took an image."""
        turn, place = self.city[START + milliseconds * MS]
        r = rodrigues(*turn)
        return r @ self.rotations[camera], r @ self.mounts[camera][2] + place

    def write_sweep(self, points: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Points of the city as one sweep, in half precision; where they then are."""
        turn, place = self.city[START]
        r = rodrigues(*turn)
        local = ((points - place) @ r).astype(np.float16)
        path = self.log / "sensors/lidar" / f"{START}.feather"
        path.parent.mkdir(parents=True)
        columns = {axis: local[:, index] for index, axis in enumerate("xyz")}
        grey = np.zeros(len(local), np.uint8)
        table = {**columns, "intensity": grey, "laser_number": grey, "offset_ns": np.int32(offsets)}
        feather.write_feather(pa.table(table), str(path))
        return np.array([r @ point + place for point in local.astype(float)])


def test_argoverse2_carries_a_sweep_to_the_moment_of_each_image(tmp_path: Path) -> None:
    tree = Argoverse2(tmp_path)
    bytes_of = {
        camera: [tree.write_picture(camera, time) for time in times]
        for camera, times in (("ring_front_center", (3, 53, 103)), ("ring_side_left", (43, 93)))
    }
    tree.write_picture("stereo_front_left", 53)
    points, offsets = [], []
    for seed, (camera, time) in enumerate([("ring_front_center", 53), ("ring_side_left", 43)]):
        r, place = tree.at(camera, time)
        points.append(lift(targets(seed), tree.lens) @ r.T + place)
        offsets.append(np.linspace(5, 90, 40) * MS)
    # The same pixel, nearer but too long before the exposure.
    r, place = tree.at("ring_front_center", 53)
    points.append(lift(targets(0)[:1] * [1, 1, 0.5], tree.lens) @ r.T + place)
    offsets.append(np.array([2 * MS]))
    city, lag = tree.write_sweep(np.concatenate(points), np.concatenate(offsets)), 50 * MS
    (item,) = argoverse2.find(tmp_path)
    samples = list(argoverse2.read(pickle.loads(pickle.dumps(item))))
    assert [sample.key for sample in samples] == [
        f"{LOG}_ring_front_center_{START + 53 * MS}",
        f"{LOG}_ring_side_left_{START + 43 * MS}",
    ]
    for sample, (camera, time), index in zip(
        samples, [("ring_front_center", 53), ("ring_side_left", 43)], (1, 0), strict=True
    ):
        r, place = tree.at(camera, time)
        near = np.abs(np.concatenate(offsets) - time * MS) <= lag
        assert_sees(sample, (city[near] - place) @ r, tree.lens, least=30)
        assert sample.image_bytes == bytes_of[camera][index]


def test_argoverse2_names_what_a_log_lacks(tmp_path: Path) -> None:
    tree = Argoverse2(tmp_path)
    tree.write_sweep(np.ones((1, 3)), np.zeros(1))
    tree.write_picture("ring_front_center", 60)
    (item,) = argoverse2.find(tmp_path)
    with pytest.raises(ValueError, match=f"timestamp_ns has no {START + 60 * MS}"):
        next(argoverse2.read(item))
    (tree.log / "calibration/intrinsics.feather").unlink()
    with pytest.raises(ValueError, match="lacks calibration/intrinsics"):
        argoverse2.find(tmp_path)


class Ddad:
    """A training scene of one moment with two cameras, and a scene for validation."""

    lens = np.array([[60.0, 0, 32.25], [0, 59, 23.5], [0, 0, 1]])

    def __init__(self, root: Path) -> None:
        self.root = root
        splits = {"0": ["000000/scene_aa.json"], "1": ["000150/scene_bb.json"]}
        listing = {"metadata": {}, "scene_splits": {k: {"filenames": v} for k, v in splits.items()}}
        (root / "ddad.json").write_text(json.dumps(listing))
        self.poses = {
            "LIDAR": (rodrigues((0, 0, 1), 2.5), np.array([400.8, -259.6, 12.5])),
            "CAMERA_01": (rodrigues((0, 1, 1), 2.4) @ FORWARD.T, np.array([399.3, -258.9, 13.8])),
            "CAMERA_09": (rodrigues((1, 1, 1), -1.0) @ FORWARD.T, np.array([399.2, -259, 13.8])),
        }
        for folder, name in (("000000", "scene_aa"), ("000150", "scene_bb")):
            self._write_scene(root / folder, name)

    def _write_scene(self, folder: Path, name: str) -> None:
        data = []
        for key, (sensor, (rotation, place)) in enumerate(self.poses.items()):
            pose = {
                "rotation": dict(zip(POSE[:4], from_matrix(rotation), strict=True)),
                "translation": dict(zip("xyz", place, strict=True)),
            }
            kind = "point_cloud" if sensor == "LIDAR" else "image"
            file = f"rgb/{sensor}/15621787638931470.png"
            if sensor == "LIDAR":
                file = "point_cloud/LIDAR/15621787638903752.npz"
            else:
                picture(folder / file, key)
            content = {"filename": file, "pose": pose, "annotations": {}}
            data.append({"datum": {kind: content}, "id": {"name": sensor}, "key": f"k{key}"})
        sample = {"calibration_key": "cc", "datum_keys": ["k0", "k1", "k2"], "id": {"index": "0"}}
        scene = {"data": data, "samples": [sample], "name": "", "log": "x"}
        (folder / f"{name}.json").write_text(json.dumps(scene))
        k, none = self.lens, {"fx": 0.0, "fy": 0.0, "cx": 0.0, "cy": 0.0, "skew": 0.0}
        lens = {"fx": k[0, 0], "fy": k[1, 1], "cx": k[0, 2] - 0.5, "cy": k[1, 2] - 0.5, "skew": 0.0}
        calibration = {"names": list(self.poses), "intrinsics": [none, lens, lens]}
        (folder / "calibration").mkdir()
        (folder / "calibration/cc.json").write_text(json.dumps(calibration))

    def write_scan(self, folder: str, points: np.ndarray, named: bool) -> np.ndarray:
        """Points of the world as a scan in float32; where they then are."""
        rotation, place = self.poses["LIDAR"]
        local = ((points - place) @ rotation).astype(np.float32)
        data = np.column_stack([local, np.zeros(len(local), np.float32)])
        if named:
            columns = np.dtype([(axis, "<f4") for axis in ("X", "Y", "Z", "INTENSITY")])
            data = data.view(columns)
        path = self.root / folder / "point_cloud/LIDAR/15621787638903752.npz"
        path.parent.mkdir(parents=True)
        np.savez_compressed(path, data=data)
        return np.array([rotation @ point + place for point in local.astype(float)])


@pytest.mark.parametrize("named", [False, True])
def test_ddad_projects_the_scan_through_the_poses_of_its_sensors(
    tmp_path: Path, named: bool
) -> None:
    tree = Ddad(tmp_path)
    planted = [
        lift(targets(seed), tree.lens) @ tree.poses[camera][0].T + tree.poses[camera][1]
        for seed, camera in enumerate(("CAMERA_01", "CAMERA_09"))
    ]
    world = tree.write_scan("000000", np.concatenate(planted), named)
    (item,) = ddad.find(tmp_path)
    samples = list(ddad.read(pickle.loads(pickle.dumps(item))))
    assert [sample.key for sample in samples] == [
        "000000_CAMERA_01_15621787638931470",
        "000000_CAMERA_09_15621787638931470",
    ]
    for sample, camera in zip(samples, ("CAMERA_01", "CAMERA_09"), strict=True):
        rotation, place = tree.poses[camera]
        assert_sees(sample, (world - place) @ rotation, tree.lens, least=30)
    (item,) = ddad.find(tmp_path, split="val")
    assert item.scan.file.parts[-4] == "000150"


def test_ddad_names_what_is_missing(tmp_path: Path) -> None:
    tree = Ddad(tmp_path)
    with pytest.raises(ValueError, match="'test', but must be one of train, val"):
        ddad.find(tmp_path, split="test")
    tree.write_scan("000000", np.ones((1, 3)), named=False)
    path = tmp_path / "000000/calibration/cc.json"
    path.write_text(path.read_text().replace("CAMERA_01", "CAMERA_02"))
    with pytest.raises(ValueError, match="no CAMERA_01"):
        next(ddad.read(ddad.find(tmp_path)[0]))
