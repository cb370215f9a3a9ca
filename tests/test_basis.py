"""`LappedBasis`: orthonormal, exact with all components, and the shipped one good enough."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mofo.model import basis
from mofo.model.basis import LappedBasis
from mofo.model.weights import SMALL, write_tensors


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Smooth noise, uint8."""
    noise = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, size=(24, 32), mode="bicubic")
    fine = torch.rand(40, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    pixels = (0.9 * smooth + 0.1 * fine).clamp(0, 1)
    return (255 * pixels).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.fixture(scope="module")
def batch(pictures: Tensor) -> Tensor:
    return pictures[:4].permute(0, 3, 1, 2).float() / 127.5 - 1


def test_all_components_give_back_the_picture(pictures: Tensor, batch: Tensor) -> None:
    full = basis.fit(pictures, 192)
    tokens = full.encode(batch)
    assert tokens.shape == (4, 12, 192)
    torch.testing.assert_close(full.decode(tokens, grid=(3, 4)), batch, rtol=0, atol=1e-4)


def test_the_lapped_transform_is_orthonormal(batch: Tensor) -> None:
    lapped = basis.blocks(batch.double())
    torch.testing.assert_close(lapped.square().sum(), batch.double().square().sum())


def test_fewer_components_are_the_best_of_a_projection(pictures: Tensor, batch: Tensor) -> None:
    errors = []
    for channels in (3, 12, 48):
        ae = basis.fit(pictures, channels)
        decoded = ae.decode(ae.encode(batch), grid=(3, 4))
        twice = ae.decode(ae.encode(decoded), grid=(3, 4))
        torch.testing.assert_close(twice, decoded, rtol=0, atol=1e-4)
        errors.append((decoded - batch).square().mean())
    assert errors[0] > errors[1] > errors[2]


def test_channels_of_a_token_have_unit_variance_on_average(pictures: Tensor) -> None:
    ae = basis.fit(pictures, 24)
    tokens = ae.encode(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert tokens.var((0, 1), correction=0).mean() == pytest.approx(1, rel=1e-3)
    assert tokens.mean((0, 1)).abs().max() < 1e-3


def test_written_and_read_again_it_is_the_same(tmp_path: Path, pictures: Tensor) -> None:
    ae = basis.fit(pictures, 12)
    basis.save(ae, tmp_path / "folder")
    again = basis.load(tmp_path / "folder")
    assert again.channels == 12
    for name, tensor in ae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_the_shipped_basis_has_24_channels_and_its_rows_are_orthonormal() -> None:
    ae = basis.load(SMALL)
    assert ae.channels == 24
    torch.testing.assert_close(ae.basis @ ae.basis.T, torch.eye(24), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(12, 16), (16, 9), (0, 8)])
def test_sides_that_are_no_multiple_of_8_are_refused(size: tuple[int, int]) -> None:
    message = f"image is {size[0]}x{size[1]}.*multiples of 8"
    with pytest.raises(ValueError, match=message):
        basis.load(SMALL).encode(torch.zeros(1, 3, *size))


def test_a_grid_that_is_not_the_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens are \(1, 6, 24\), but grid \(2, 4\)"):
        basis.load(SMALL).decode(torch.zeros(1, 6, 24), grid=(2, 4))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    write_tensors({"other": torch.zeros(1)}, tmp_path / basis.FILE)
    with pytest.raises(ValueError, match="other.*basis, mean and scale"):
        basis.load(tmp_path)


def test_nothing_is_learnt() -> None:
    assert not list(basis.load(SMALL).parameters())
    assert isinstance(basis.load(SMALL), LappedBasis)
