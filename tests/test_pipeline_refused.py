"""What `Mofo` refuses, and why: settings, inputs, and folders that are no release."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import network, picture, save_release, slope

from mofo.data.inputs import read_depth, read_picture
from mofo.model import weights
from mofo.pipeline import Mofo


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def mofo(folder: Path) -> Mofo:
    return Mofo.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": (20, 24)}, "image is 20x24, but both sides must be multiples of 8"),
        ({"size": (0, 8)}, "multiples of 8"),
        ({"seeds": [1, 2]}, "2 seeds for 1 samples"),
        ({"seeds": 2**32}, "seed is 4294967296"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan"),
        ({"log2_alpha": 5000.0}, "log2_alpha is 5000"),
        ({"seeds": -1}, "seed is -1"),
        ({"num_steps": 0}, "num_steps is 0"),
    ],
)
def test_bad_settings_are_refused(mofo: Mofo, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mofo.joint("a kitchen", **settings)


def test_lists_that_do_not_match_are_refused(mofo: Mofo) -> None:
    with pytest.raises(ValueError, match="empty list"):
        mofo.joint([])
    with pytest.raises(ValueError, match="2 prompts for 1 inputs"):
        mofo.image_to_depth([picture()], ["a", "b"])
    with pytest.raises(ValueError, match="1 valid masks for 2"):
        mofo.depth_to_image([slope(), slope()], "", valid=[slope() > 0])


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        (np.full((8, 8), np.nan, np.float32), "no valid pixel"),
        (np.zeros((8, 8), np.uint16), "no valid pixel"),
        (np.ones((8, 8), np.uint8), "8-bit picture"),
        (np.ones((8, 8), bool), "depth is made of numbers"),
        (np.ones((8, 8, 3), np.float32), "colours"),
        (np.ones((0, 8), np.float32), r"shape \(0, 8\)"),
    ],
)
def test_what_is_no_depth_is_refused_with_the_reason(depth: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_depth(depth)


def test_a_mask_must_fit_and_mark_only_depth(mofo: Mofo) -> None:
    with pytest.raises(ValueError, match=r"bool \(9, 8\), but must be bool \(20, 30\)"):
        mofo.depth_to_image(slope(), "", valid=np.ones((9, 8), bool))
    holed = slope()
    holed[2, 3] = np.nan
    with pytest.raises(ValueError, match="1 pixels are marked valid but are NaN"):
        mofo.depth_to_image(holed, "", valid=np.ones(holed.shape, bool))


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_a_picture_of_depth_is_refused_as_depth(mode: str, tmp_path: Path) -> None:
    Image.fromarray(picture()).convert(mode).save(tmp_path / "depth.png")
    with pytest.raises(ValueError, match=r"depth\.png .*(8-bit|colours)"):
        read_depth(tmp_path / "depth.png")


@pytest.mark.parametrize("name", ["a.npy", "a.png", "a.tif", "absent.npy", "absent.png"])
def test_a_broken_depth_file_is_named(name: str, tmp_path: Path) -> None:
    for broken in ("a.npy", "a.png", "a.tif"):
        (tmp_path / broken).write_bytes(b"\x93NUMPY\x01\x00broken")
    with pytest.raises(ValueError, match=f"{name} cannot be read as depth"):
        read_depth(tmp_path / name)


def test_pickled_depth_is_never_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read as depth"):
        read_depth(tmp_path / "a.npy")


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"float32 \(20, 30\)"):
        read_picture(slope())


def test_a_text_encoder_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = save_release(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for use, words in (({}, "Qwen3-8B"), ({"text": "/else/Qwen3-4B"}, "/else/Qwen3-4B")):
        (folder / "config.json").write_text(json.dumps(config | {"use": use}))
        with pytest.raises(ValueError, match=f"{words}.*--text-encoder"):
            Mofo.load(folder)
    assert Mofo.load(folder, text_encoder="small").encoders.name == "small"


def test_a_folder_that_is_no_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder nobody/nothing; accepted"):
        Mofo.load("nobody/nothing")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        Mofo.load(tmp_path)


def test_a_release_without_its_autoencoder_is_refused(tmp_path: Path) -> None:
    folder = save_release(tmp_path)
    (folder / "ae_basis.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no autoencoder"):
        Mofo.load(folder)


def test_encoders_that_do_not_fit_the_network_are_refused(mofo: Mofo) -> None:
    def refuse(outline: weights.Release) -> None:
        Mofo(
            folder=mofo.folder,
            outline=outline,
            encoders=mofo.encoders,
            device=mofo.device,
            dtype=mofo.dtype,
        )

    others = {
        "text encoder": {"context_in_dim": 32},
        "autoencoder": {"in_channels": 8},
    }
    for part, changes in others.items():
        release = weights.Release(
            dit=network(**changes), codec=mofo.release.codec, schedule=mofo.release.schedule
        )
        with pytest.raises(ValueError, match=f"trained with another {part}"):
            refuse(release)
    release = weights.Release(
        dit=network(depth_channels=0, depth_decoder_num_layers=0),
        codec=mofo.release.codec,
        schedule=mofo.release.schedule,
    )
    with pytest.raises(ValueError, match="base without depth"):
        refuse(release)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(folder: Path, device: str) -> None:
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="device is"):
        Mofo.load(folder, device=device)
