"""Published archives as they are: planted depth comes out where it was planted, no other does."""

import hashlib
import io
import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published import codes, dpt, mask, npy, other, picture, rows, tar, unpack, zipped

from mofo.data.sample import Sample
from mofo.data.write import write
from mofo.evaluation.benchmark import Row, choose, open_row, open_rows
from mofo.evaluation.sets.archive import Archive
from mofo.evaluation.sets.decode import DEPTH
from mofo.evaluation.sets.decode import mask as mask_of
from mofo.evaluation.sets.regions import REGIONS

GOLDEN = np.load(Path(__file__).parent / "golden/eval_golden_public.npz")
NYU, KITTI = (480, 640), (375, 1242)


def measured(sample: Sample) -> dict[tuple[int, int], float]:
    """Depth in metres at every measured pixel."""
    assert sample.metres is not None
    assert sample.valid is not None
    assert not sample.metres[~sample.valid].any()
    at = [(int(y), int(x)) for y, x in np.argwhere(sample.valid)]
    return {pixel: float(sample.metres[pixel]) for pixel in at}


def as_float32(planted: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    return {at: float(np.float32(value)) for at, value in planted.items()}


def nyu_files(numbers: tuple[int, ...] = (2, 1, 9)) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for number in numbers:
        start = f"test/{'office' if number > 5 else 'kitchen'}_0004/"
        depth = codes(NYU, {(60, 60): 1000 + number})
        files[f"{start}rgb_{number:04d}.png"] = picture(number, NYU)
        files[f"{start}depth_{number:04d}.png"] = depth
        files[f"{start}filled_{number:04d}.png"] = codes(NYU, {(60, 60): 9})
    files["train/office_0001/rgb_0100.png"] = b"not looked at"
    return files


def nyu_row(tmp_path: Path, **changes) -> Row:
    return replace(rows("marigold", tmp_path)["NYUv2"], **{"count": 3, **changes})


def published_list(*numbers: int) -> str:
    """As Marigold's list is written: no line feed at the end."""
    lines = []
    for number in numbers:
        start = f"test/{'office' if number > 5 else 'kitchen'}_0004"
        names = (f"{start}/{kind}_{number:04d}.png" for kind in ("rgb", "depth", "filled"))
        lines.append(" ".join(names))
    return "\n".join(lines)


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


def test_missing_files_are_named_with_where_to_get_the_set(tmp_path: Path) -> None:
    row = nyu_row(tmp_path, count=12)
    with pytest.raises(ValueError, match="nyu_labeled_extracted.tar does not exist; fetch nyuv2/"):
        open_row(row)
    files = nyu_files(tuple(range(12)))
    tar(Path(row.source), {name: files[name] for name in files if "depth" not in name})
    with pytest.raises(ValueError, match="lacks 12 files") as caught:
        open_row(row)
    text = str(caught.value)
    assert "lacks 12 files: test/kitchen_0004/depth_0000.png, test/kitchen_0004/depth_0001" in text
    assert text.count("depth_") == 10
    assert "and 2 more; fetch nyuv2/nyu_labeled_extracted.tar from share.phys.ethz.ch" in text
    kitti = rows("marigold", tmp_path)["KITTI"]
    tar(Path(kitti.source), {})
    with pytest.raises(ValueError, match="eigen_test_files_with_gt.txt does not exist; fetch"):
        open_row(kitti)


def test_a_wrong_count_a_twin_and_an_empty_set_are_refused(tmp_path: Path) -> None:
    source = str(tar(tmp_path / "set.tar", nyu_files()))
    with pytest.raises(ValueError, match="has 3 images, but the set has 654; fetch nyuv2/"):
        open_row(nyu_row(tmp_path, source=source, count=654))
    (tmp_path / "list.txt").write_text(published_list(1, 1))
    twins = nyu_row(tmp_path, source=source, list=str(tmp_path / "list.txt"), list_sha256=None)
    with pytest.raises(ValueError, match="key 'test_kitchen_0004_rgb_0001' occurs twice"):
        open_row(replace(twins, count=2))
    with pytest.raises(ValueError, match="has 0 images, but the set has some"):
        open_row(nyu_row(tmp_path, source=str(tar(tmp_path / "no.tar", {})), count=None))


def test_a_damaged_image_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    files = nyu_files()
    name = "test/kitchen_0004/depth_0001.png"
    files[name] = files[name][:100]
    files["test/kitchen_0004/rgb_0002.png"] = b"no picture"
    files["test/office_0004/depth_0009.png"] = codes(NYU, {})
    images = open_row(nyu_row(tmp_path, source=str(tar(tmp_path / "set.tar", files))))
    with pytest.raises(ValueError, match=rf"set.tar: {name} is damaged"):
        images.read(0)
    words = r"rgb_0002.png is damaged \(UnidentifiedImageError: 10 bytes are no picture"
    with pytest.raises(ValueError, match=words):
        images.read(1)
    with pytest.raises(ValueError, match="office_0004_rgb_0009: no pixel has measured depth"):
        images.read(2)
    files = nyu_files()
    files[name] = codes((12, 16), {(1, 1): 5})
    images = open_row(nyu_row(tmp_path, source=str(tar(tmp_path / "set.tar", files))))
    with pytest.raises(ValueError, match=r"different sizes: \[\(12, 16\), \(480, 640\)\]"):
        images.read(0)
    assert measured(images.read(1)) == as_float32({(60, 60): 1.002})


def test_what_is_no_plain_archive_says_what_to_do(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"neither a zip nor a plain tar .*; decompress it"):
        Archive(tmp_path / "set.tar.gz")
    path = zipped(tmp_path / "set.zip", {"a": b"stored as it is", "b": b"deflated" * 9})
    archive = Archive(path)
    assert [archive.read(name) for name in archive.names()] == [b"stored as it is", b"deflated" * 9]
    data = path.read_bytes()
    path.write_bytes(data.replace(b"stored as it is", b"stored as it was"[:15]))
    with pytest.raises(ValueError, match="a is damaged .*checksum is wrong"):
        Archive(path).decode("a", bytes)
    cut = tar(tmp_path / "cut.tar", {"a": bytes(3000)})
    archive = Archive(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut.tar: a is damaged .*the archive is cut short"):
        archive.decode("a", bytes)


def test_an_archive_that_is_cut_short_is_to_be_fetched_again(tmp_path: Path) -> None:
    whole = tar(tmp_path / "set.tar", {"a": bytes(3000), "b": bytes(3000)})
    for name, data in (
        ("set.tar", whole.read_bytes()[:2000]),
        ("none.tar", b""),
        ("set.zip", zipped(tmp_path / "whole.zip", {"a": b"stored"}).read_bytes()[:-9]),
    ):
        (tmp_path / name).write_bytes(data)
        words = rf"{name} is cut short at {len(data)} bytes \(.*\); fetch it again$"
        with pytest.raises(ValueError, match=words):
            Archive(tmp_path / name)


def test_bytes_that_are_no_numpy_file_are_not_to_be_unpickled() -> None:
    for decoder in (DEPTH["npy"], mask_of):
        with pytest.raises((ValueError, OSError), match="no picture|no file") as caught:
            decoder(b"\x80garbage")
        assert "pickle" not in str(caught.value)
        assert " at 0x" not in str(caught.value)


def test_all_sets_that_are_missing_are_named_at_once_with_where_to_get_each(tmp_path) -> None:
    chosen = list(rows("marigold", tmp_path).values())
    with pytest.raises(ValueError, match="^5 of 5 sets cannot be opened") as caught:
        open_rows(chosen)
    said = str(caught.value).split("\n")
    assert [line.strip().partition(":")[0] for line in said[1:6]] == [row.name for row in chosen]
    for line, row in zip(said[1:], chosen, strict=False):
        assert line.endswith(row.download)
    assert "'source={SET: PATH}'" in said[-1]


def test_a_limit_is_a_number_of_images() -> None:
    for limit in (-1, 0):
        with pytest.raises(ValueError, match=f"limit is {limit}, but must be a whole number"):
            Row(name="rooms", limit=limit)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "a/../../b.png", "a\\b.png"])
def test_a_list_never_leaves_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "outside.png").write_bytes(picture(1, NYU))
    (tmp_path / "list.txt").write_text(f"{name} {name}")
    source = {"source": str(tmp_path / "set"), "list": str(tmp_path / "list.txt"), "count": 1}
    with pytest.raises(ValueError, match="is not inside of"):
        open_row(nyu_row(tmp_path, **source, list_sha256=None))


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


def test_a_row_or_option_that_means_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reader is 'zip', but must be one of: shards, pairs, nyu"):
        Row(name="x", reader="zip")
    with pytest.raises(
        ValueError, match="region is 'eigne', but must be one of: None, kitti, garg"
    ):
        Row(name="x", reader="pairs", region="eigne")
    row = nyu_row(tmp_path)
    with pytest.raises(ValueError, match=r"size is \[4, 4\], but the reader pairs takes none"):
        replace(row, size=[4, 4])
    for options, reason in (
        ({"colums": []}, "unexpected keyword argument 'colums'"),
        ({"masks": [1]}, "masks are numbers of later ones"),
        ({"depth": {"format": "exr"}}, "format must be one of"),
    ):
        with pytest.raises(
            ValueError, match=f"options are not those of a pairs reader: .*{reason}"
        ):
            open_row(other(row, options=options))


def test_a_set_that_a_protocol_does_not_define_is_refused_with_those_it_does(tmp_path) -> None:
    known = list(rows("marigold", tmp_path).values())
    chosen = choose(known, ["DIODE", "NYUv2"], "marigold@1")
    assert [row.name for row in chosen] == ["NYUv2", "DIODE"]
    assert choose(known, None, "marigold@1") == known
    with pytest.raises(
        ValueError, match="marigold@1 does not define the sets GSO; it defines: NYU"
    ):
        choose(known, ["NYUv2", "GSO"], "marigold@1")


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
