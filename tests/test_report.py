"""The report from lines alone: means, intervals, differences against plain numpy; the formats."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_lines import FIT, HASHES, MARIGOLD, MOGE, ROW, lines_of, write_run

from mofo.evaluation.merge import merge, uncompared
from mofo.evaluation.overview import overviews
from mofo.evaluation.page import _reach, html_page
from mofo.evaluation.pictures import chosen_keys, draw, picture_folder, picture_paths
from mofo.evaluation.plots import HEIGHT, TOP, distribution
from mofo.evaluation.report import SECTIONS, report
from mofo.evaluation.tables import average, from_plain, tables

ROOT = Path(__file__).parents[1]
HOSTILE = "<b>ours_1</b> & 100%"
FAILED = {2: "no pixel has measured depth", 5: "the image cannot be read: <broken> & cut"}


def tables_of(*groups: list[dict]) -> list:
    return tables(merge({"run": [line for group in groups for line in group]}))


def absrel_of(lines: list[dict], fit: str = "affine") -> np.ndarray:
    return np.array([line["fits"][fit]["absrel"] for line in lines if line["fits"]])


def flat(record: dict, prefix: str = "") -> dict[str, float]:
    """{"depth": {"rel": 1}} as {"depth/rel": 1}."""
    found = {}
    for key, value in record.items():
        found |= (
            flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def test_aggregation_equals_the_reference_with_its_gaps() -> None:
    golden = np.load(ROOT / "tests/golden/eval_golden_public.npz")
    given = json.loads(str(golden["aggregate_json"]))
    got = average(flat(record) for record in given["input"])
    assert got == flat(given["key_average"])


def test_absent_and_null_numbers_are_left_out_of_their_mean() -> None:
    assert average([{"a": 1.0, "b": None}, {"a": 3.0}, {"a": float("nan")}]) == {"a": 2.0}


def test_a_table_has_the_means_and_counts_of_its_lines() -> None:
    lines = lines_of(num=30, failed=FAILED)
    lines[7] |= {"num_nonfinite": 3, "num_nonpositive": 2}
    lines[8] |= {"num_nonpositive": 4}
    [table] = tables_of(lines)
    [entry] = table.entries
    assert (table.protocol, table.set, table.fit) == ("marigold@1", "NYUv2", "affine")
    assert table.list_sha256 == HASHES["NYUv2"]
    absrel = absrel_of(lines)
    assert entry.means["absrel"] == np.mean(absrel)
    assert entry.means["delta1"] == pytest.approx(np.mean(np.exp(-3 * absrel)), rel=1e-12)
    assert entry.num_images == 28
    assert entry.num_valid == sum(1000 + i for i in range(30) if i not in FAILED)
    assert (entry.num_nonfinite, entry.num_nonpositive) == (3, 6)
    assert entry.failed == {f"image_{i:04d}": why for i, why in FAILED.items()}
    low, high = entry.intervals["absrel"]
    assert (high - low) / 2 == pytest.approx(1.96 * absrel.std() / 28**0.5, rel=0.1)


def test_a_difference_is_the_mean_over_the_images_that_both_have() -> None:
    one, other = lines_of("one", failed=FAILED), lines_of("other", seed=1, failed={9: "broken"})
    [table] = tables_of(one, other)
    [difference] = table.differences
    both = [k for k in range(20) if k not in (*FAILED, 9)]
    per_image = [
        one[k]["fits"]["affine"]["absrel"] - other[k]["fits"]["affine"]["absrel"] for k in both
    ]
    assert (difference.first, difference.second, difference.num_images) == ("one", "other", 17)
    assert difference.means["absrel"] == pytest.approx(np.mean(per_image), rel=1e-12)
    low, high = difference.intervals["absrel"]
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(per_image) / 17**0.5, rel=0.2)


def test_each_fit_has_a_table_of_those_it_suits() -> None:
    made = tables_of(
        lines_of("ours", settings=MOGE), lines_of("theirs", settings=MOGE, kind="disparity")
    )
    assert {table.fit: [entry.predictor for entry in table.entries] for table in made} == {
        "scale": ["ours"],
        "affine": ["ours"],
        "disparity": ["ours", "theirs"],
    }


def test_parts_stand_apart_and_count_once_in_the_whole() -> None:
    lines = lines_of(set_name="DIODE", parts=("indoor", "outdoor"))
    whole, indoor, outdoor = tables_of(lines)
    assert [table.name for table in (whole, indoor, outdoor)] == [
        "DIODE", "DIODE indoor", "DIODE outdoor",
    ]  # fmt: skip
    assert indoor.entries[0].means["absrel"] == np.mean(absrel_of(lines)[0::2])
    assert outdoor.entries[0].means["absrel"] == np.mean(absrel_of(lines)[1::2])
    [seen] = overviews([whole, indoor, outdoor])
    assert seen.sets == ["DIODE"]


def test_a_predictor_that_never_scored_is_listed_in_its_main_table() -> None:
    failed = dict.fromkeys(range(20), "out of memory")
    [table] = tables_of(lines_of("ours"), lines_of("theirs", failed=failed))
    ours, theirs = table.entries
    assert (theirs.num_images, len(theirs.failed), theirs.means) == (0, 20, {})
    assert ours.is_ranked
    assert not theirs.is_ranked
    [alone] = tables_of(lines_of("theirs", kind="disparity", failed=failed))
    assert alone.fit == "disparity"


def test_a_fit_that_an_image_lacks_is_named_for_that_image() -> None:
    lines = lines_of(settings=MOGE)
    del lines[4]["fits"]["scale"]
    scale, affine, _ = tables_of(lines)
    assert scale.entries[0].failed == {"image_0004": "the fit 'scale' gave no score"}
    assert not affine.entries[0].failed


def test_runs_of_different_sets_are_one_predictor_and_equal_baselines_stand_once() -> None:
    constant = {"predictor": "constant", "weights": None, "error": 0.4}
    lines = merge(
        {
            "a": lines_of() + lines_of(**constant),
            "b": lines_of(set_name="KITTI") + lines_of(**constant),
        }
    )
    assert {line["predictor"] for line in lines} == {"mofo", "constant"}
    assert len(lines) == 60


def test_predictors_that_differ_are_told_apart_by_their_runs() -> None:
    lines = merge({"a": lines_of(), "b": lines_of(seed=3), "c": lines_of(weights="beef" * 16)})
    assert [table.entries for table in tables(lines)][0][2].weights == "beef" * 16
    assert list(dict.fromkeys(x["predictor"] for x in lines)) == [
        "mofo (a)",
        "mofo (b)",
        "mofo (c)",
    ]
    assert {line["name"] for line in lines} == {"mofo"}
    lines = merge({"a": lines_of(), "b": lines_of(predictor_settings={"num_steps": 4})})
    assert len({line["predictor"] for line in lines}) == 2


def test_an_image_that_failed_in_one_run_has_its_score_of_the_other() -> None:
    for runs in (
        {"a": lines_of(failed=FAILED), "b": lines_of()},
        {"a": lines_of(), "b": lines_of(failed=FAILED)},
    ):
        lines = merge(runs)
        assert len(lines) == 20
        assert not any(line["failed"] for line in lines)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": MARIGOLD | {"least": 0.5}}, "marigold@1 does not .* least is 1e-06 or 0.5"),
        ({"row": ROW | {"high": 80.0}}, "marigold@1 NYUv2 does not .* high is 10.0 or 80.0"),
    ],
)
def test_one_name_for_two_rules_is_refused(tmp_path, changes, said) -> None:
    first = write_run(tmp_path / "a", lines_of())
    second = write_run(tmp_path / "b", lines_of("other", **changes))
    with pytest.raises(ValueError, match=said):
        report(first, second, out=tmp_path / "both")


def test_other_places_and_limits_are_the_same_rules(tmp_path) -> None:
    first = lines_of(num=20, row=ROW | {"source": "/elsewhere"})
    second = lines_of("other", num=10, row=ROW | {"limit": 10, "about": "Other words."})
    [table] = tables(merge({"a": first, "b": second}))
    assert (table.list_count, table.limit) == (20, None)
    assert table.differences[0].num_images == 10
    [cut] = tables_of(second)
    assert cut.limit == 10
    assert "the first 10 images" in report(write_run(tmp_path / "cut", second))
    of_many = lines_of(num=10, row=ROW | {"limit": 10}, list_count=654)
    text = report(write_run(tmp_path / "of_many", of_many))
    assert "the first 10 of 654 images" in text
    assert "† only some images of the set's list were looked at" in text
    assert "§" not in text


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"list_sha256": "ee" * 32}, "their lists of images differ, d9a47a15 and eeeeeeee"),
        ({"settings": MOGE}, "their protocols differ, marigold@1 and moge@1"),
        ({"kind": "disparity"}, "no fit of marigold@1 suits both"),
    ],
)
def test_what_cannot_be_compared_says_why(tmp_path, other, why) -> None:
    ours, theirs = lines_of(), lines_of("theirs", **other)
    made = tables(merge({"a": ours, "b": theirs}))
    assert not any(table.differences for table in made)
    [said] = uncompared(made)
    assert f"mofo and theirs are not compared on NYUv2: {why}" in said
    runs = [write_run(tmp_path / "a", ours), write_run(tmp_path / "b", theirs)]
    assert why in report(*runs, out=tmp_path / "both")
    for name in ("html", "md", "json"):
        assert why in (tmp_path / f"both/report.{name}").read_text()


@pytest.fixture(scope="module")
def rich(tmp_path_factory) -> Path:
    """A run with hostile names, failures, parts, uncertainty and pictures; reported."""
    folder = tmp_path_factory.mktemp("rich") / "run"
    diode = {"set_name": "DIODE", "parts": ("indoor", "outdoor"), "num_valid": 654_321_987}
    groups = [
        lines_of(HOSTILE, failed=FAILED, uncertain=True),
        lines_of("constant", error=0.5, weights=None, order=(0, 1)),
        lines_of(HOSTILE, **diode, order=(1, 0)),
        lines_of("constant", error=0.5, weights=None, **diode, order=(1, 1)),
    ]
    for line in groups[2] + groups[3]:
        line["fits"]["affine"] |= {"boundary_f1": 0.5, "rmse": 12.345}
    write_run(folder, *groups)
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 5, (30, 40))
    image = rng.integers(0, 256, (30, 40, 3), np.uint8)
    for key in set(chosen_keys(groups[0]).values()):
        paths = picture_paths(picture_folder(folder, "NYUv2", key), groups[0][0]["predictor"])
        draw(paths, image, depth, depth > 2, depth * 1.1)
    report(folder, title="A <title>", sections=[("Loss & co", "<i>kept</i>", "a <caption>")])
    return folder


def test_the_page_stands_alone_and_says_what_the_numbers_are(rich) -> None:
    page = (rich / "report.html").read_text()
    for words in (
        "A &lt;title&gt;", "&lt;b&gt;ours_1&lt;/b&gt; &amp; 100%", "&lt;broken&gt; &amp; cut",
        "marigold@1", "d9a47a15", "20 images", "sha256 f00df00d", "python evaluate.py", "abc",
        "one core", "least-squares scale and shift", "clipped to 0.001–10", "DIODE", "indoor",
        "18/20", "Images, one by one", "where the error is?", "Best", "Median", "Worst",
        "Paired differences", "excludes 0", "<i>kept</i>", "a &lt;caption&gt;",
        "Scale and shift by least squares.",
    ):  # fmt: skip
        assert words in page, words
    assert "<b>ours" not in page
    assert page.count("<svg") > 4
    assert page.count("src=") == page.count('src="data:image/png;base64,') >= 12
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)


def test_reports_of_the_same_lines_are_the_same_bytes(rich, tmp_path) -> None:
    for name in ("one", "two"):
        shutil.copytree(rich / "lines", tmp_path / name / "lines")
        report(tmp_path / name)
    for suffix in ("html", "json", "md", "tex", "csv"):
        one, two = (tmp_path / name / f"report.{suffix}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_what_a_run_added_to_its_page_stays_when_the_page_is_made_again(rich, tmp_path) -> None:
    shutil.copytree(rich, tmp_path / "copy")
    assert (tmp_path / "copy" / SECTIONS).exists()
    report(tmp_path / "copy")
    assert "<i>kept</i>" in (tmp_path / "copy/report.html").read_text()


def test_csv_has_a_row_for_each_number_with_interval_and_counts(rich) -> None:
    rows = list(csv.DictReader((rich / "report.csv").open()))
    numbers = [row for row in rows if row["list_sha256"]]
    # predictors, metrics, NYUv2, DIODE with its parts; two of the uncertainty
    assert len(numbers) == 2 * (10 + 3 * 11) + 2
    [row] = [
        row for row in numbers
        if row["set"] == "NYUv2" and row["metric"] == "absrel" and row["predictor"] != "constant"
    ]  # fmt: skip
    lines = [json.loads(text) for text in (rich / "lines/one.jsonl").read_text().splitlines()[:20]]
    assert float(row["mean"]) == np.mean(absrel_of(lines))
    assert float(row["low"]) < float(row["mean"]) < float(row["high"])
    assert (row["images"], row["not_scored"], row["list_count"]) == ("18", "2", "20")
    assert (row["protocol"], row["weights"]) == ("marigold@1", "f00d" * 16)
    assert [row["set"] for row in rows[-1:]] == ["mean of 2 of 2 sets"]


@pytest.mark.parametrize(("is_metric", "unit"), [(True, " m"), (False, "")])
def test_a_pictures_legend_has_the_unit_of_its_own_truth(tmp_path, is_metric, unit) -> None:
    lines = lines_of(metric=is_metric)
    depth = np.linspace(1, 5, 1200).reshape(30, 40)
    for key in set(chosen_keys(lines).values()):
        paths = picture_paths(picture_folder(tmp_path, "NYUv2", key), "mofo")
        draw(paths, np.zeros((30, 40, 3), np.uint8), depth, depth > 0, depth)
    merged = merge({"run": lines})
    made = tables(merged)
    page = html_page("t", made, [], merged, {"run": tmp_path})
    assert re.search(rf"far [0-9.]+{unit} <i", page)


def test_calibration_is_in_every_format(rich, tmp_path) -> None:
    text = report(write_run(tmp_path / "run", lines_of(uncertain=True)))
    row = next(row for row in text.splitlines() if row.startswith("mofo") and "0.500" in row)
    assert row.split() == ["mofo", "0.500", "0.200", "20"]
    assert "| mofo | 0.500 | 0.200 | 20 |" in (tmp_path / "run/report.md").read_text()
    [table] = json.loads((tmp_path / "run/report.json").read_text())["tables"]
    given = table["entries"][0]["calibration"]
    assert given == pytest.approx({"correlation": 0.5, "ause": 0.2, "num_images": 20})
    rows = csv.DictReader((tmp_path / "run/report.csv").open())
    found = {row["metric"]: row["mean"] for row in rows if row["metric"].startswith("uncertainty")}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"uncertainty_correlation": 0.5, "uncertainty_ause": 0.2}
    )


def test_pixels_of_images_without_a_score_are_not_said_to_be_scored() -> None:
    lines = lines_of(failed={3: "broken"})
    lines[3] |= {"num_nonfinite": 4096, "num_nonpositive": 5}
    lines[4] |= {"num_nonfinite": 704}
    [table] = tables_of(lines)
    assert (table.entries[0].num_nonfinite, table.entries[0].num_nonpositive) == (704, 0)


def test_latex_is_well_formed(rich) -> None:
    text = (rich / "report.tex").read_text()
    assert r"<b>ours\_1</b> \& 100\%" in text
    blocks = re.findall(r"\\begin{tabular}{(lr*)}(.*?)\\end{tabular}", text, re.S)
    assert len(blocks) == 5  # the overview, NYUv2, DIODE and its two parts
    for columns, body in blocks:
        rows = body.split(r"\\")[:-1]
        assert len(rows) >= 3
        for row in rows:
            spans = [int(number) for number in re.findall(r"\\multicolumn{(\d+)}", row)]
            cells = len(re.split(r"(?<!\\)&", row)) + sum(spans) - len(spans)
            assert cells == len(columns), row
    plain = text.replace(r"\{", "").replace(r"\}", "")
    assert plain.count("{") == plain.count("}")
    assert not set("↓↑δ×∞–−") & set(text)


def test_markdown_tables_are_rectangular(rich) -> None:
    text = (rich / "report.md").read_text()
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(blocks) > 5
    for block in blocks:
        assert len({len(re.split(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1


def test_json_gives_the_tables_back(rich) -> None:
    data = json.loads((rich / "report.json").read_text())
    made = [from_plain(row) for row in data["tables"]]
    assert [table.plain() for table in made] == data["tables"]
    assert made[0].main().failed == {f"image_{i:04d}": why for i, why in FAILED.items()}


def test_many_failures_are_all_on_the_page(tmp_path) -> None:
    failed = {index: f"reason {index}" for index in range(15)}
    text = report(write_run(tmp_path / "run", lines_of(failed=failed)))
    assert "reason 9" in text
    assert "5 more not scored" in text
    page = (tmp_path / "run/report.html").read_text()
    assert all(f"reason {index}" in page for index in range(15))


def test_one_image_has_a_mean_and_no_interval(tmp_path) -> None:
    text = report(write_run(tmp_path / "run", lines_of(num=1)))
    assert "1/1" in text
    [table] = json.loads((tmp_path / "run/report.json").read_text())["tables"]
    assert table["entries"][0]["intervals"] == {}


def test_perfect_predictions_are_reported(tmp_path) -> None:
    lines = lines_of(error=0.0) + lines_of("constant", error=0.0, weights=None)
    text = report(write_run(tmp_path / "run", lines))
    assert "0.0000* 0.0000–0.0000" in text


def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch) -> None:
    folder = write_run(tmp_path / "run", lines_of())
    report(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report(folder, title="newer")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert len(before) == 5


def test_an_empty_folder_has_no_report(tmp_path) -> None:
    with pytest.raises(ValueError, match="no lines to report on"):
        report(tmp_path)
    assert not os.listdir(tmp_path)


def test_several_runs_need_a_folder(tmp_path) -> None:
    runs = [write_run(tmp_path / name, lines_of()) for name in "ab"]
    with pytest.raises(ValueError, match="2 runs have no folder in common"):
        report(*runs)


def test_a_fit_in_words_says_what_was_done() -> None:
    fit = FIT | {"alignment": "disparity", "predicts": ["disparity"], "floor": None}
    settings = MOGE | {"fits": {"disparity": fit}, "negatives_pass": True}
    [table] = tables_of(lines_of(settings=settings, kind="disparity"))
    assert table.rule == (
        "least-squares scale and shift in disparity, at least 1 / the farthest truth, "
        "negative depth counts as correct"
    )
    scale, *_ = tables_of(lines_of(settings=MOGE))
    assert (scale.rule, scale.clip) == ("weighted-L1 scale on a 64×64 sample", "")


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_fits_the_browser(rich, width: int) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not (path := shutil.which("chromium") or shutil.which("chromium-browser")):
        pytest.skip("no Chromium is installed here")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((rich / "report.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        widths = "images => images.map(image => image.complete && image.naturalWidth)"
        assert all(tab.locator("img").evaluate_all(widths))
        if width > 1000:  # nothing is hidden behind a scroll bar
            inside = "all => all.map(one => one.scrollWidth - one.clientWidth)"
            assert max(tab.locator(".scroll").evaluate_all(inside)) <= 0
        browser.close()
    assert not [one for one in asked if not one.startswith(("file:", "data:"))]


def test_a_distribution_counts_images_without_a_score_as_never_reached() -> None:
    drawn = distribution({"half": ([0.1, 0.2], 4), "whole": ([0.1, 0.2, 0.3, 0.4], 4)}, 0.4)
    half, whole = (
        [float(point.split(",")[1]) for point in path.split()]
        for path in re.findall(r'd="M([^"]+)" style="[^"]*"/>(?=<path|</svg></div>)', drawn)
    )
    top, middle = min(whole), min(half)
    assert top == TOP
    assert middle == pytest.approx((max(whole) + TOP) / 2)
    assert max(whole) < HEIGHT
    assert "half, 2 of 4 images have a score" in drawn
    assert ">1</text>" in drawn


def test_the_axis_of_shares_ends_at_one_and_small_sets_are_not_cut(tmp_path) -> None:
    failed = dict.fromkeys(range(10), "broken")
    report(write_run(tmp_path / "run", lines_of(failed=failed)))
    page = (tmp_path / "run/report.html").read_text()
    plot = page[page.index("share of images over AbsRel") :]
    assert re.findall(r"text-anchor=end>([0-9.]+)</text>", plot)[:1] == ["0"]
    assert ">1</text>" in plot[: plot.index("</svg>")]
    [table] = tables_of(lines_of(num=50))
    assert _reach(table) == max(table.entries[0].absrel)
