"""Sets that are missing, damaged or misnamed: what it is, and what to do about it."""

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from published import (
    NYU,
    as_float32,
    codes,
    measured,
    nyu_files,
    nyu_row,
    other,
    picture,
    published_list,
    rows,
    tar,
    zipped,
)

from mofo.evaluation.benchmark import Row, choose, open_row, open_rows
from mofo.evaluation.sets.archive import Archive
from mofo.evaluation.sets.decode import DEPTH
from mofo.evaluation.sets.decode import mask as mask_of


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
