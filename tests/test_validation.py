"""Validation during training: held-out images, scored by the code of the evaluation, and no more.

On several ranks: tests/test_watch.py.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from pictures import picture
from PIL import Image
from watched import CONFIGS, STEPS, tiny, write_shards

import train
from mofo.data.gates import Unusable
from mofo.data.write import write
from mofo.metrics import score
from mofo.training import callbacks
from mofo.training.callbacks import Validation, show
from mofo.training.watch import Watchdog

EVERY = ("callbacks.validation.every_n_steps=2", "callbacks.preview.every_n_steps=3")


@pytest.fixture(scope="module", autouse=True)
def configs() -> Iterator[None]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    root = tmp_path_factory.mktemp("plain")
    train.train(tiny(root, shards))
    return root / "run"


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    root = tmp_path_factory.mktemp("validated")
    train.train(tiny(root, shards, *EVERY, "callbacks.checkpoint.every_n_steps=3"))
    return root / "run"


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]


def test_numbers_stand_in_the_rows_of_their_steps_and_change_no_other(
    plain: Path, validated: Path
) -> None:
    for one, other in zip(rows(plain), rows(validated), strict=True):
        added = {name: other.pop(name) for name in list(other) if name.startswith("valid/")}
        assert other == one
        assert len(added) == (0 if one["step"] % 2 else 2)
        if added:
            assert added["valid/held/absrel"] > 0
            assert 0 <= added["valid/held/delta1"] <= 1


def test_an_interrupted_run_has_the_same_numbers(
    tmp_path: Path, shards: Path, validated: Path
) -> None:
    first = tiny(tmp_path, shards, *EVERY, "callbacks.checkpoint.every_n_steps=3")
    first.trainer.max_steps = 4
    train.train(first)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    (tmp_path / "run" / "checkpoints" / "LATEST").unlink(missing_ok=True)
    train.train(tiny(tmp_path, shards, *EVERY, "callbacks.checkpoint.every_n_steps=3"))
    whole = (validated / "metrics.jsonl").read_text()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == whole


def test_what_was_measured_and_what_is_predicted_is_drawn(validated: Path) -> None:
    names = sorted(path.name for path in (validated / "previews").iterdir())
    steps = [f"step_{step:08d}" for step in range(1, STEPS + 1)]
    i2d = [f"{step}_i2d.png" for step in steps[1::2]]
    assert names == sorted([*i2d, *(f"{step}.png" for step in steps[2::3])])
    with Image.open(validated / "previews" / i2d[0]) as drawn:
        assert drawn.height > 2.9 * drawn.width  # image, measured, predicted; one column


def fake_trainer(rank: int = 0, world: int = 1, size: tuple[int, int] = (32, 32)) -> Any:
    return SimpleNamespace(
        global_rank=rank,
        local_rank=rank,
        world_size=world,
        global_step=7,
        is_global_zero=rank == 0,
        datamodule=SimpleNamespace(size=size, patch=8),
        strategy=SimpleNamespace(barrier=lambda: None),
        callbacks=[],
        loggers=[],
    )


def validation(shards: Path, **changes: Any) -> Validation:
    settings = {"every_n_steps": 1, "num_images": 7, "batch_size": 2, **changes}
    return Validation(folder="unused", sets={"held": {"shards": str(shards)}}, **settings)


HAS_DEPTH = SimpleNamespace(config=SimpleNamespace(depth_channels=64))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_image_counts_once_and_all_ranks_have_as_many(shards: Path, world: int) -> None:
    parts = []
    for rank in range(world):
        one = validation(shards)
        one.on_fit_start(fake_trainer(rank, world), HAS_DEPTH)
        parts.append(one.images["held"])
    assert len({len(part) for part in parts}) == 1
    counted = sorted(image.key for part in parts for image in part if image.counts)
    assert counted == sorted(picture(20 * i // 7).key for i in range(7))


def test_scores_are_the_means_of_the_evaluation(shards: Path) -> None:
    one = validation(shards)
    one.on_fit_start(fake_trainer(), HAS_DEPTH)
    images = one.images["held"]
    rng = np.random.default_rng(0)
    maps = [rng.random(image.metres.shape, np.float32) for image in images]
    means = one._score(images, maps, torch.device("cpu"))
    singles = [
        score(pred, image.metres, image.valid) for pred, image in zip(maps, images, strict=True)
    ]
    for name, mean in means.items():
        assert mean == pytest.approx(np.mean([single[name] for single in singles]), abs=1e-6)
    affine = [3 * image.metres + 1 for image in images]
    assert one._score(images, affine, torch.device("cpu")) == {"absrel": 0, "delta1": 1}


def test_images_are_brought_to_the_training_size(shards: Path) -> None:
    one = validation(shards)
    one.on_fit_start(fake_trainer(size=(16, 24)), HAS_DEPTH)
    for image in one.images["held"]:
        assert image.image.shape == (16, 24, 3)
        assert image.metres.shape == image.valid.shape == (16, 24)


def test_an_image_without_depth_counts_nothing(tmp_path: Path) -> None:
    samples = [picture(0, size=(32, 32)), picture(1, size=(32, 32), depth=False)]
    write(iter(samples), tmp_path / "shards", "pictures")
    one = validation(tmp_path / "shards")
    one.on_fit_start(fake_trainer(), HAS_DEPTH)
    images = one.images["held"]
    maps = [image.metres + 1 for image in images]
    assert one._score(images, maps, torch.device("cpu"))["delta1"] == 1


def test_a_network_without_depth_is_not_validated(shards: Path) -> None:
    one = validation(shards)
    one.on_fit_start(fake_trainer(), SimpleNamespace(config=SimpleNamespace(depth_channels=0)))
    one.on_train_batch_end(fake_trainer(), None)
    assert not one.images


def test_missing_shards_show_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="^validation set 'held': .* no finished set of shards"):
        validation(tmp_path / "none").on_fit_start(fake_trainer(), HAS_DEPTH)


def test_an_unknown_alignment_is_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match="alignment is 'best', but must be one of: none"):
        validation(shards, alignment="best")


def test_a_validation_longer_than_the_watchdog_waits_is_no_hang(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dog = Watchdog(folder="unused", minutes=1, first_minutes=1)
    trainer = fake_trainer()
    trainer.callbacks = [dog]
    one = validation(shards)
    one.on_fit_start(trainer, HAS_DEPTH)
    allowed: list[float] = []
    monkeypatch.setattr(dog, "allow", allowed.append)
    monkeypatch.setattr(callbacks, "sample", lambda *_, **__: (None, torch.zeros(1, 16, 64)))
    module = SimpleNamespace(
        release=lambda: SimpleNamespace(
            dit=None,
            schedule=None,
            codec=SimpleNamespace(decode=lambda depth, grid: (torch.zeros(1, 32, 32), None)),
        ),
        encoders=SimpleNamespace(text=lambda captions: None, image=lambda pixels: None),
        device=torch.device("cpu"),
    )
    one._predict(trainer, module, one.images["held"])
    assert allowed == [60.0] * 4


def test_a_full_disk_costs_a_picture_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    show(fake_trainer(), np.zeros((2, 2, 3), np.uint8), tmp_path / "a.png", "preview")
    assert "a.png is not written: No space left on device" in capsys.readouterr().out
