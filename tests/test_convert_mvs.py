"""MegaDepth and BlendedMVS: trees as they are published, depth where it was put."""

import struct
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from mofo.data.convert import blendedmvs, megadepth
from mofo.data.sample import decode_image


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    w, h = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (h, w, 3), np.uint8))


def write_megadepth(root: Path, depth: dict[str, np.ndarray]) -> Path:
    dense = root / "phoenix/S6/zl548/MegaDepth_v1/0015/dense1"
    for folder in ("imgs", "depths"):
        (dense / folder).mkdir(parents=True)
    for name, metres in depth.items():
        noise((40, 30)).save(dense / "imgs" / f"{name}.jpg")
        with h5py.File(dense / "depths" / f"{name}.h5", "w") as file:
            file["depth"] = metres
    return dense


def test_megadepth_keeps_depth_and_leaves_out_orders_and_empty_maps(tmp_path: Path) -> None:
    depth = np.zeros((30, 40), np.float32)
    depth[3, 5], depth[29, 39] = 1.2345678, 777.25
    order = depth.copy()
    order[0, 0] = -1
    maps = {"71_a.b_o": depth, "71_order_o": order, "72_none_o": np.zeros_like(depth)}
    dense = write_megadepth(tmp_path, maps)
    noise((40, 30)).save(dense / "imgs/73_without_depth_o.jpg")
    items = megadepth.find(tmp_path)
    assert [item.key for item in items] == [
        "0015_dense1_71_a_b_o", "0015_dense1_71_order_o", "0015_dense1_72_none_o"
    ]  # fmt: skip
    (sample,) = (sample for item in items for sample in megadepth.read(item))
    sample.check()
    assert sample.metres is not None
    assert sample.valid is not None
    assert sample.valid.sum() == 2
    assert (sample.metres[3, 5], sample.metres[29, 39]) == (np.float32(1.2345678), 777.25)
    assert sample.intrinsics is None
    assert not sample.metric
    assert sample.image_bytes == (dense / "imgs/71_a.b_o.jpg").read_bytes()


def test_megadepth_refuses_a_map_of_another_size_and_an_empty_tree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected SCENE/denseN/imgs"):
        megadepth.find(tmp_path)
    write_megadepth(tmp_path, {"1_o": np.ones((40, 30), np.float32)})
    (item,) = megadepth.find(tmp_path)
    with pytest.raises(ValueError, match=r"but the image is \(30, 40\)"):
        list(megadepth.read(item))


CAM = """extrinsic
0.970263 0.00747983 0.241939 -191.02
-0.0147429 0.999493 0.0282234 3.28832
-0.241605 -0.030951 0.969881 22.5401
0.0 0.0 0.0 1.0

intrinsic
572.938 0.0 383.25
0.0 573.125 287.5
0.0 0.0 1.0

-2.1 1.25 128 160.5
"""


def write_blendedmvs(root: Path, rows: np.ndarray, order: str = "<") -> Path:
    project = root / "5a3ca9cb270f0e3f14d0eddb"
    for folder in ("blended_images", "rendered_depth_maps", "cams"):
        (project / folder).mkdir(parents=True)
    h, w = rows.shape
    noise((w, h)).save(project / "blended_images/00000007.jpg")
    noise((w, h), 1).save(project / "blended_images/00000007_masked.jpg")
    (project / "cams/00000007_cam.txt").write_text(CAM)
    (project / "cams/pair.txt").write_text("1\n0\n")
    data = f"Pf\n{w} {h}\n{'-1.000000' if order == '<' else '1.000000'}\n".encode()
    for row in rows[::-1]:
        data += struct.pack(f"{order}{w}f", *row)
    (project / "rendered_depth_maps/00000007.pfm").write_bytes(data)
    return project


@pytest.mark.parametrize("order", ["<", ">"])
def test_blendedmvs_keeps_depth_where_the_mesh_is(tmp_path: Path, order: str) -> None:
    rows = np.zeros((6, 8), np.float32)
    rows[0, 1], rows[4, 7] = 2.7182817, 31.5
    project = write_blendedmvs(tmp_path, rows, order)
    (item,) = blendedmvs.find(tmp_path)
    (sample,) = blendedmvs.read(item)
    sample.check()
    assert sample.key == "5a3ca9cb270f0e3f14d0eddb_00000007"
    np.testing.assert_array_equal(sample.metres, rows)
    np.testing.assert_array_equal(sample.valid, rows > 0)
    k = np.array([[572.938, 0, 383.25], [0, 573.125, 287.5], [0, 0, 1]])
    np.testing.assert_array_equal(sample.intrinsics, k)
    assert not sample.metric
    assert sample.image_bytes == (project / "blended_images/00000007.jpg").read_bytes()
    assert sample.image_bytes is not None
    np.testing.assert_array_equal(sample.image, decode_image(BytesIO(sample.image_bytes).read()))


def test_blendedmvs_leaves_out_empty_maps_and_names_what_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected PID/rendered_depth_maps"):
        blendedmvs.find(tmp_path)
    project = write_blendedmvs(tmp_path, np.zeros((6, 8), np.float32))
    (item,) = blendedmvs.find(tmp_path)
    assert not list(blendedmvs.read(item))
    path = project / "rendered_depth_maps/00000007.pfm"
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"Pf\n99999999 99999999\n-1\n" + whole, b"", b"PF" + whole[2:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="extract it again"):
            list(blendedmvs.read(item))
