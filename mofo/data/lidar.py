"""LiDAR returns as a camera sees them: projected, the nearest of a pixel, none that is hidden.

Scanner and camera stand apart, so the scanner sees past an edge what the camera does not, and such
a return lands in the image among those of the nearer surface. Return p is hidden if a return q
next to it in the image is nearer than any plane through p could be there:

    1 / z_q  >  (1 + MARGIN) / z_p  +  |q - p| / (f CLEARANCE)

because 1 / z of a plane that passes at distance D from the camera changes by at most 1 / (f D) per
pixel. Road and walls, however slanted, so hide nothing of themselves. "Next to it" is a window as
large as the gaps between returns, in which a surface that covers p must have left one. Visible
returns closer than that to a nearer edge are lost as well; a hole costs less than a wrong depth.

A transform is 4x4 and moves columns (x, y, z, 1); a camera looks along z, x is right, y is down.
"""

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64

# Half of the window in degrees of view: the spacing of beams of the scanners in use is up to 0.5
# (Velodyne HDL-64E data sheet; VLP-32C and Waymo's are finer about the horizon), that within a line
# 0.2 or less at ten turns a second.
WINDOW = (0.5, 0.25)
# Degrees; the nearest return of such a cell stands for all in it, or the search takes longer than
# decoding the image.
CELL = 0.1
# Metres from the camera within which no plane passes lengthwise; the cameras in use stand 1.3 or
# more above the road.
CLEARANCE = 1.0
# Of depth: noise of the range, of the calibration, and of leaves and fences.
MARGIN = 0.05


def transform(
    quaternion: Float[np.ndarray, "4"], translation: Float[np.ndarray, "3"]
) -> Float64[np.ndarray, "4 4"]:
    """The rigid transform of a quaternion (w, x, y, z) of any length and a translation."""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    matrix = np.eye(4)
    matrix[:3, :3] = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    matrix[:3, 3] = translation
    return matrix


def move(
    points: Float[np.ndarray, "n 3"], matrix: Float64[np.ndarray, "4 4"]
) -> Float64[np.ndarray, "n 3"]:
    """The points after a transform."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def project(
    points: Float[np.ndarray, "n 3"], intrinsics: Float64[np.ndarray, "3 3"]
) -> Float64[np.ndarray, "m 3"]:
    """u, v and depth of those points, in camera coordinates, that lie before the camera."""
    points = points[points[:, 2] > 0]
    uvz = points @ intrinsics.T
    uvz[:, :2] /= uvz[:, 2:]
    return uvz


def visible(
    uvz: Float[np.ndarray, "n 3"], focal: float, size: tuple[int, int]
) -> Float32[np.ndarray, "m 3"]:
    """Of projected returns those inside the image, nearest of their pixel, and not hidden.

    In rows from the top. `focal` is in pixels.
    """
    h, w = size
    # Rounded before anything is decided: rounding may carry a return into the next pixel.
    uvz = uvz.astype(np.float32)
    u, v, z = uvz.T
    uvz = uvz[(u >= 0) & (u < w) & (v >= 0) & (v < h) & (z > 0) & np.isfinite(z)]
    uvz = uvz[np.argsort(uvz[:, 2], kind="stable")]
    column, row = uvz[:, :2].astype(np.int64).T
    _, first = np.unique(row * w + column, return_index=True)
    nearest = uvz[first]
    return nearest[~_hidden(nearest, focal, size)]


def _hidden(
    uvz: Float32[np.ndarray, "n 3"], focal: float, size: tuple[int, int]
) -> Bool[np.ndarray, " n"]:
    """Which of the returns another one hides."""
    cell, tall, wide = (focal * np.tan(np.radians(angle)) for angle in (CELL, *WINDOW))
    cell = max(1, round(cell))
    tall, wide = int(np.ceil(tall / cell)), int(np.ceil(wide / cell))
    column, row = uvz[:, :2].astype(np.int64).T // cell
    nearest = np.zeros((size[0] // cell + 2 * tall + 1, size[1] // cell + 2 * wide + 1), np.float32)
    np.maximum.at(nearest, (row + tall, column + wide), 1 / uvz[:, 2])
    across = np.arange(2 * wide + 1)
    closest = np.zeros(len(uvz), np.float32)
    for down in range(2 * tall + 1):
        # Returns lie up to a cell farther apart than their cells, along each axis.
        apart = np.hypot(np.abs(across - wide) + 1, abs(down - tall) + 1) * cell
        slack = (apart / (focal * CLEARANCE)).astype(np.float32)
        around = nearest[row[:, None] + down, column[:, None] + across]
        np.maximum(closest, (around - slack).max(1), out=closest)
    return closest > (1 + MARGIN) / uvz[:, 2]
