"""The FLUX.2 autoencoder: golden numbers, the files it reads and writes, and its training."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mofo.model import autoencoder
from mofo.model.weights import read_tensors, write_tensors

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "ae_tiny"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return read_tensors(TINY / "golden.safetensors")


@pytest.fixture(scope="module")
def combined() -> dict[str, Tensor]:
    """The tiny autoencoder's tensors as a combined ae.safetensors names them."""
    encoder = read_tensors(TINY / "ae_encoder.safetensors")
    decoder = read_tensors(TINY / "ae_decoder.safetensors")
    tensors = {f"encoder.{k}": v for k, v in encoder.items() if not k.startswith("bn.")}
    tensors |= {f"decoder.{k}": v for k, v in decoder.items() if not k.startswith("bn.")}
    return tensors | {k: v for k, v in encoder.items() if k.startswith("bn.")}


def assert_golden(ae: autoencoder.Autoencoder, golden: dict[str, Tensor]) -> None:
    latent = golden["latent"].flatten(2).mT
    close = {"rtol": 0.0, "atol": 1e-4}
    torch.testing.assert_close(ae.encode(golden["image"]), latent, **close)
    torch.testing.assert_close(ae.decode(latent, grid=(2, 3)), golden["decoded"], **close)


def test_the_release_files_reproduce_the_golden_numbers(golden: dict[str, Tensor]) -> None:
    ae = autoencoder.load(TINY)
    assert (ae.stride, ae.channels) == (16, 16)
    assert_golden(ae, golden)


def test_a_combined_file_reproduces_the_golden_numbers(
    tmp_path: Path, golden: dict[str, Tensor], combined: dict[str, Tensor]
) -> None:
    write_tensors(combined, tmp_path / "ae.safetensors")
    assert_golden(autoencoder.load(tmp_path / "ae.safetensors"), golden)


@pytest.mark.parametrize("where", [".", "vae"])
def test_a_diffusers_folder_reproduces_the_golden_numbers(
    tmp_path: Path, golden: dict[str, Tensor], where: str
) -> None:
    autoencoder.load(TINY).network.save_pretrained(tmp_path / where)
    assert_golden(autoencoder.load(tmp_path), golden)


def test_the_real_size_has_exactly_the_released_names_and_shapes() -> None:
    with torch.device("meta"):
        ae = autoencoder.create((128, 256, 512, 512), 2, 32)
    found = {
        f"{name} {list(tensor.shape)}"
        for name, tensor in autoencoder.original(ae.network.state_dict()).items()
    }
    assert found == set((GOLDEN / "released_ae_keys.txt").read_text().splitlines())
    assert (ae.stride, ae.channels) == (16, 128)


def test_saved_files_hold_the_same_tensors(tmp_path: Path) -> None:
    autoencoder.save(autoencoder.load(TINY), tmp_path)
    for name in (autoencoder.ENCODER_FILE, autoencoder.DECODER_FILE):
        before, after = read_tensors(TINY / name), read_tensors(tmp_path / name)
        assert before.keys() == after.keys()
        assert all(
            torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before
        )


def test_encoder_and_decoder_may_have_different_widths(tmp_path: Path) -> None:
    autoencoder.save(autoencoder.create((32, 64), 1, 2, decoder_widths=(64, 32)), tmp_path)
    ae = autoencoder.load(tmp_path)
    tokens = ae.encode(torch.zeros(1, 3, 8, 12))
    assert tokens.shape == (1, 6, 8)
    assert ae.decode(tokens, grid=(2, 3)).shape == (1, 3, 8, 12)


@pytest.mark.parametrize("norm_groups", [8, 32])
def test_the_number_of_norm_groups_is_kept(tmp_path: Path, norm_groups: int) -> None:
    ae = autoencoder.create((32, 32), 1, 2, norm_groups=norm_groups)
    autoencoder.save(ae, tmp_path)
    images = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
    torch.testing.assert_close(autoencoder.load(tmp_path).encode(images), ae.eval().encode(images))


def test_a_bf16_network_still_gives_float32_tokens_and_exact_statistics() -> None:
    exact, rounded = autoencoder.load(TINY), autoencoder.load(TINY, dtype=torch.bfloat16)
    assert torch.equal(exact.network.bn.running_var, rounded.network.bn.running_var)
    images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    tokens = rounded.encode(images)
    assert tokens.dtype == rounded.decode(tokens, grid=(2, 2)).dtype == torch.float32
    torch.testing.assert_close(tokens, exact.encode(images), rtol=0.0, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.conv_in.bias": None}, "1 missing: decoder.conv_in.bias"),
        ({"decoder.extra": torch.zeros(1)}, "1 unexpected: decoder.extra"),
        (
            {"encoder.conv_in.bias": torch.zeros(7)},
            r"1 mis-shaped: encoder.conv_in.bias is \[7\], expected \[32\]",
        ),
        ({"decoder.post_quant_conv.weight": None}, "is not a FLUX.2 autoencoder"),
    ],
)
def test_a_wrong_file_says_which_tensors_are_wrong(
    tmp_path: Path, combined: dict[str, Tensor], change: dict[str, Tensor | None], message: str
) -> None:
    changed = {k: v for k, v in (combined | change).items() if v is not None}
    write_tensors(changed, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        autoencoder.load(tmp_path / "ae.safetensors")
    assert str(tmp_path) in str(error.value)


def test_two_files_of_different_releases_are_refused(tmp_path: Path) -> None:
    ae = autoencoder.load(TINY)
    autoencoder.save(ae, tmp_path)
    decoder = read_tensors(tmp_path / autoencoder.DECODER_FILE)
    decoder["bn.running_mean"] = decoder["bn.running_mean"] + 1
    write_tensors(decoder, tmp_path / autoencoder.DECODER_FILE)
    with pytest.raises(ValueError, match=r"bn\.running_mean differs between"):
        autoencoder.load(tmp_path)


def test_a_folder_without_autoencoder_says_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='give "small", a folder with ae_encoder'):
        autoencoder.load(tmp_path)


def test_sizes_that_do_not_fit_the_stride_are_refused() -> None:
    ae = autoencoder.create((32, 32), 1, 2)
    with pytest.raises(ValueError, match="image is 10x12, but both sides must be multiples of 4"):
        ae.encode(torch.zeros(1, 3, 10, 12))
    with pytest.raises(ValueError, match=r"grid \(2, 2\) needs \(b, 4, 8\)"):
        ae.decode(torch.zeros(1, 6, 8), grid=(2, 2))


def test_the_small_autoencoder_keeps_what_a_scene_shows() -> None:
    from mofo.data.scenes import generate

    ae = autoencoder.load("small")
    assert ae.stride == 8
    scenes = [generate(seed, split="test", size=(64, 64)).image for seed in range(6)]
    images = torch.stack([torch.from_numpy(i).permute(2, 0, 1) for i in scenes]) / 127.5 - 1
    tokens = ae.encode(images)
    assert tokens.shape == (6, 64, ae.channels)
    error = (ae.decode(tokens, grid=(8, 8)) - images).square().mean((1, 2, 3))
    assert (10 * torch.log10(4 / error)).mean() > 26  # PSNR in dB
    assert 0.5 < tokens.std() < 1.5
