"""Canvases for pictures of any size: what goes in comes back, and no depth is invented."""

import numpy as np
import pytest
from PIL import Image

from mofo.data.fit import FITS, LONGEST, choose, depth_in, depth_out, picture_in, picture_out

TRAINED = (64, 64)
SIZES = {
    "landscape": (48, 96),
    "portrait": (96, 40),
    "panorama": (20, 160),
    "one pixel high": (1, 200),
    "one pixel wide": (200, 1),
    "one pixel": (1, 1),
    "trained": TRAINED,
}


def photo(size: tuple[int, int]) -> np.ndarray:
    """Smooth, so that another size of it is the same picture."""
    rows, columns = np.linspace(0, 200, size[0]), np.linspace(0, 200, size[1])
    red, green = np.meshgrid(rows, columns, indexing="ij")
    return np.stack([red, green, np.full(size, 90)], axis=-1).astype(np.uint8)


def floor(size: tuple[int, int]) -> np.ndarray:
    """A plane: its inverse depth is linear in the picture."""
    inverse = np.linspace(0.5, 0.8, size[0])[:, None] + np.linspace(0, 0.2, size[1])
    return (1 / inverse).astype(np.float32)


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("source", SIZES.values(), ids=SIZES)
def test_every_size_goes_in_and_comes_back(kind: str, source: tuple[int, int]) -> None:
    fit = choose(kind, source, TRAINED, 8)
    assert fit.size[0] % 8 == fit.size[1] % 8 == 0
    assert min(fit.size) >= 8
    assert max(fit.size) <= LONGEST * 64
    assert picture_in(photo(source), fit).shape == (*fit.size, 3)
    assert picture_out(photo(fit.size), fit).shape == (*source, 3)
    filled, measured = depth_in(floor(source), np.ones(source, bool), fit)
    assert filled.shape == measured.shape == fit.size
    assert (filled > 0).all()
    depth, valid = depth_out(floor(fit.size), np.ones(fit.size, bool), fit)
    assert depth.shape == valid.shape == source
    assert valid.all()


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((480, 640), (448, 592)),
        ((640, 480), (592, 448)),
        ((1080, 1920), (384, 688)),
        ((7, 7), (512, 512)),
        ((1000, 8000), (256, 1024)),
        ((1, 50), (256, 1024)),
        ((50, 1), (1024, 256)),
    ],
)
def test_native_keeps_aspect_and_area_up_to_four_to_one(
    source: tuple[int, int], size: tuple[int, int]
) -> None:
    fit = choose("native", source, (512, 512), 16)
    assert fit.size == size
    assert fit.box == (0, 0, *size)
    assert size[0] * size[1] == pytest.approx(512 * 512, rel=0.05)


def test_native_takes_the_trained_canvas_for_its_own_aspect() -> None:
    assert choose("native", (160, 240), (16, 24), 8).size == (16, 24)


def test_native_is_never_narrower_than_a_token() -> None:
    assert choose("native", (1, 1000), (16, 64), 16).size == (16, 64 * LONGEST)


def test_letterbox_centres_the_whole_picture_and_repeats_its_edge() -> None:
    picture = photo((32, 64))
    fit = choose("letterbox", (32, 64), TRAINED, 8)
    assert fit.size == TRAINED
    assert fit.box == (16, 0, 32, 64)
    canvas = picture_in(picture, fit)
    assert (canvas[16:48] == picture).all()
    assert (canvas[:16] == picture[0]).all()
    assert (canvas[48:] == picture[-1]).all()
    assert (picture_out(canvas, fit) == picture).all()


def test_stretch_fills_the_trained_canvas_as_the_method_does() -> None:
    picture = photo((30, 50))
    fit = choose("stretch", (30, 50), TRAINED, 8)
    expected = Image.fromarray(picture).resize((64, 64), Image.Resampling.LANCZOS)
    assert (picture_in(picture, fit) == np.array(expected)).all()


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("source", [(48, 96), (130, 100), (20, 160)])
def test_a_picture_and_a_plane_survive_the_way_there_and_back(
    kind: str, source: tuple[int, int]
) -> None:
    fit = choose(kind, source, TRAINED, 8)
    picture, metres = photo(source), floor(source)
    back = picture_out(picture_in(picture, fit), fit)
    assert np.abs(back.astype(int) - picture).max() <= 8
    depth, valid = depth_out(*depth_in(metres, np.ones(source, bool), fit), fit)
    assert valid[2:-2, 2:-2].all()
    inside = np.s_[4:-4, 4:-4]
    np.testing.assert_allclose(depth[inside], metres[inside], rtol=0.03)


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("source", [(160, 240), (8, 12), (160, 12), (64, 64)])
def test_depth_with_holes_is_filled_and_no_value_is_invented(
    kind: str, source: tuple[int, int]
) -> None:
    metres = np.zeros(source, np.float32)
    metres[::7, ::5] = np.where(np.arange(0, source[1], 5) < source[1] / 2, 2.0, 5.0)
    filled, measured = depth_in(metres, metres > 0, choose(kind, source, TRAINED, 8))
    assert 0 < measured.sum() < measured.size
    assert set(np.unique(filled.round(5))) == {2.0, 5.0}


def test_borders_are_not_measured_and_continue_the_depth() -> None:
    fit = choose("letterbox", (32, 64), TRAINED, 8)
    metres = floor((32, 64))
    filled, measured = depth_in(metres, np.ones((32, 64), bool), fit)
    assert measured[16:48].all()
    assert measured.sum() == 32 * 64
    assert (filled[:16] == metres[0]).all()


def test_a_cell_takes_the_measured_pixel_nearest_to_its_centre() -> None:
    metres = np.zeros((80, 80), np.float32)
    metres[0, 0], metres[6, 5], metres[79, 79] = 9, 3, 4
    filled, measured = depth_in(metres, metres > 0, choose("stretch", (80, 80), (8, 8), 8))
    assert measured.sum() == 2
    assert (filled[0, 0], filled[7, 7]) == (3, 4)


def test_borders_do_not_come_out() -> None:
    fit = choose("letterbox", (32, 64), TRAINED, 8)
    canvas = np.full(TRAINED, 100, np.float32)
    canvas[16:48] = 2
    depth, valid = depth_out(canvas, canvas < 50, fit)
    assert (depth == 2).all()
    assert valid.all()


def test_an_unknown_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="fit is 'crop', but must be one of native, letterbox"):
        choose("crop", (4, 4), TRAINED, 8)


def test_forty_megapixels_go_in_and_come_back() -> None:
    source = (5000, 8000)
    fit = choose("native", source, TRAINED, 8)
    assert fit.size == (48, 80)
    picture = np.broadcast_to(np.uint8([10, 200, 30]), (*source, 3))
    assert (picture_in(np.array(picture), fit) == picture[0, 0]).all()
    depth, valid = depth_out(floor(fit.size), np.ones(fit.size, bool), fit)
    assert depth.shape == source
    assert valid.all()
    filled, _ = depth_in(depth, valid, fit)
    np.testing.assert_allclose(filled, floor(fit.size), rtol=0.01)
