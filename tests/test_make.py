"""Making sets: any number of processes, one result; what cannot be had is named."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from made_sets import contents, plant, start, write_source
from PIL import Image

from mofo.data.convert import generated, samples
from mofo.data.make import converters, load, make, summary
from mofo.data.sample import Sample
from mofo.data.shards import Shards

ROOT = Path(__file__).parents[1]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with plant(tmp_path / "converters", monkeypatch) as converter:
        yield converter


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


# One result.


def test_a_set_is_made_as_its_converter_finds_it(planted, source: Path, tmp_path: Path) -> None:
    assert start(source, tmp_path / "out")
    shards = Shards(tmp_path / "out")
    read = [shards.read(index) for index in range(len(shards))]
    stems = [path.stem for path in sorted(source.glob("image*"))]
    assert [one.key for one in read] == [f"{stem}_{part}" for stem in stems for part in range(2)]
    for one in read:
        path = source / f"{one.key[:-2]}.png"
        assert one.image_bytes == path.read_bytes()
        np.testing.assert_array_equal(one.metres, np.asarray(Image.open(path))[..., 0] / 2)
    manifest = shards.manifest
    # Items 0 to 3 are empty, empty, empty, image-00: a shard holds what its run of items gives.
    assert [shard["samples"] for shard in manifest["shards"]] == [2, 8, 8, 8, 8, 6]
    made_from = {"converter": "planted", "version": 1, "samples_per_shard": 8}
    assert manifest["made_from"] == made_from | {"source": str(source), "last": None}
    assert manifest["bad"] == {"items": 0, "reasons": {}, "first": []}


def test_a_finished_set_is_left_alone_and_another_one_refused(
    planted, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert start(source, out)
    before = contents(out)
    assert not start(source, out)
    for changes in ({"last": 20}, {"samples_per_shard": 6}):
        with pytest.raises(
            ValueError, match="holds the finished set 'planted'.*delete that folder"
        ):
            start(source, out, **changes)
    planted.VERSION = 2
    with pytest.raises(ValueError, match=r"\(version: 1 there, 2 here\)"):
        start(source, out)
    (out / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds parts of the set 'planted'.*delete that folder"):
        start(source, out)
    (out / "manifest.json").write_bytes(before["manifest.json"])
    assert contents(out) == before


def test_an_option_given_as_it_is_by_default_is_no_other_option(
    planted, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert start(source, out)
    assert not start(source, out, last=None)
    # Sets of format 1 stored only what was given.
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"last": null', '"samples_per_shard": 8'))
    assert not start(source, out)


def test_processes_change_no_byte(tmp_path: Path) -> None:
    """Also none of the sidecars and the manifest; a shipped one, so that processes find it."""
    options = {"split": "test", "count": 10, "size": [8, 8], "samples_per_shard": 2}
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        assert make(folder, converter="generated", processes=processes, **options)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert Shards(tmp_path / "3").manifest["samples"] == 10


def test_items_without_samples_make_no_shard_but_are_remembered(
    planted, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    start(source, out, samples_per_shard=2)
    names = [shard["name"] for shard in Shards(out).manifest["shards"]]
    # The first three items are empty, and each item has a shard.
    assert names == [f"planted-{number:06d}.tar" for number in range(3, 23)]
    assert sorted(path.name for path in out.glob("*.tar")) == names
    whole = contents(out)
    (out / "manifest.json").unlink()
    (out / "planted-000002.idx.json").unlink()
    asked = []
    read = planted.read
    planted.read = lambda item: asked.append(item[0].stem) or read(item)
    start(source, out, samples_per_shard=2)
    assert asked == ["empty-07"]
    assert contents(out) == whole
    empty = [str(source / f"empty-{number:02d}.png") for number in (5, 6, 7)]
    assert Shards(out).manifest["empty"] == {"items": 3, "first": empty}
    num_bytes = sum(path.stat().st_size for path in out.glob("*.tar"))
    assert summary(out).splitlines() == [
        f"{out}: 40 samples in 20 shards, {num_bytes / 1e6:.1f} MB",
        "left out: 3 items in which nothing usable is measured, such as",
        *(f"  {name}" for name in empty),
    ]


def test_a_source_is_the_same_from_wherever_it_is_named(
    planted, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert start(Path(source.name), tmp_path / "out")
    assert not start(source, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_source(tmp_path / "elsewhere" / source.name)
    with pytest.raises(ValueError, match="made otherwise .source: .*there, .*elsewhere.* here"):
        start(Path(source.name), tmp_path / "out")


# What cannot be had.


def test_bad_items_are_left_out_counted_and_named(
    planted, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "image-10.png").write_bytes((source / "image-10.png").read_bytes()[:60])
    (source / "image-11.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 6)).save(source / "image-12.png")
    with pytest.raises(ValueError, match=r"(?s)4 items.*image-1[012].*max_bad_fraction=0.05"):
        start(source, tmp_path / "out", max_bad_fraction=0.05)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with caplog.at_level(logging.WARNING):
        assert start(source, tmp_path / "out", max_bad_fraction=0.1)
    shards = Shards(tmp_path / "out")
    keys = [shards.read(index).key for index in range(len(shards))]
    assert len(keys) == 2 * (20 - 3)
    assert not any(key.startswith(("image-10", "image-11", "image-12")) for key in keys)
    bad = shards.manifest["bad"]
    assert bad["items"] == 4
    # Numbers are masked, so that equal reasons are counted together.
    empty = "ValueError: image-#_#: depth has no measured pixel; leave metres, valid and points out"
    assert bad["reasons"][empty] == 2
    assert any(reason.startswith("UnidentifiedImageError") for reason in bad["reasons"])
    assert [str(source / "image-10.png") in item for item, _ in bad["first"]] == [
        True,
        *[False] * 3,
    ]
    assert "4 items" in caplog.text
    start(source, tmp_path / "again", max_bad_fraction=0.1)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_what_the_file_system_did_not_give_is_asked_for_again(
    planted, source: Path, tmp_path: Path
) -> None:
    os.chmod(source / "image-10.png", 0o644)
    read = planted.read

    def sick(item):
        if item[0].stem == "image-10":
            raise OSError(errno.EIO, "Input/output error")
        yield from read(item)

    planted.read = sick
    with pytest.raises(ValueError, match="(?s)1 x not readable: Input/output error"):
        start(source, tmp_path / "out", max_bad_fraction=0.0)
    planted.read = read
    assert start(source, tmp_path / "out", max_bad_fraction=0.0)
    start(source, tmp_path / "afresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "afresh")


def test_a_key_that_two_items_have_is_refused(planted, source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "image-03.png", source / "image-03_.png")
    (source / "image-03_.png").rename(source / "image-22_.png")
    with pytest.raises(ValueError, match=r"'image-22_0' occurs twice, in planted-000005.tar"):
        start(source, tmp_path / "out")


def test_two_files_with_one_key_are_named_before_anything_is_written(tmp_path: Path) -> None:
    for name in ("a/b.png", "a_b.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(path)
    with pytest.raises(ValueError, match=r"a/b.png and .*a_b.png would both have the key 'a_b"):
        make(tmp_path / "out", converter="images", source=tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_converter_itself_is_no_bad_item(
    planted, source: Path, tmp_path: Path
) -> None:
    planted.read = lambda item: iter([item.missing])
    with pytest.raises(AttributeError, match="missing"):
        start(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"converter": "kitty"}, "kitty.*generated"),
        ({"converter": "generated", "count": 3}, r"generated.*give it \['split'\]"),
        ({"converter": "generated", "split": "test", "count": 3, "sice": 1}, r"not \['sice'\]"),
        ({"converter": "generated", "split": "test", "count": 3, "source": "x"}, "not .*source"),
        ({"converter": "generated", "split": "none", "count": 3}, "split is 'none'"),
        ({"converter": "generated", "split": "test", "count": 0}, "count is 0"),
        ({"converter": "vkitti2"}, r"vkitti2.*give it \['source'\]"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# What is shipped and what is shown.


def test_the_worked_example_of_the_documentation_works(
    planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "data/README.md").read_text().split("## A new set")[1]
    program = text.split("```python\n")[1].split("```")[0]
    (tmp_path / "converters" / "rooms.py").write_text(program)
    source = tmp_path / "rooms" / "train"
    source.mkdir(parents=True)
    metres = np.array([[0, 1.5], [np.nan, 4.0]])
    for name, depth in (("a", metres), ("b", np.zeros((2, 2)))):
        Image.new("RGB", (2, 2), (9, 9, 9)).save(source / f"{name}.jpg")
        np.save(source / f"{name}.npy", depth)
        (source / f"{name}.txt").write_text(f"room {name}\n")
    make(tmp_path / "out", converter="rooms", source=source.parent, split="train")
    shards = Shards(tmp_path / "out")
    assert len(shards) == 1
    assert shards.read(0).captions == ("room a",)
    np.testing.assert_array_equal(shards.read(0).valid, [[False, True], [False, True]])
    np.testing.assert_allclose(shards.read(0).metres[:, 1], [1.5, 4.0], atol=1e-4)
    with pytest.raises(ValueError, match="holds no pictures; expected"):
        make(tmp_path / "none", converter="rooms", source=source.parent, split="test")


def test_every_converter_keeps_the_protocol() -> None:
    for name in converters():
        module = load(name)
        assert module.VERSION >= 1
        assert module.LICENCE
        assert callable(module.find)
        assert callable(module.read)
        assert module.__doc__


def test_a_scene_is_the_same_whenever_it_is_made() -> None:
    items = generated.find(split="train", count=3, seed=2, size=[8, 8])
    assert [item.seed for item in items] == [2_000_000, 2_000_001, 2_000_002]
    (first,), (again,) = generated.read(items[1]), generated.read(items[1])
    assert first.key == again.key
    np.testing.assert_array_equal(first.image, again.image)


def test_the_real_photographs_are_all_there_with_their_terms() -> None:
    folder, splits = ROOT / "data/samples", ROOT / "data/splits"

    def read(split: str) -> dict[str, Sample]:
        items = samples.find(folder, keys=str(splits / f"real_{split}.txt"))
        return {sample.key: sample for item in items for sample in samples.read(item)}

    train, test = read("train"), read("test")
    assert (len(train), len(test)) == (26, 6)
    assert not set(train) & set(test)
    for key, sample in {**train, **test}.items():
        sample.check()
        row = json.loads((folder / f"{key}.json").read_text())
        assert sample.valid.mean() == pytest.approx(row["valid_fraction"], abs=2e-4)
        assert sample.metres[sample.valid].max() == pytest.approx(row["depth_max"], rel=1e-3)
        assert sample.captions[0].startswith("a photo of ")
        assert row["licence"] in sample.licence
    road = [sample for key, sample in train.items() if key.startswith("zod")]
    assert all(sample.intrinsics is None for sample in road)
    assert all("Zenseact" in sample.licence and "intention" in sample.licence for sample in road)
