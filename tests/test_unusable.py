"""Data that cannot be trained on are refused in one line that names source, value and remedy."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pictures import picture

from mofo.data.gates import Unusable
from mofo.data.loader import _of_worker
from mofo.data.module import DataModule
from mofo.data.write import write
from mofo.training import run

ROOT = Path(__file__).parents[1]
# Without the checks of types that tests run under, as a user's process.
REFUSE = """
import sys
from mofo.data.gates import Unusable
from mofo.data.module import DataModule
for row in eval(sys.argv[1]):
    try:
        DataModule(sources={"one": {"shards": "x", **row}}, batch_size=1, size=(8, 8), patch=8,
                   caption_dropout=0.0, seed=0)
    except Unusable as error:
        print(error)
"""
ROWS = {
    "gate min_measured_fraction is 'abc', but must be in [0, 1]": {
        "gates": {"min_measured_fraction": "abc"}
    },
    "gate depth_range is 3, but must be two depths [low, high], low < high": {
        "gates": {"depth_range": 3}
    },
    "gate min_image_size is None, but must be 1 or more": {"gates": {"min_image_size": None}},
    "gate max_relative_depth is 1, but must be more than 1": {"gates": {"max_relative_depth": 1}},
    "gates is 3, but must be like key: value": {"gates": 3},
    "weight is 'abc', but must be positive and finite": {"weight": "abc"},
    "weight is -1, but must be positive and finite": {"weight": -1},
    "patterns is 'lidar', but must be like [one, another]": {"patterns": "lidar"},
}
OVERRIDES = [
    "model=xs",
    "~data.sources.real",
    "data.sources.scenes.make=null",
    "data.batch_size=4",
    "data.size=[16,16]",
    "trainer.max_steps=2",
]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)


def write_set(folder: Path, *, count: int = 12) -> None:
    write(map(picture, range(count)), folder, "set", samples_per_shard=6)


def module(**row) -> DataModule:
    return DataModule(
        sources={"one": row}, batch_size=4, size=(8, 8), patch=8, caption_dropout=0.0, seed=0
    )


def train(tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    paths = [f"data.sources.scenes.shards={tmp_path / 'set'}", f"paths.runs={tmp_path / 'runs'}"]
    return python("train.py", *OVERRIDES, *paths, *overrides)


def test_a_value_of_a_wrong_type_or_size_is_named_with_its_source() -> None:
    done = python("-c", REFUSE, repr(list(ROWS.values())))
    assert done.stdout.splitlines() == [f"source 'one': {text}" for text in ROWS], done.stderr


def test_a_make_without_converter_says_what_to_give() -> None:
    with pytest.raises(Unusable, match=r"^source 'one' with shards x .*\{'count': 3\}.*make=null"):
        module(shards="x", make={"count": 3})


def test_a_missing_set_is_named_by_its_source_and_so_is_one_that_cannot_be_made(
    tmp_path: Path,
) -> None:
    with pytest.raises(Unusable, match="^source 'one': /nope holds no finished set"):
        module(shards="/nope").fingerprint()
    with pytest.raises(Unusable, match="^source 'one': converter 'nope' is unknown"):
        module(shards=str(tmp_path), make={"converter": "nope"}).prepare_data()


def test_what_hydra_wraps_is_said_bare_by_rank_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", [*OVERRIDES, "+data.sources.scenes.gates.min_image_size=0"])
    with pytest.raises(InstantiationException) as raised:
        instantiate(cfg.data, _convert_="all")
    said = "mofo: source 'scenes': gate min_image_size is 0, but must be 1 or more\n"
    for rank in ({"RANK": "0", "SLURM_PROCID": "3"}, {"LOCAL_RANK": "1"}):
        for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in rank.items():
            monkeypatch.setenv(name, value)
        run.say_briefly(InstantiationException, raised.value, None)
        assert capsys.readouterr().err == said
        said = ""
    run.say_briefly(Unusable, Unusable("in the part of this rank"), None)
    assert capsys.readouterr().err == "mofo: in the part of this rank\n"


def test_a_bug_in_a_worker_keeps_the_traceback_of_the_worker() -> None:
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback ..."
    bug = _of_worker(ValueError(text))
    assert (type(bug), str(bug)) == (ValueError, text)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_whose_gates_let_nothing_through_ends_in_one_line(
    tmp_path: Path, workers: int
) -> None:
    write_set(tmp_path / "set")
    gates = "+data.sources.scenes.gates.min_image_size=5000"
    done = train(tmp_path, gates, f"data.num_workers={workers}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "mofo: source 'scenes': none of 12 samples in a row passes its gates: "
        "min_image_size=5000 rejected 12; loosen it, or drop the source"
    )


def test_too_much_damage_ends_a_run_in_its_message(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    damaged = tmp_path / "set" / "set-000001.tar"
    damaged.write_bytes(b"\x07" * damaged.stat().st_size)
    done = train(tmp_path, "data.num_workers=2", "data.max_bad_fraction=0.1")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr.split("mofo: ")[1]
    assert said.startswith("2 of the 12 samples of source 'scenes' are damaged, more than")
    assert len(said.splitlines()) == 3


def test_a_short_run_shows_what_its_gates_rejected(tmp_path: Path) -> None:
    small = (picture(number, size=(12, 12)) for number in range(6))
    large = (picture(number) for number in range(6, 12))
    write([*small, *large], tmp_path / "set", "set", samples_per_shard=6)
    # Two steps of six, and one that was read ahead.
    gates = "+data.sources.scenes.gates.min_image_size=20"
    done = train(tmp_path, gates, "data.batch_size=6")
    assert done.returncode == 0, done.stderr
    (line,) = (row for row in done.stderr.splitlines() if "rejected" in row)
    assert re.fullmatch(
        r"source 'scenes': \d\d\.\d % of 18 samples rejected: min_image_size \d+", line
    )
