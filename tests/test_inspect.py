"""Inspection: planted faults are found, clean real and generated data raise no alarm."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import picture, sparse
from PIL import Image, ImageOps

from mofo.data.convert.samples import Photograph, read
from mofo.data.inspect import SKY, inspect, save
from mofo.data.sample import Sample
from mofo.data.scenes import generate
from mofo.data.shards import Shards
from mofo.data.suspicion import judge, judge_set, measure
from mofo.data.write import write
from mofo.picture import NO_DEPTH

SAMPLES = Path(__file__).parents[1] / "data" / "samples"


@pytest.fixture(scope="module")
def real() -> list[Sample]:
    """All 32 real pairs."""
    names = sorted(path.name.removesuffix("_depth.png") for path in SAMPLES.glob("*_depth.png"))
    return [sample for name in names for sample in read(Photograph(SAMPLES, name))]


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    return [generate(seed, size=(64, 64)) for seed in range(24)]


@pytest.fixture
def samples(request: pytest.FixtureRequest) -> list[Sample]:
    return request.getfixturevalue(request.param)


both = pytest.mark.parametrize("samples", ["real", "scenes"], indirect=True)


def moved(sample: Sample, move: Callable[[np.ndarray], np.ndarray]) -> Sample:
    assert sample.depth is not None
    metres, valid = (np.ascontiguousarray(move(values)) for values in sample.depth)
    return replace(sample, metres=metres, valid=valid, points=None)


def thinned(sample: Sample, count: int) -> Sample:
    assert sample.depth is not None
    metres, valid = sample.depth
    places = np.flatnonzero(valid)
    kept = np.random.default_rng(0).choice(places, min(count, len(places)), replace=False)
    few = np.zeros(valid.size, bool)
    few[kept] = True
    return replace(sample, metres=metres, valid=few.reshape(valid.shape))


def findings(sample: Sample) -> list[str]:
    return [finding.what for finding in judge(sample, measure(sample))]


def findings_of_set(samples: list[Sample]) -> list[str]:
    return [finding.what for finding in judge_set([measure(sample) for sample in samples])]


@both
def test_clean_data_raise_no_alarm(samples: list[Sample]) -> None:
    assert {sample.key: found for sample in samples if (found := findings(sample))} == {}
    assert findings_of_set(samples) == []
    # nor do the halves, which prove less
    assert findings_of_set(samples[::2]) == findings_of_set(samples[1::2]) == []


@both
@pytest.mark.parametrize(
    ("move", "placement"),
    [
        (lambda a: a[:, ::-1], "mirrored"),
        (lambda a: a[::-1], "upside down"),
        (lambda a: a[::-1, ::-1], "turned by 180 degrees"),
        (lambda a: np.roll(a, round(0.03 * a.shape[1]), 1), "shifted left by 3% of its width"),
        (lambda a: np.roll(a, -round(0.06 * a.shape[1]), 0), "shifted down by 6% of its width"),
    ],
)
def test_misplaced_depth_of_a_set_is_found_and_named(
    samples: list[Sample], move: Callable, placement: str
) -> None:
    found = findings_of_set([moved(sample, move) for sample in samples])
    assert f"depth fits the images better {placement}" in found


@pytest.mark.parametrize(
    ("samples", "least"), [("real", 0.4), ("scenes", 0.8)], indirect=["samples"]
)
def test_mirrored_depth_of_a_single_sample_is_mostly_found(
    samples: list[Sample], least: float
) -> None:
    found = [findings(moved(sample, lambda a: a[:, ::-1])) for sample in samples]
    assert np.mean(["depth fits the image better mirrored" in each for each in found]) > least


@both
def test_mirrored_sparse_depth_is_found_in_a_set(samples: list[Sample]) -> None:
    few = [thinned(sample, 1000) for sample in samples]
    assert [found for sample in few if (found := findings(sample))] == []
    assert findings_of_set(few) == []
    mirrored = [moved(sample, lambda a: a[:, ::-1]) for sample in few]
    assert "depth fits the images better mirrored" in findings_of_set(mirrored)


def test_depth_without_neighbours_is_not_judged_by_its_edges(real: list[Sample]) -> None:
    few = thinned(real[0], 60)
    assert measure(few).fits is None
    assert findings(few) == []


@both
def test_depth_of_other_images_is_found_in_a_set(samples: list[Sample]) -> None:
    alike = [sample for sample in samples if sample.shape == samples[-1].shape]
    others = [*alike[1:], alike[0]]
    mixed = [replace(a, metres=b.metres, valid=b.valid) for a, b in zip(alike, others, strict=True)]
    assert "depth does not follow the edges of the images" in findings_of_set(mixed)


@both
def test_pairs_that_stand_on_their_heads_together_are_found_in_a_set(samples: list[Sample]) -> None:
    turned = [
        replace(moved(one, lambda a: a[::-1]), picture=ImageOps.flip(one.picture))
        for one in samples
    ]
    assert findings_of_set(turned) == ["upside down: depth is nearer at the top"]


def test_swapped_channels_of_the_real_photographs_are_found(real: list[Sample]) -> None:
    swapped = [replace(one, picture=Image.fromarray(one.image[..., ::-1])) for one in real]
    assert findings_of_set(swapped) == ["red and blue may be swapped"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (lambda s: {"metres": s.metres * np.float32(1000)}, "wrong unit"),
        (lambda s: {"metres": s.metres / np.float32(1000)}, "wrong unit"),
        (lambda s: {"metres": np.where(s.valid, np.float32(3), np.float32(0))}, "constant depth"),
        (lambda s: {"picture": Image.new("RGB", s.picture.size, "grey")}, "blank image"),
        (lambda s: {"intrinsics": np.diag([64000.0, 64000, 1])}, "implausible intrinsics"),
        (lambda s: {"intrinsics": np.diag([0.64, 0.64, 1])}, "implausible intrinsics"),
    ],
)
def test_a_fault_of_one_sample_is_found_and_named(
    scenes: list[Sample], changes: Callable, what: str
) -> None:
    assert findings(replace(scenes[0], **changes(scenes[0]))) == [what]


def test_a_relative_depth_has_no_wrong_unit(scenes: list[Sample]) -> None:
    assert scenes[0].metres is not None
    large = replace(scenes[0], metres=scenes[0].metres * np.float32(1000), metric=False)
    assert findings(large) == []


def test_a_finding_says_the_statistic_and_its_limit(scenes: list[Sample]) -> None:
    assert scenes[0].metres is not None
    large = replace(scenes[0], metres=scenes[0].metres * np.float32(1000))
    (finding,) = judge(large, measure(large))
    assert re.fullmatch(
        rf"{large.key}: wrong unit \(median [\d.]+ m, not in 0.1..150\)", str(finding)
    )


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """12 samples, dense, sparse and without depth; two have one image, and one is damaged."""
    dense = [picture(k, size=(48, 64)) for k in range(4)]
    again = replace(dense[0], key="again", captions=("<b>bold & bad</b>",))
    rest = [picture(9, depth=False), *(sparse(k, size=(48, 64)) for k in range(6))]
    write([*dense, again, *rest], tmp_path / "set", "mixed")
    shards = Shards(tmp_path / "set")
    offset, size, _ = shards._indices[0,].rows[2][1]["png"]
    tar = tmp_path / "set" / "mixed-000000.tar"
    data = bytearray(tar.read_bytes())
    data[offset + size // 2] ^= 255
    tar.write_bytes(data)
    return tmp_path / "set"


def test_repeated_and_damaged_samples_of_a_set_are_named(mixed: Path) -> None:
    report = inspect(mixed)
    found = {finding.what: str(finding) for finding in report.findings}
    assert "picture-0000 = again" in found["duplicate image"]
    assert "picture-0000 = again" in found["duplicate depth"]
    assert "picture-0002" in found["damaged"]
    assert "checksum" in found["damaged"]
    assert len(report.cards) == 11


def test_repeats_are_found_also_among_samples_that_were_not_seen(mixed: Path) -> None:
    assert any(f.what == "duplicate image" for f in inspect(mixed, num_samples=1).findings)


def test_the_text_holds_the_manifest_and_each_source(mixed: Path) -> None:
    text = inspect(mixed).text()
    parts = ("12 in 1 shard", "depth 11, points 6", "CC BY 4.0", "metric depth", "24x32 to 48x64")
    for part in parts:
        assert part in text
    assert re.search(r"^ +11 +\d+\.\d\d% +test ", text, re.MULTILINE)


def test_captions_of_an_overlay_are_counted_and_shown(tmp_path: Path) -> None:
    samples = [picture(k) if k == 0 else replace(picture(k), captions=()) for k in range(4)]
    write(samples, tmp_path / "set", "some")
    assert "captions 1\n" in inspect(tmp_path / "set").text()
    rows = [
        {"format": 1, "model": "m"},
        *({"index": k, "key": f"picture-000{k}", "captions": ["a wall"]} for k in (1, 2)),
        {"index": 3, "key": "picture-0003", "captions": []},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "set" / "captions.jsonl").write_text(lines)
    report = inspect(tmp_path / "set")
    assert "captions 1 and 2 in captions.jsonl\n" in report.text()
    shown = [card.caption for card in report.cards]
    assert shown == ["picture number 0, naïve", "a wall", "a wall", "no caption"]


def test_sky_has_a_colour_of_its_own(tmp_path: Path) -> None:
    one = picture(0, size=(192, 256))
    sky = ~one.depth[1]
    sky[:, :128] = False
    write([replace(one, sky=sky)], tmp_path / "set", "one")
    [card] = inspect(tmp_path / "set").cards
    depth = card.pictures[1]
    assert (depth[sky] == SKY).all()
    assert (depth[~sky & ~one.depth[1]] == NO_DEPTH).all()
    assert card.about.endswith("blue: sky")


def test_the_same_seed_shows_the_same_samples(mixed: Path) -> None:
    first, again, other = (inspect(mixed, num_samples=4, seed=seed) for seed in (1, 1, 2))
    keys = [[card.key for card in report.cards] for report in (first, again, other)]
    assert keys[0] == keys[1] != keys[2]


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(
    mixed: Path, tmp_path: Path
) -> None:
    save(inspect(mixed), tmp_path / "look")
    page = (tmp_path / "look" / "index.html").read_text()
    assert all(source.startswith("data:image/png") for source in re.findall('src="([^"]*)', page))
    assert page.count("<img") == 3 * 10 + 1
    assert not re.search("https?://", page)
    assert "&lt;b&gt;bold &amp; bad&lt;/b&gt;" in page
    with Image.open(tmp_path / "look" / "sheet.png") as sheet:
        assert sheet.width >= 2 * 3 * 256


def test_depth_is_drawn_where_it_lies(tmp_path: Path) -> None:
    """One point of a large image, near the lower right corner: alone it is drawn 3 pixels wide."""
    one = replace(sparse(0, size=(480, 640)), points=np.float32([[600, 450, 2]]), sky=None)
    write([one], tmp_path / "set", "one")
    _, depth, _ = inspect(tmp_path / "set").cards[0].pictures
    coloured = np.argwhere((depth != depth[0, 0]).any(-1))
    assert depth.shape == (192, 256, 3)
    assert len(coloured) <= 16
    np.testing.assert_allclose(coloured.mean(0), (450 * 0.4, 600 * 0.4), atol=3)


def test_tars_without_a_manifest_are_described_by_what_was_seen(mixed: Path) -> None:
    text = inspect(f"{mixed}/*.tar").text()
    assert "of the 11 samples seen:" in text
    assert "hash" not in text


def test_no_samples_to_look_at_is_refused(mixed: Path) -> None:
    with pytest.raises(ValueError, match="num_samples is 0"):
        inspect(mixed, num_samples=0)
