"""Published archives as they are: planted depth comes out where it was planted, no other does."""

import hashlib
import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published import (
    NYU,
    as_float32,
    codes,
    dpt,
    mask,
    measured,
    npy,
    nyu_files,
    nyu_row,
    other,
    picture,
    published_list,
    rows,
    tar,
    unpack,
    zipped,
)

from mofo.data.sample import Sample
from mofo.data.write import write
from mofo.evaluation.benchmark import Row, open_row
from mofo.evaluation.sets.regions import REGIONS

GOLDEN = np.load(Path(__file__).parent / "golden/eval_golden_public.npz")
KITTI = (375, 1242)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("entry", json.loads(str(GOLDEN["crops_json"])))
def test_regions_are_those_of_the_reference_to_the_pixel(entry: dict) -> None:
    names = {"garg": "garg", "eigen": "eigen", "kb_crop": "kitti", "nyu_eigen": "nyu_eigen"}
    compared = [name for name in names if name in entry]
    assert compared
    for name in compared:
        assert list(REGIONS[names[name]](entry["h"], entry["w"])) == entry[name]


def test_a_region_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="300x1242, but KITTI's crop needs 352x1216"):
        REGIONS["kitti"](300, 1242)
    with pytest.raises(ValueError, match="240x320, but NYUv2's region is that of 480x640"):
        REGIONS["nyu_eigen"](240, 320)


def test_nyu_counts_raw_depth_strictly_inside_range_and_region(tmp_path: Path) -> None:
    planted = {
        (45, 41): 2, (470, 600): 9999, (200, 300): 1234,
        (44, 300): 1234, (471, 300): 1234, (200, 40): 1234, (200, 601): 1234,  # outside
        (100, 100): 1, (101, 100): 10000, (102, 100): 20000,  # not between 1 mm and 10 m
    }  # fmt: skip
    files = nyu_files((7,)) | {"test/office_0004/depth_0007.png": codes(NYU, planted)}
    row = nyu_row(tmp_path, count=1)
    tar(Path(row.source), files)
    images = open_row(row)
    sample = images.read(0)
    wanted = {(45, 41): 0.002, (470, 600): 9.999, (200, 300): 1.234}
    assert measured(sample) == as_float32(wanted)
    assert sample.image.shape == (480, 640, 3)
    assert tuple(sample.image[0, 0]) == (250, 1, 7)
    assert list(images.keys) == [sample.key] == ["test_office_0004_rgb_0007"]
    assert (sample.metric, sample.source) == (True, "NYUv2")


def test_kitti_is_cut_first_and_masked_in_what_is_left(tmp_path: Path) -> None:
    day, drive = "2011_09_26", "2011_09_26_drive_0002_sync"
    image = f"{day}/{drive}/image_02/data/0000000069.png"
    truth = f"{drive}/proj_depth/groundtruth/image_02/0000000069.png"
    top, left = 23, 13  # of the 352x1216 crop
    planted = {
        (top + 117, left + 43): 256, (top + 320, left + 1171): 80 * 256 - 1,
        (top + 116, left + 43): 256, (top + 321, left + 43): 256, (top + 117, left + 1172): 256,
        (top + 200, left + 500): 80 * 256, (top + 117, left + 42): 256,
    }  # fmt: skip
    pixels = np.zeros((*KITTI, 3), np.uint8)
    pixels[top, left] = (9, 8, 7)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    row = rows("marigold", tmp_path)["KITTI"]
    tar(Path(row.source), {image: buffer.getvalue(), truth: codes(KITTI, planted)})
    assert row.list is not None
    text = f"{image} {truth} 721.5377\n{day}/x/image_02/data/0000000054.png None 721.5377"
    Path(row.list).write_text(text)
    with pytest.raises(ValueError, match="but the published list has 8d0499af.*fetch it again"):
        open_row(replace(row, count=1))
    images = open_row(replace(row, count=1, list_sha256=sha256(text)))
    sample = images.read(0)
    assert sample.image.shape == (352, 1216, 3)
    assert tuple(sample.image[0, 0]) == (9, 8, 7)
    assert measured(sample) == as_float32({(117, 43): 1.0, (320, 1171): (80 * 256 - 1) / 256})
    assert images.list_sha256 == sha256(text)


def test_eth3d_is_headerless_floats_and_infinity_is_no_depth(tmp_path: Path) -> None:
    depth = np.full((6, 8), np.inf, "<f4")
    depth[1, 2], depth[5, 7], depth[0, 0] = 3.25, 400.5, 1e-5
    start = "office_dslr_depth/office/ground_truth_depth/dslr_images"
    files = {
        "rgb/office/images/dslr_images/DSC_0219.JPG": picture(0, (6, 8), "JPEG"),
        f"depth/{start}/DSC_0219.JPG": depth.tobytes(),
    }
    row = rows("marigold", tmp_path)["ETH3D"]
    tar(Path(row.source), files)
    small = {"depth": {"format": "floats", "shape": [6, 8]}}
    images = open_row(other(row, options=small, count=1))
    assert measured(images.read(0)) == {(1, 2): 3.25, (5, 7): 400.5}
    with pytest.raises(ValueError, match=r"DSC_0219.JPG is damaged .*48 numbers are not 4032x6048"):
        open_row(replace(row, count=1)).read(0)


def test_diode_believes_its_mask_files_alone_and_knows_indoors_from_outdoors(tmp_path) -> None:
    files, names = {}, {}
    for part, stem in (("outdoor", "00022_00195_outdoor_010_000"), ("indoors", "00019_00183_in_0")):
        depth = np.full((6, 8, 1), 5.0, np.float32)
        depth[0, 0], depth[0, 1], depth[0, 2], depth[0, 3] = 0.25, 900, np.nan, 0
        kept = np.zeros((6, 8), np.float64)
        kept[0, :5] = 1
        start = f"{part}/scene_00022/scan_00195/{stem}"
        names[part] = f"{start}.png"
        files |= {
            f"{start}.png": picture(1, (6, 8)),
            f"{start}_depth.npy": npy(depth),
            f"{start}_depth_mask.npy": npy(kept),
        }
    row = replace(rows("marigold", tmp_path)["DIODE"], count=2)
    tar(Path(row.source), files)
    images = open_row(row)
    assert list(images.parts) == ["indoor", "outdoor"]  # by file name: 00019 is before 00022
    assert measured(images.read(1)) == {(0, 0): 0.25, (0, 1): 900.0, (0, 4): 5.0}
    assert "indoors" in images.keys[0]
    assert names["outdoor"].replace("/", "_").startswith(images.keys[1])


def test_scannet_keeps_the_order_of_its_list(tmp_path: Path) -> None:
    row, size = rows("marigold", tmp_path)["ScanNet"], (12, 16)
    files, lines = {}, []
    for number, scene in ((300, "scene0406_02"), (100, "scene0088_02"), (200, "scene0645_00")):
        names = [f"{scene}/color/{number:06d}.jpg", f"{scene}/depth/{number:06d}.png"]
        files[names[0]] = picture(number, size, "JPEG")
        files[names[1]] = codes(size, {(3, 4): number})
        lines.append(" ".join(names))
    tar(Path(row.source), dict(sorted(files.items())))
    assert row.list is not None
    Path(row.list).write_text("\n".join(lines))
    images = open_row(replace(row, count=3, list_sha256=sha256("\n".join(lines))))
    depths = [measured(images.read(index)) for index in range(3)]
    assert depths == [as_float32({(3, 4): code / 1000}) for code in (300, 100, 200)]
    assert images.keys[0] == "scene0406_02_color_000300"


def test_ibims_needs_both_masks_and_codes_are_parts_of_50_metres(tmp_path: Path) -> None:
    row, size = rows("scale", tmp_path)["iBims-1"], (12, 16)
    invalid, transparent = np.ones(size, bool), np.ones(size, bool)
    invalid[2, 2], transparent[3, 3] = False, False
    unpack(
        Path(row.source),
        {
            "rgb/corridor_01.png": picture(1, size),
            "depth/corridor_01.png": codes(size, {(1, 1): 13107, (2, 2): 9, (3, 3): 9}),
            "mask_invalid/corridor_01.png": mask(invalid),
            "mask_transp/corridor_01.png": mask(transparent),
        },
    )
    [sample] = map(open_row(replace(row, count=1)).read, [0])
    assert measured(sample) == {(1, 1): 10.0}


def test_sintel_depth_is_little_endian_with_a_tag_and_sky_is_far(tmp_path: Path) -> None:
    row, depth = rows("scale", tmp_path)["Sintel"], np.full((4, 6), 1e6, np.float32)
    depth[0, 5], depth[3, 0] = 1.5, 69.5
    files = {
        "training/final/alley_1/frame_0001.png": picture(1, (4, 6)),
        "training/clean/alley_1/frame_0001.png": b"another pass",
        "training/depth/alley_1/frame_0001.dpt": dpt(depth),
    }
    unpack(Path(row.source), files)
    images = open_row(replace(row, count=1))
    assert measured(images.read(0)) == {(0, 5): 1.5, (3, 0): 69.5}
    assert not images.read(0).metric
    unpack(Path(row.source), {"training/depth/alley_1/frame_0001.dpt": b"HEIP" + bytes(104)})
    with pytest.raises(ValueError, match=r"frame_0001.dpt is damaged .*but a .dpt with 202021.25"):
        images.read(0)


def test_tar_folder_and_zip_give_the_same_images(tmp_path: Path) -> None:
    files = nyu_files()
    sources = [
        nyu_row(tmp_path, source=str(tar(tmp_path / "set.tar", files))),
        nyu_row(tmp_path, source=str(unpack(tmp_path / "folder", files))),
        other(
            nyu_row(tmp_path, source=str(zipped(tmp_path / "set.zip", files, "nyu/labeled/"))),
            options={"under": "nyu/labeled"},
        ),
    ]
    opened = [open_row(row) for row in sources]
    assert len({(tuple(images.keys), images.list_sha256) for images in opened}) == 1
    for index in range(3):
        first, *others = (images.read(index) for images in opened)
        for one in others:
            np.testing.assert_array_equal(one.image, first.image)
            assert measured(one) == measured(first)


def test_a_derived_list_that_equals_the_published_one_has_its_hash(tmp_path: Path) -> None:
    source = str(tar(tmp_path / "set.tar", nyu_files((2, 9, 1))))
    by_hand, as_stored = sha256(published_list(1, 2, 9)), sha256(published_list(2, 9, 1))
    by_name = open_row(nyu_row(tmp_path, source=source, list_sha256=by_hand))
    assert by_name.list_sha256 == by_hand
    assert [key[-4:] for key in by_name.keys] == ["0001", "0002", "0009"]
    kept = open_row(nyu_row(tmp_path, source=source, list_sha256=as_stored))
    assert kept.list_sha256 == as_stored
    assert [key[-4:] for key in kept.keys] == ["0002", "0009", "0001"]
    unknown = open_row(nyu_row(tmp_path, source=source, list_sha256=sha256("another")))
    assert unknown.list_sha256 == by_name.list_sha256
    (tmp_path / "list.txt").write_text(published_list(9, 1))
    few = nyu_row(tmp_path, source=source, list=str(tmp_path / "list.txt"), count=2)
    assert [key[-4:] for key in open_row(replace(few, list_sha256=None)).keys] == ["0009", "0001"]


def test_images_go_to_other_processes_and_threads(tmp_path: Path) -> None:
    images = open_row(nyu_row(tmp_path, source=str(tar(tmp_path / "set.tar", nyu_files()))))
    expected = [measured(images.read(index)) for index in range(3)]
    sent = pickle.loads(pickle.dumps(images))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(sent.read, [0, 1, 2] * 4))
    assert [measured(sample) for sample in found] == expected * 4


def test_a_limit_takes_the_first_images_of_the_same_list(tmp_path: Path) -> None:
    row = nyu_row(tmp_path, source=str(tar(tmp_path / "set.tar", nyu_files())))
    whole, few = open_row(row), open_row(replace(row, limit=2))
    assert (list(few.keys), len(few.parts)) == (list(whole.keys[:2]), 2)
    assert few.list_sha256 == whole.list_sha256
    assert row.protocol() == replace(row, limit=2, source="elsewhere", about="").protocol()
    assert row.protocol() != replace(row, region=None).protocol()


def test_our_own_shards_have_keys_and_a_hash_without_being_read(tmp_path: Path) -> None:
    samples = [
        Sample(
            key=f"image_{number}",
            picture=Image.fromarray(np.full((8, 8, 3), number, np.uint8)),
            metres=np.full((8, 8), 2.0, np.float32),
            valid=np.ones((8, 8), bool),
            metric=True,
            source="test",
            licence="none",
        )
        for number in range(4)
    ]
    write(samples, tmp_path / "set", "set")
    (tmp_path / "keys.txt").write_text("image_3\nimage_1\n")
    row = Row(name="x", shards=str(tmp_path / "set"), keys=str(tmp_path / "keys.txt"), count=2)
    images = open_row(row)
    assert (list(images.keys), list(images.parts)) == (["image_1", "image_3"], [None, None])
    assert images.list_sha256 == sha256("image_1\nimage_3")
    assert [images.read(index).image[0, 0, 0] for index in range(2)] == [1, 3]
    assert pickle.loads(pickle.dumps(images)).read(1).key == "image_3"
    (tmp_path / "keys.txt").write_text("image_3\nimage_7\n")
    with pytest.raises(ValueError, match="lacks 1 images of .*keys.txt: image_7"):
        open_row(row)
