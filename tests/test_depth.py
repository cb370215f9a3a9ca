"""`DepthCodec`: golden numbers, inverse of inverse, and no depth out of nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mofo.depth import EDGE, DepthCodec, contract, expand, fill_nearest
from mofo.model.weights import read_tensors

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "codec.json").read_text())
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
SMALL = DepthCodec(patch_size=2)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return read_tensors(GOLDEN / "codec.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_the_golden_ones(golden: dict[str, Tensor], case: str) -> None:
    tokens, valid = DepthCodec(**CASES[case]).encode(golden[f"{case}.depth"][..., 0])
    torch.testing.assert_close(tokens, golden[f"{case}.tokens"].flatten(1, 2), **CLOSE)
    assert valid.all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["", "raw_"])
def test_decoded_depth_is_the_golden_one_where_it_is_valid(
    golden: dict[str, Tensor], case: str, kind: str
) -> None:
    tokens, expected = golden[f"{case}.{kind}tokens"], golden[f"{case}.{kind}decoded"][..., 0]
    codec = DepthCodec(**CASES[case])
    depth, valid = codec.decode(tokens.flatten(1, 2), grid=tuple(tokens.shape[1:3]))
    assert valid.any()
    torch.testing.assert_close(depth[valid], expected[valid], **CLOSE)
    # The raw tokens reach beyond the ball, where the public code emits negative and huge depth.
    assert valid.all() == (kind == "")
    assert (expected <= 0).any() == (kind == "raw_")


def strange_tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    edge = torch.tensor([0.0, 1.0, 2.0, 2 - EDGE, -2.0])
    around = [edge, edge.nextafter(torch.tensor(9.0)), edge.nextafter(torch.tensor(-9.0))]
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 1e-45, -0.0, 1e-20, 3.0])
    some = torch.cat([*around, odd])
    far = torch.randn(64 - len(some) - 20, generator=generator) * 3
    close = 2 + 1e-3 * torch.randn(20, generator=generator)
    return torch.cat([some, far, close]).reshape(1, 16, 4)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_valid_depth_is_positive_finite_and_off_the_edge(scale: float, dtype: torch.dtype) -> None:
    codec = DepthCodec(patch_size=2, depth_value_scale=scale)
    depth, valid = codec.decode((strange_tokens() * scale).to(dtype), grid=(4, 4))
    assert valid.any()
    assert not valid.all()
    assert (depth[~valid] == 0).all()
    assert (depth[valid] > 0).all()
    assert (depth[valid] <= 1001).all()


def test_decode_undoes_encode_up_to_the_scale() -> None:
    metres = 10 ** torch.linspace(-1, 2, 64).reshape(1, 8, 8)
    depth, valid = SMALL.decode(SMALL.encode(metres)[0], grid=(4, 4))
    assert valid.all()
    torch.testing.assert_close(depth, metres / metres.mean())


def test_expand_undoes_contract() -> None:
    r = 10 ** torch.linspace(-3, 2.5, 100)
    z = contract(r)
    assert (z > 0).all()
    assert (z < 2).all()
    torch.testing.assert_close(expand(z), r, rtol=1e-4, atol=0)


def test_tokens_are_row_major_in_the_grid_and_inside_a_patch() -> None:
    metres = torch.arange(1.0, 25).reshape(1, 4, 6)
    tokens, _ = SMALL.encode(metres)
    expected = contract(torch.tensor([3.0, 4.0, 9.0, 10.0]) / 12.5)
    torch.testing.assert_close(tokens[0, 1], expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -1.0, 0.0])
@pytest.mark.parametrize("says_so", [True, False])
def test_what_is_no_depth_is_unmeasured_and_does_not_move_the_mean(
    bad: float, says_so: bool
) -> None:
    metres = torch.full((1, 4, 4), 2.0)
    metres[0, 0, 0] = bad
    valid = metres == 2 if says_so else None
    tokens, measured = SMALL.encode(metres, valid)
    assert (~measured).nonzero().tolist() == [[0, 0, 0]]
    assert (tokens == 1).all()


def test_a_valid_mask_cannot_make_nan_measured() -> None:
    metres = torch.full((1, 2, 2), torch.nan)
    tokens, measured = SMALL.encode(metres, torch.ones(1, 2, 2, dtype=torch.bool))
    assert tokens.isfinite().all()
    assert not measured.any()


def test_a_fill_is_kept_but_only_measured_pixels_make_the_mean() -> None:
    metres = torch.tensor([[[4.0, 4.0], [1.0, 1.0]]])
    tokens, measured = SMALL.encode(metres, metres == 4)
    torch.testing.assert_close(tokens[0, 0], torch.tensor([1.0, 1.0, 0.25, 0.25]))
    assert measured[0, 0].tolist() == [True, True, False, False]


def test_samples_are_normalised_one_by_one() -> None:
    metres = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    both, _ = SMALL.encode(torch.stack([metres[0], 100 * metres[1]]))
    torch.testing.assert_close(both, torch.cat([SMALL.encode(one[None])[0] for one in metres]))


def test_sides_that_are_no_multiple_of_the_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="depth is 4x5.*multiples of 2; crop or resize"):
        SMALL.encode(torch.ones(1, 4, 5))


def test_fill_takes_the_nearest_measured_pixel_and_keeps_the_measured() -> None:
    metres = np.zeros((1, 6), np.float32)
    metres[0, [0, 4]] = [3, 7]
    filled = fill_nearest(metres, metres > 0)
    assert filled[0].tolist() == pytest.approx([3, 3, filled[0, 2], 7, 7, 7])
    assert filled[0, 2] in (3, 7)


def test_fill_of_nothing_measured_is_one_and_of_everything_is_itself() -> None:
    metres = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert (fill_nearest(metres, np.zeros((2, 3), bool)) == 1).all()
    assert (fill_nearest(metres, np.ones((2, 3), bool)) == metres).all()
