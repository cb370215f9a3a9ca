"""What a report compares: the same images, one unit, published numbers of the same truth alone."""

import re
from dataclasses import replace
from pathlib import Path

import judged
import numpy as np
import pytest
from made_lines import (
    FAILED,
    MARIGOLD,
    MOGE,
    MOGE_ROW,
    ROW,
    absrel_of,
    lines_of,
    tables_of,
    write_run,
)
from omegaconf import OmegaConf

from mofo.evaluation.merge import merge
from mofo.evaluation.overview import TRUTH, measured_on, overviews, published
from mofo.evaluation.report import report
from mofo.evaluation.tables import tables
from mofo.evaluation.verdict import verdict

ROOT = Path(__file__).parents[1]


def test_the_mean_over_sets_is_unweighted_and_a_missing_set_is_named(tmp_path) -> None:
    large, small = lines_of("whole", num=40), lines_of("whole", num=10, set_name="KITTI", error=0.3)
    half = lines_of("half", num=40, seed=5, error=0.01)
    worse = [*lines_of("worse", num=40, error=0.9)]
    worse += lines_of("worse", num=10, set_name="KITTI", error=0.9)
    made = tables_of(large, small, half, worse)
    [seen] = overviews(made)
    whole, part, _ = seen.rows
    means = [np.mean(absrel_of(large)), np.mean(absrel_of(small))]
    assert whole.mean.values["absrel"] == pytest.approx(np.mean(means), rel=1e-12)
    spread = np.hypot(*(absrel_of(x).std() / len(x) ** 0.5 for x in (large, small))) / 2
    low, high = whole.mean.intervals["absrel"]
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    assert part.missing == ["KITTI"]
    assert seen.best(None, "absrel") == whole.mean.values["absrel"]
    text = report(write_run(tmp_path / "run", large, small, half, worse))
    assert "mean over fewer sets, not to be compared: half lacks KITTI" in text


def test_published_numbers_stand_only_beside_their_own_protocol_and_fit(tmp_path) -> None:
    for name, changes, quoted in (
        ("marigold", {}, {"GeoWizard (paper": 1}),
        ("moge", {"settings": MOGE, "row": MOGE_ROW}, {"tables 2 and 6": 3}),
        ("disparity", {"kind": "disparity"}, {}),
        ("other", {"settings": MARIGOLD | {"id": "marigold@2"}}, {}),
    ):
        text = report(write_run(tmp_path / name, lines_of(num=654, **changes)))
        for words in ("GeoWizard (paper", "tables 2 and 6"):
            assert text.count(words) == quoted.get(words, 0)
        assert ("[1]" in text) == bool(quoted)
        assert "no published numbers" not in text
        assert ("GeoWizard (paper" in (tmp_path / name / "report.html").read_text()) == (
            name == "marigold"
        )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"settings": MOGE}, "another truth, reader is moge there and pairs here"),
        ({"row": ROW | {"high": 5.0}}, "another truth, high is 10.0 there and 5.0 here"),
        ({"num": 3}, "another list, list_count is 654 there and 3 here"),
        ({"list_sha256": "ee" * 32}, "another list, list_sha256 is d9a47a15 there and eeee"),
        ({"failed": {4: "broken"}}, "all 654 images, of which not all have a score here"),
        ({"num": 8, "list_count": 654}, "all 654 images, of which not all have a score here"),
        ({"set_name": "generated scenes"}, "marigold@1 does not define the set"),
    ],
)
def test_without_published_numbers_a_note_says_why(tmp_path, changes, why) -> None:
    given = {"num": 654} | changes
    whole = lines_of("constant", weights=None, **given | {"failed": None})
    text = report(write_run(tmp_path / "run", lines_of(**given), whole))
    assert "[1]" not in text
    assert f"no published numbers beside {given.get('set_name', 'NYUv2')}: " in text
    assert why in text
    for name in ("md", "html"):
        assert why in (tmp_path / f"run/report.{name}").read_text()


def test_published_rows_name_protocols_fits_and_sets_that_exist() -> None:
    for path in sorted((ROOT / "configs/eval").glob("*.yaml")):
        name = path.stem.replace("_exact", "")
        if name not in ("marigold", "moge"):
            continue
        protocol = OmegaConf.load(ROOT / f"configs/eval/protocol/{name}.yaml")
        rows = OmegaConf.load(ROOT / f"configs/eval/sets/{name}.yaml").rows
        sets = {row.name for row in rows}
        for fit in protocol.fits:
            for row in published(protocol.id, fit, list(sets)):
                assert set(row["sets"]) <= sets, row
                assert row["source"]
        assert published(protocol.id, "affine", list(sets))
        known = measured_on(protocol.id)
        for row in rows:
            theirs = {key: row[key] for key in (*TRUTH, "reader", "list_sha256")}
            theirs["list_count"] = row["count"]
            own = known.pop(row.name)
            assert not {key for key in (*TRUTH, *own) if theirs[key] != own.get(key)}, row.name
        assert not known


def test_the_sources_own_means_agree_with_their_rows() -> None:
    rows = [
        row
        for fit in ("scale", "affine", "disparity")
        for row in published("moge@1", fit, ["KITTI"])
    ]
    assert len(rows) == 11
    for row in rows:
        numbers = np.array([[float(x) for x in cell] for cell in row["sets"].values()])
        printed = np.array(list(map(float, row["mean"])))
        assert np.abs(numbers.mean(axis=0) - printed).max() < 0.06, row["method"]


def test_only_means_over_the_same_images_are_ranked(tmp_path) -> None:
    hard = dict.fromkeys(range(8, 20), "out of memory")
    picky = lines_of("picky", error=0.05, failed=hard)
    baselines = [lines_of("constant", error=0.2, weights=None, seed=1)]
    baselines += [lines_of("mean map", error=0.15, weights=None, seed=2)]
    made = tables_of(picky, lines_of("whole"), *baselines)
    [table] = made
    first, whole, constant, mean_map = table.entries
    assert [entry.is_ranked for entry in table.entries] == [False, True, True, True]
    assert first.means["absrel"] < whole.means["absrel"]
    assert table.best("absrel") == whole.means["absrel"]
    expected = first.means["absrel"] / np.mean(mean_map.absrel[:8])
    assert first.ratio == pytest.approx(expected, rel=1e-12)
    assert whole.ratio == pytest.approx(whole.means["absrel"] / mean_map.means["absrel"], rel=1e-12)
    assert constant.ratio is None
    text = report(write_run(tmp_path / "run", picky, lines_of("whole"), *baselines))
    assert "picky: scored on other images: not ranked" in text
    starred = [row.split()[0] for row in text.splitlines() if "*" in row]
    assert "whole" in starred
    assert "picky" not in starred
    [seen] = overviews(made)
    cells = [row.cells[0] for row in seen.rows]
    assert [cell.is_ranked for cell in cells] == [False, True, True, True]
    assert seen.best(0, "absrel") == whole.means["absrel"]


def test_a_mean_over_sets_is_ranked_only_if_all_of_it_is() -> None:
    picky = lines_of("picky", error=0.01, failed={3: "broken"})
    picky += lines_of("picky", error=0.01, set_name="KITTI")
    others = [
        lines_of(name, error=error, set_name=of)
        for name, error in (("a", 0.1), ("b", 0.2))
        for of in ("NYUv2", "KITTI")
    ]
    [seen] = overviews(tables_of(picky, *others))
    rows = {row.name: row for row in seen.rows}
    assert seen.best(None, "absrel") == rows["a"].mean.values["absrel"]
    assert seen.best(1, "absrel") == rows["picky"].cells[1].values["absrel"]


def test_runs_of_different_limits_are_counted_over_one_list(tmp_path) -> None:
    few = lines_of("few", num=8, error=0.05, row=ROW | {"limit": 8}, list_count=256)
    many = lines_of("many", num=60, row=ROW | {"limit": 60}, list_count=256)
    constant = {"weights": None, "error": 0.2, "list_count": 256}
    of_few = lines_of("constant", num=8, row=ROW | {"limit": 8}, **constant)
    of_many = lines_of("constant", num=60, row=ROW | {"limit": 60}, **constant)
    runs = [write_run(tmp_path / "a", few, of_few), write_run(tmp_path / "b", many, of_many)]
    text = report(*runs, out=tmp_path / "both")
    assert "the first 60 of 256 images" in text
    assert "8/60" in text
    assert "few: scored on other images: not ranked" in text
    assert "8 of 256 images, 8,028 pixels (few)" in text
    [alone] = tables_of(few, of_few)
    [both] = tables(merge({"a": few + of_few, "b": many + of_many}))
    ratios = {entry.predictor: entry.ratio for entry in both.entries}
    assert ratios["few"] == pytest.approx(alone.entries[0].ratio, rel=1e-12)


def test_failures_and_limits_are_marked_apart() -> None:
    limited = lines_of("limited", num=10, row=ROW | {"limit": 10}, list_count=20)
    [seen] = overviews(tables_of(lines_of("whole"), lines_of("bad", failed=FAILED), limited))
    assert [row.cells[0].marks for row in seen.rows] == ["", "§", "†"]


def test_a_lone_row_is_the_best_of_nothing(tmp_path) -> None:
    text = report(write_run(tmp_path / "run", lines_of()))
    assert "*" not in text
    assert "× baseline" not in text
    assert "class=best" not in (tmp_path / "run/report.html").read_text()


def test_units_are_not_mixed(tmp_path) -> None:
    lines = lines_of()
    for line in lines[:5]:
        line["metric"] = False
    relative = lines_of(set_name="KITTI", metric=False, row=ROW | {"metric": False})
    del relative[0]["metric"]  # a line of before: its set's word counts
    [mixed] = tables_of(lines)
    [alone] = tables_of(relative)
    [metres] = tables_of(lines_of())
    assert (mixed.is_metric, alone.is_metric, metres.is_metric) == (None, False, True)
    assert not {"rmse", "sqrel", "i_rmse"} & set(mixed.entries[0].means)
    assert {"absrel", "log10", "silog"} <= set(mixed.entries[0].means)
    assert {"rmse", "sqrel"} <= set(alone.entries[0].means)
    report(write_run(tmp_path / "run", lines, relative))
    text = (tmp_path / "run/report.md").read_text()
    assert "of others relative: RMSE, SqRel, iRMSE have no mean" in text
    assert "relative truth, without a unit" in text


def test_learned_predictors_come_first_and_each_has_its_differences(tmp_path) -> None:
    rivals = [lines_of("a", kind="disparity"), lines_of("b", kind="disparity", seed=1)]
    constant = lines_of("constant", weights=None, error=0.4)
    made = tables_of(*rivals, constant)
    assert [table.fit for table in made] == ["disparity", "affine"]
    same_fit = [lines_of("a"), lines_of("b", seed=1), constant]
    same_fit += [lines_of("mean map", weights=None, error=0.3)]
    report(write_run(tmp_path / "run", *same_fit))
    text = (tmp_path / "run/report.md").read_text()
    assert re.findall(r"^\| (\S.* − .*?) \|", text, re.M) == [
        "a − b", "a − constant", "a − mean map", "b − constant", "b − mean map",
    ]  # fmt: skip


def test_an_interval_does_not_depend_on_who_else_is_in_the_report() -> None:
    constant = lines_of("constant", weights=None, error=0.4)
    [alone] = tables_of(constant)
    [beside] = tables_of(lines_of("few", num=25, failed={2: "broken"}), lines_of("b"), constant)
    entry = next(entry for entry in beside.entries if entry.predictor == "constant")
    assert entry.intervals["absrel"] == pytest.approx(
        alone.entries[0].intervals["absrel"], rel=1e-9
    )
    [pair] = tables_of(lines_of("b"), constant)
    [found] = [one for one in beside.differences if (one.first, one.second) == ("b", "constant")]
    expected = pair.differences[0].intervals["absrel"]
    assert found.intervals["absrel"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("of_set", "of_image", "is_metric"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_a_line_says_whether_its_own_truth_is_in_metres(of_set, of_image, is_metric) -> None:
    image = judged.sample(0, metric=of_image)
    rules = {"kind": "scale", "protocol": judged.PROTOCOL}
    row = replace(judged.ROW, metric=of_set)
    said = verdict(image, judged.guess([image.image], [""])[0], row=row, **rules)
    assert said["metric"] is is_metric
    assert said["fits"]
    assert verdict(ValueError("broken"), None, row=row, **rules)["metric"] is None
