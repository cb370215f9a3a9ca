"""`Mofo`: the three modes on arrays, files and PIL images; what is saved."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE, picture, save_release, slope

from mofo.calls import member_seed
from mofo.data.inputs import read_depth, read_picture
from mofo.data.sample import decode_image
from mofo.depth import merge
from mofo.pipeline import Mofo
from mofo.result import Result, Tokens

FEW = {"num_steps": 3}
SAMPLES = Path(__file__).parents[1] / "data" / "samples"
FILES = {
    "rgb.png", "depth_raw.npy", "depth_magma.png", "cloud.glb", "cloud.ply", "metadata.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def mofo(folder: Path) -> Mofo:
    return Mofo.load(folder, device="cpu")


def flat(h: int = 20, w: int = 30) -> Result:
    """A result whose depth is smooth enough for a cloud."""
    tokens = Tokens(torch.zeros(1, 24), torch.zeros(1, 64))
    valid = np.ones((h, w), bool)
    return Result(
        image=picture(h, w), depth=slope(h, w), valid=valid, tokens=tokens, metadata={"seed": 3}
    )


def test_joint_makes_a_picture_with_depth_of_the_trained_size(mofo: Mofo) -> None:
    made = mofo.joint("a kitchen", **FEW)
    assert made.image.shape == (*SIZE, 3)
    assert made.depth.shape == made.valid.shape == SIZE
    assert made.depth.dtype == np.float32
    assert (made.depth[~made.valid] == 0).all()
    assert (made.depth[made.valid] > 0).all()
    assert made.tokens.image.shape == (6, 24)
    assert made.tokens.depth.shape == (6, 64)


def test_a_sample_is_the_same_alone_and_in_a_batch(mofo: Mofo) -> None:
    both = mofo.joint(["a kitchen", "a street"], seeds=[5, 9], **FEW)
    alone = mofo.joint("a street", seeds=9, **FEW)
    torch.testing.assert_close(both[1].tokens, alone.tokens, atol=1e-5, rtol=1e-5)
    assert both[1].metadata == alone.metadata
    assert not torch.allclose(both[0].tokens.image, alone.tokens.image, atol=0.1)


def test_another_seed_prompt_or_size_makes_another_sample(mofo: Mofo) -> None:
    first = mofo.joint("a kitchen", **FEW)
    for other in (
        mofo.joint("a kitchen", seeds=1, **FEW),
        mofo.joint("a street with a tree", **FEW),
    ):
        assert not torch.allclose(first.tokens.image, other.tokens.image, atol=1e-4)
    assert mofo.joint("a kitchen", size=(32, 8), **FEW).image.shape == (32, 8, 3)


def test_image_to_depth_answers_at_the_size_of_the_picture(mofo: Mofo) -> None:
    pictures = [picture(20, 30), picture(*SIZE), picture(1, 50)]
    made = mofo.image_to_depth(pictures, seeds=[1, 2, 3], **FEW)
    for given, one in zip(pictures, made, strict=True):
        assert one.depth.shape == one.valid.shape == given.shape[:2]
        assert (one.image == given).all()
    assert [one.metadata["seed"] for one in made] == [1, 2, 3]


def test_pictures_of_all_sizes_are_each_the_same_as_alone(mofo: Mofo) -> None:
    pictures = [picture(20, 30), picture(40, 20), picture(10, 15), picture(21, 40)]
    made = mofo.image_to_depth(pictures, seeds=[3, 4, 5, 6], **FEW)
    assert len({tuple(one.metadata["size"]) for one in made}) > 1
    for k, one in enumerate(made):
        alone = mofo.image_to_depth(pictures[k], seeds=3 + k, **FEW)
        torch.testing.assert_close(one.tokens, alone.tokens, atol=1e-5, rtol=1e-5)
        assert one.metadata == alone.metadata


@pytest.mark.parametrize(
    ("fit", "size", "box"),
    [
        ("native", [8, 48], [0, 0, 8, 48]),
        ("letterbox", [16, 24], [6, 0, 4, 24]),
        ("stretch", [16, 24], [0, 0, 16, 24]),
    ],
)
def test_the_fit_decides_what_the_network_sees(mofo: Mofo, fit, size, box) -> None:
    made = mofo.image_to_depth(picture(20, 120), fit=fit, **FEW)
    assert made.depth.shape == (20, 120)
    assert made.metadata["fit"] == fit
    assert made.metadata["size"] == size
    assert made.metadata["box"] == box
    back = mofo.depth_to_image(slope(20, 120), "a wall", fit=fit, **FEW)
    assert back.image.shape == (20, 120, 3)


@pytest.mark.parametrize("fit", ["native", "letterbox", "stretch"])
def test_every_photograph_gets_depth_at_its_own_size(mofo: Mofo, fit: str) -> None:
    rows = [json.loads(path.read_text()) for path in sorted(SAMPLES.glob("*.json"))]
    paths = [SAMPLES / row["image"] for row in rows if isinstance(row, dict) and "image" in row]
    assert len(paths) == 32
    for path in paths:
        made = mofo.image_to_depth(path, fit=fit, num_steps=1)
        with Image.open(path) as image:
            assert made.depth.shape == image.size[::-1], path
        assert made.valid.any()


def test_an_ensemble_is_the_merge_of_predictions_with_their_own_seeds(mofo: Mofo) -> None:
    seen = picture(*SIZE)
    one = mofo.image_to_depth(seen, seeds=7, **FEW)
    assert one.uncertainty is None
    made = mofo.image_to_depth(seen, seeds=7, ensemble=3, **FEW)
    seeds = [member_seed(7, k) for k in range(3)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    members = mofo.image_to_depth([seen] * 3, seeds=seeds, **FEW)
    depth, valid, uncertainty = merge(
        np.stack([m.depth for m in members]), np.stack([m.valid for m in members])
    )
    np.testing.assert_allclose(made.depth, depth, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(made.uncertainty, uncertainty, rtol=1e-2, atol=1e-4)
    assert (made.valid == valid).all()
    assert uncertainty.max() > 0.01
    assert (made.metadata["ensemble"], made.metadata["seed"]) == (3, 7)
    torch.testing.assert_close(made.tokens, one.tokens, atol=1e-5, rtol=1e-5)
    larger = mofo.image_to_depth(picture(40, 50), ensemble=2, **FEW)
    assert larger.uncertainty.shape == (40, 50)
    assert (larger.uncertainty[~larger.valid] == 0).all()


def test_refining_keeps_the_picture_and_predicts_its_depth_again(mofo: Mofo) -> None:
    plain = mofo.joint("a kitchen", **FEW)
    refined = mofo.joint("a kitchen", refine=True, **FEW)
    assert (refined.image == plain.image).all()
    assert not torch.allclose(refined.tokens.depth, plain.tokens.depth, atol=1e-3)
    assert refined.metadata["refine_depth"] is True


def test_every_step_is_told(mofo: Mofo) -> None:
    told: list[tuple[int, int]] = []
    mofo.joint("a", refine=True, on_step=lambda *now: told.append(now), **FEW)
    assert told == [(k, 6) for k in range(1, 7)]
    told.clear()
    pictures = [picture(20, 30), picture(30, 20)]
    mofo.image_to_depth(pictures, ensemble=2, on_step=lambda *now: told.append(now), **FEW)
    assert told == [(k, 12) for k in range(1, 13)]


def test_a_picture_may_be_an_array_a_path_or_a_pil_image(mofo: Mofo, tmp_path: Path) -> None:
    pixels = picture()
    Image.fromarray(pixels).save(tmp_path / "in.png")
    sources = [pixels, tmp_path / "in.png", str(tmp_path / "in.png"), Image.fromarray(pixels)]
    made = mofo.image_to_depth(sources, seeds=[4] * 4, **FEW)
    for one in made[1:]:
        torch.testing.assert_close(one.tokens, made[0].tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "P", "L", "1", "I;16", "LA"])
def test_a_picture_of_any_mode_is_read_as_the_file_would_be(mode: str, tmp_path: Path) -> None:
    if mode == "I;16":
        image = Image.fromarray(picture()[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(picture()).convert(mode)
    path = tmp_path / ("in.tif" if mode == "CMYK" else "in.png")
    image.save(path)
    assert read_picture(image).shape == (20, 30, 3)
    assert (read_picture(image) == decode_image(path)).all()


def test_a_rotated_pil_image_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(picture()).save(tmp_path / "in.png", exif=exif)
    with Image.open(tmp_path / "in.png") as image:
        assert read_picture(image).shape == (30, 20, 3)


def test_depth_to_image_keeps_the_depth_and_answers_at_its_size(mofo: Mofo) -> None:
    made = mofo.depth_to_image(slope() * 1000, "a kitchen", **FEW)
    assert made.image.shape == (20, 30, 3)
    np.testing.assert_allclose(made.depth, slope() / slope().mean(), rtol=1e-5)
    again = mofo.depth_to_image(slope(), "a kitchen", **FEW)
    torch.testing.assert_close(made.tokens, again.tokens, atol=1e-5, rtol=1e-5)


def test_soft_conditioning_differs_and_tends_to_the_hard_one(mofo: Mofo) -> None:
    hard, softer, softest = (
        mofo.depth_to_image(slope(), "", log2_alpha=value, **FEW).tokens.image
        for value in (None, -15.0, -1.0)
    )
    assert (softest - hard).abs().mean() > 2 * (softer - hard).abs().mean() > 0


def test_holes_in_depth_are_filled_from_the_nearest_pixel_and_counted(mofo: Mofo) -> None:
    holed = slope(*SIZE)
    holed[:, 6:12] = np.nan
    holed[0, 0], holed[0, 1] = -1, np.inf
    made = mofo.depth_to_image(holed, "", **FEW)
    assert made.metadata["num_filled"] == (~made.valid).sum() == 16 * 6 + 2
    whole, _ = mofo.release.codec.encode(torch.from_numpy(slope(*SIZE))[None])
    assert (made.tokens.depth - whole[0]).abs().max() < 0.02
    masked = mofo.depth_to_image(slope(*SIZE), "", valid=made.valid, **FEW)
    torch.testing.assert_close(masked.tokens, made.tokens, atol=1e-5, rtol=1e-5)


def test_sparse_depth_reaches_the_network_whatever_its_size(mofo: Mofo) -> None:
    for size in ((160, 240), (8, 12), (160, 12)):
        sparse = np.zeros(size, np.float32)
        sparse[::7, ::5] = 3.0
        made = mofo.depth_to_image(sparse, "", fit="stretch", **FEW)
        assert (made.depth[::7, ::5] == 1).all()
        torch.testing.assert_close(made.tokens.depth, torch.ones(6, 64))


def test_depth_is_read_from_npy_and_16_bit_files(tmp_path: Path) -> None:
    codes = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30)
    for name in ("a.png", "a.tif"):
        Image.fromarray(codes).save(tmp_path / name)
    Image.fromarray(codes.astype(np.float32)).save(tmp_path / "b.tiff")
    np.save(tmp_path / "a.npy", codes.astype(np.float64))
    for name in ("a.png", "a.tif", "b.tiff", "a.npy"):
        metres, valid = read_depth(tmp_path / name)
        assert (metres == codes).all(), name
        assert valid.sum() == codes.size - 1


def test_metadata_says_what_makes_the_same_again(mofo: Mofo, folder: Path) -> None:
    made = mofo.joint("a kitchen", seeds=7, log2_alpha=None, **FEW).metadata
    assert made == json.loads(json.dumps(made))
    wanted = {"mode": "joint", "prompt": "a kitchen", "seed": 7, "num_steps": 3, "cfg_scale": 4.0}
    assert wanted.items() <= made.items()
    assert made["log2_alpha"] is None
    assert len(made["weights"]) == 16
    assert made["versions"].keys() == {"mofo", "torch", "python"}


def test_saving_writes_every_file(tmp_path: Path) -> None:
    made = flat()
    made.save(tmp_path / "new" / "out", fov_deg=50.0)
    out = tmp_path / "new" / "out"
    assert {path.name for path in out.iterdir()} == FILES
    assert (np.array(Image.open(out / "rgb.png")) == made.image).all()
    depth = np.load(out / "depth_raw.npy")
    assert depth.dtype == np.float32
    assert (depth == made.depth).all()
    written = json.loads((out / "metadata.json").read_text())
    assert written["seed"] == 3
    assert written["cloud"]["num_points"] == 600
    assert written["cloud"]["fov_deg"] == 50.0


def test_depth_without_a_surface_is_saved_without_a_cloud(tmp_path: Path) -> None:
    made = flat()
    made.save(tmp_path)
    made.valid[:] = False
    made.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"cloud.glb", "cloud.ply"}
    assert "no pixel has depth" in (tmp_path / "metadata.json").read_text()


@pytest.mark.parametrize("after", range(4))
def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch, after: int) -> None:
    real, left = os.fsync, after

    def full(handle) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        flat().save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) >= after
    assert names <= FILES - {"metadata.json"}


def test_repeated_prompts_give_one_embedding(mofo: Mofo) -> None:
    first, second = mofo.encoders.text(["a kitchen", "a kitchen"])
    assert torch.equal(first, second)


def test_half_precision_keeps_the_depth_head_in_float32(folder: Path) -> None:
    mofo = Mofo.load(folder, device="cpu", dtype=torch.bfloat16)
    assert mofo.release.dit.dtype == torch.bfloat16
    assert mofo.release.dit.depth_final_layer.linear.weight.dtype == torch.float32
    made = mofo.joint("a kitchen", **FEW)
    assert made.depth.dtype == np.float32
    assert made.metadata["dtype"] == "bfloat16"


def test_the_shipped_model_draws_a_room_with_depth() -> None:
    """Needs the weights in mofo/small."""
    made = Mofo.load("small", device="cpu").joint("a room with a red sofa", num_steps=10)
    assert made.image.shape == (64, 64, 3)
    assert made.valid.mean() > 0.95
    assert made.image.std() > 10
