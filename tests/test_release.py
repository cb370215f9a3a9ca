"""The official layout: read from the shell to files on disk, and written at the 9B sizes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from test_text import qwen_folder  # noqa: F401 (a fixture)

from mofo.model import autoencoder, weights
from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.model.weights import VARIANTS
from mofo.schedule import Uniform
from mofo.training.export import assemble

ROOT = Path(__file__).parents[1]
KEYS = ROOT / "tests" / "golden" / "released_keys.txt"
# The 9B's blocks, image and depth channels at a thirty-second of its width.
SIZES = {
    "in_channels": 128,
    "depth_channels": 256,
    "context_in_dim": 96,
    "hidden_size": 128,
    "num_heads": 4,
    "depth_double": 8,
    "depth_single": 24,
    "depth_decoder_num_layers": 4,
    "axes_dim": [8, 8, 8, 8],
    "theta": 2000,
    "mlp_ratio": 3.0,
    "use_guidance_embed": False,
    "cross_stream_timestep_mixing": True,
}
SECTIONS = {
    "dit": SIZES,
    "depth": {
        "depth_normalize_mode": ["unit_mean", "contract"],
        "patch_size": 16,
        "depth_value_scale": 1.0,
    },
    "schedule": {
        "rgb_shift_mu": 1.1,
        "rgb_shift_sigma": 1.0,
        "depth_shift_mu": 1.1,
        "depth_shift_sigma": 1.0,
    },
}
FILES = {"rgb.png", "depth_raw.npy", "depth_magma.png", "cloud.glb", "cloud.ply", "metadata.json"}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the released names; no file of it is written by `weights.save`."""
    folder = tmp_path_factory.mktemp("official")
    dit = ThreeStreamDiT(DiTConfig(**SIZES))
    rng = torch.Generator().manual_seed(0)
    state = {
        f"dit.{name}": (torch.randn(tensor.shape, generator=rng) * 0.02).bfloat16()
        for name, tensor in dit.state_dict().items()
    }
    assert state.keys() == {line.split()[0] for line in KEYS.read_text().splitlines()}
    weights.write_tensors(state, folder / "model.safetensors")
    torch.manual_seed(0)
    autoencoder.save(autoencoder.create((32, 32, 32, 32), 1, latent_channels=32), folder)
    config = {"variant": "flux_rgbd_9b_v2", **SECTIONS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def from_the_shell(release: Path, text_encoder: Path, out: Path, *words: str | Path) -> Path:
    """Run `mofo` as a user does; the folder that it wrote."""
    options = ["--model", release, "--text-encoder", text_encoder, "--output-dir", out]
    few = ["--num-steps", "2", "--device", "cpu", "--seed", "3"]
    made = subprocess.run(
        [sys.executable, "-m", "mofo.cli", *map(str, [*words, *options, *few])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert made.returncode == 0, made.stderr
    [metadata] = out.rglob("metadata.json")
    return metadata.parent


def check(folder: Path, release: Path, mode: str, size: tuple[int, int]) -> np.ndarray:
    """All the files of a result at one size (h, w), and what made it; its depth."""
    assert {path.name for path in folder.iterdir()} == FILES
    for name in ("rgb.png", "depth_magma.png"):
        with Image.open(folder / name) as picture:
            assert (picture.mode, picture.size) == ("RGB", size[::-1])
    depth = np.load(folder / "depth_raw.npy")
    assert (depth.dtype, depth.shape) == (np.float32, size)
    assert np.isfinite(depth).all()
    assert (folder / "cloud.glb").read_bytes()[:4] == b"glTF"
    assert (folder / "cloud.ply").read_bytes()[:3] == b"ply"
    metadata = json.loads((folder / "metadata.json").read_text())
    expected = {"mode": mode, "seed": 3, "num_steps": 2, "weights": weights.digest(release)}
    assert expected.items() <= metadata.items()
    assert metadata["cloud"]["num_points"] > 0
    assert metadata["command"].startswith(f"mofo {mode} ")
    return depth


def test_an_official_release_goes_through_all_modes_from_the_shell(
    release: Path,
    qwen_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    shell = (release, qwen_folder)
    square = ["--resolution", "64"]
    joint = from_the_shell(*shell, tmp_path / "joint", "joint", "--prompt", "a sofa", *square)
    drawn = check(joint, release, "joint", (64, 64))

    photo = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    given = ["--image", tmp_path / "photo.jpg", *square]
    i2d = from_the_shell(*shell, tmp_path / "i2d", "i2d", *given)
    check(i2d, release, "i2d", (48, 80))
    with Image.open(tmp_path / "photo.jpg") as opened:
        assert np.array_equal(np.array(Image.open(i2d / "rgb.png")), np.array(opened))

    given = ["--depth", joint / "depth_raw.npy", "--prompt", "a lamp", *square]
    d2i = from_the_shell(*shell, tmp_path / "d2i", "d2i", *given)
    kept = check(d2i, release, "d2i", (64, 64))
    valid = (drawn > 0) & (kept > 0)
    ratio = kept[valid] / drawn[valid]
    assert valid.any()
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=1e-4)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_at_the_9b_sizes_an_export_is_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Nothing is allocated: the meta device, then one element seen as a whole tensor."""
    row = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "model" / "klein_9b.yaml"))
    sizes = {name: value for name, value in row.items() if name != "_target_"}
    has_mixing = variant == "flux_rgbd_9b_v2"
    with torch.device("meta"):
        dit = ThreeStreamDiT(DiTConfig(**sizes | {"cross_stream_timestep_mixing": has_mixing}))
    weights.assign(dit, dit.state_dict(), "", device="meta", dtype=torch.bfloat16)
    state = dit.state_dict()
    seen = {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in state.items()}
    dit.load_state_dict(seen, assign=True)
    written: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(weights, "write_tensors", lambda tensors, _: written.update(tensors))
    times = Uniform(mu=1.1, sigma=1.0)
    release = assemble(
        dit, image_schedule=times, depth_schedule=times, size=(512, 512), text="Qwen/Qwen3-8B"
    )
    weights.save(release, tmp_path)
    config = OmegaConf.load(tmp_path / "config.json")
    assert config.variant == variant
    assert (config.depth.patch_size, config.schedule.rgb_shift_mu) == (16, 1.1)
    lines = (line.split(" ", 1) for line in KEYS.read_text().splitlines())
    mixing = re.compile(r"dit\.(cross_alpha|time_in_depth_to_img|time_in_rgb_to_depth)")
    released = {name: shape for name, shape in lines if has_mixing or not mixing.match(name)}
    assert {name: str(list(tensor.shape)) for name, tensor in written.items()} == released
    for name, tensor in written.items():
        head = name.startswith("dit.depth_final_layer.")
        assert tensor.dtype == (torch.float32 if head else torch.bfloat16), name
