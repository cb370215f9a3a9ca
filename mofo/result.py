"""`Result`: one generated picture with its depth, and the files it is saved as."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image
from torch import Tensor

from mofo.geometry import EDGE, FIELD_OF_VIEW, intrinsics_from_fov, point_cloud, save_cloud
from mofo.model.weights import replacing
from mofo.picture import depth_picture, magma

CLOUDS = ("cloud.glb", "cloud.ply")
UNCERTAINTY = ("uncertainty.npy", "uncertainty.png")
BRIGHTEST = 0.5  # relative uncertainty drawn in the brightest colour


class Tokens(NamedTuple):
    """What the network generated or was given, float32 on the CPU."""

    image: Float[Tensor, "l ci"]
    depth: Float[Tensor, "l cd"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A picture and its relative depth; `metadata` holds what makes the same again.

    `uncertainty` is the relative spread of an ensemble's members, None without one.
    """

    image: UInt8[np.ndarray, "h w 3"]
    depth: Float32[np.ndarray, "h w"]
    valid: Bool[np.ndarray, "h w"]
    tokens: Tokens
    metadata: dict[str, Any]
    uncertainty: Float32[np.ndarray, "h w"] | None = None

    def save(
        self,
        folder: str | Path,
        *,
        fov_deg: float = FIELD_OF_VIEW,
        edge_rtol: float = EDGE,
        drop_outliers: bool = False,
    ) -> None:
        """Write rgb.png, depth_raw.npy, depth_magma.png, the clouds and, last, metadata.json.

        An ensemble adds uncertainty.npy and .png (dark is certain). A file appears under its name
        only when complete. `edge_rtol` 0 keeps the depth edges in the cloud; depth that is all
        edges has no cloud, and metadata.json then says so.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"depth_raw.npy": self.depth}
        pictures = {"rgb.png": self.image, "depth_magma.png": depth_picture(self.depth, self.valid)}
        if self.uncertainty is not None:
            arrays[UNCERTAINTY[0]] = self.uncertainty
            pictures[UNCERTAINTY[1]] = magma(self.uncertainty / BRIGHTEST)
        for name, values in arrays.items():
            np.save(written := io.BytesIO(), values)  # to a file, it would not say why it failed
            with replacing(folder / name) as partial:
                partial.write_bytes(written.getvalue())
        for name, pixels in pictures.items():
            with replacing(folder / name) as partial:
                Image.fromarray(pixels).save(partial, format="PNG")
        settings = {"fov_deg": fov_deg, "edge_rtol": edge_rtol, "drop_outliers": drop_outliers}
        about = {**self.metadata, "cloud": settings | self._save_clouds(folder, **settings)}
        for name in UNCERTAINTY:  # an earlier result's would not belong to this one
            if self.uncertainty is None:
                (folder / name).unlink(missing_ok=True)
        with replacing(folder / "metadata.json") as partial:
            partial.write_text(json.dumps(about, indent=2) + "\n")

    def _save_clouds(
        self, folder: Path, *, fov_deg: float, edge_rtol: float, drop_outliers: bool
    ) -> dict[str, Any]:
        """Write the clouds, or remove an earlier result's if this depth has none."""
        height, width = self.depth.shape
        intrinsics = intrinsics_from_fov(height, width, fov_deg)
        options = {"edge_rtol": edge_rtol, "drop_outliers": drop_outliers}
        try:
            cloud = point_cloud(self.depth, self.image, intrinsics, self.valid, **options)
        except ValueError as reason:
            for name in CLOUDS:
                (folder / name).unlink(missing_ok=True)
            return {"num_points": 0, "reason": str(reason)}
        for name in CLOUDS:
            save_cloud(*cloud, folder / name)
        return {"num_points": len(cloud.points)}
