"""The report's files: a page that stands alone, the same numbers in every format, no half file."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_lines import FAILED, absrel_of, lines_of, tables_of, write_run

from mofo.evaluation.merge import merge
from mofo.evaluation.page import _reach, html_page
from mofo.evaluation.pictures import chosen_keys, draw, picture_folder, picture_paths
from mofo.evaluation.plots import HEIGHT, TOP, distribution
from mofo.evaluation.report import SECTIONS, report
from mofo.evaluation.tables import from_plain, tables

HOSTILE = "<b>ours_1</b> & 100%"


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
