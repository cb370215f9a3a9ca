"""What depth looks like, and where pictures stand in a grid."""

import numpy as np
import pytest

from mofo.picture import MAGMA, NO_DEPTH, depth_picture, enlarge, error_picture, grid, magma


def test_colour_map_passes_through_its_stops_and_brightens() -> None:
    stops = np.linspace(0, 1, len(MAGMA))[None]
    assert (magma(stops)[0] == MAGMA).all()
    ramp = magma(np.linspace(0, 1, 256)[None]).astype(float).sum(-1)
    assert (np.diff(ramp) >= 0).all()
    assert (magma(np.array([[-3.0, 7.0]])) == magma(np.array([[0.0, 1.0]]))).all()


def test_near_is_bright() -> None:
    picture = depth_picture(np.linspace(1, 10, 64).reshape(8, 8)).astype(int).sum(-1)
    assert (np.diff(picture.ravel()) <= 0).all()


def test_relative_depth_looks_the_same_at_any_scale() -> None:
    depth = np.random.default_rng(0).uniform(1, 5, (8, 8))
    assert (depth_picture(depth) == depth_picture(depth * 4)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -2.0])
def test_a_pixel_without_depth_is_grey_and_moves_no_other(bad) -> None:
    depth = np.linspace(1, 10, 64).reshape(8, 8)
    valid = np.ones((8, 8), bool)
    valid[3, 3] = False
    expected = depth_picture(depth, valid)
    depth[3, 3] = bad
    assert (depth_picture(depth) == expected).all()
    assert tuple(expected[3, 3]) == NO_DEPTH


def test_flat_and_empty_depth_have_a_picture() -> None:
    assert len(np.unique(depth_picture(np.full((4, 4), 2.0)).reshape(-1, 3), axis=0)) == 1
    assert (depth_picture(np.zeros((4, 4))) == NO_DEPTH).all()


def test_error_is_dark_where_right_and_grey_where_unmeasured() -> None:
    depth, pred = np.full((1, 3), 2.0), np.array([[2.0, 3.0, np.nan]])
    picture = error_picture(pred, depth, np.array([[True, True, False]]))
    assert (picture[0, 0] == MAGMA[0]).all()
    assert (picture[0, 1] == MAGMA[-1]).all()
    assert tuple(picture[0, 2]) == NO_DEPTH


def test_enlarging_repeats_pixels() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert (enlarge(image, 3)[::3, ::3] == image).all()
    assert enlarge(image, 3).shape == (6, 6, 3)


def test_grid_places_pictures_and_labels() -> None:
    black, red = np.zeros((4, 5, 3), np.uint8), np.full((4, 5, 3), (255, 0, 0), np.uint8)
    canvas = grid([[black, red], [red]], gap=2)
    assert canvas.shape == (14, 16, 3)
    assert (canvas[2:6, 2:7] == black).all()
    assert (canvas[2:6, 9:14] == red).all()
    assert (canvas[8:12, 2:7] == red).all()
    assert (canvas[8:12, 9:14] == 255).all()
    labelled = grid([[black, red], [red]], labels=["a", "b"], gap=2)
    assert labelled.shape == (30, 16, 3)
    assert (labelled[:16] < 255).any()


@pytest.mark.parametrize(("rows", "labels"), [([], []), ([[]], []), ([[0, 0]], ["one"])])
def test_impossible_grids_are_refused(rows, labels) -> None:
    pictures = [[np.zeros((2, 2, 3), np.uint8) for _ in row] for row in rows]
    with pytest.raises(ValueError, match="grid"):
        grid(pictures, labels)


def test_a_grid_takes_pictures_of_different_sizes() -> None:
    small, large = np.zeros((4, 6, 3), np.uint8), np.zeros((9, 5, 3), np.uint8)
    assert grid([[small, large], [large]], gap=1).shape == (21, 15, 3)
