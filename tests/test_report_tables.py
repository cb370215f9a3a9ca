"""Tables from lines alone: means, intervals, differences against plain numpy; runs put together."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_lines import (
    FAILED,
    FIT,
    HASHES,
    MARIGOLD,
    MOGE,
    ROW,
    absrel_of,
    lines_of,
    tables_of,
    write_run,
)

from mofo.evaluation.merge import merge, uncompared
from mofo.evaluation.overview import overviews
from mofo.evaluation.report import report
from mofo.evaluation.tables import average, tables

ROOT = Path(__file__).parents[1]


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


def test_pixels_of_images_without_a_score_are_not_said_to_be_scored() -> None:
    lines = lines_of(failed={3: "broken"})
    lines[3] |= {"num_nonfinite": 4096, "num_nonpositive": 5}
    lines[4] |= {"num_nonfinite": 704}
    [table] = tables_of(lines)
    assert (table.entries[0].num_nonfinite, table.entries[0].num_nonpositive) == (704, 0)


def test_one_image_has_a_mean_and_no_interval(tmp_path) -> None:
    text = report(write_run(tmp_path / "run", lines_of(num=1)))
    assert "1/1" in text
    [table] = json.loads((tmp_path / "run/report.json").read_text())["tables"]
    assert table["entries"][0]["intervals"] == {}


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
