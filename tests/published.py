"""Miniature sets in the layouts in which they are published, written without the package's codecs.

`tar`, `unpack` and `zipped` put the same files into the forms that a set may come in; `rows` are
those of configs/eval/, with their sources in a folder of the test; `measured` is what came out.
"""

import io
import struct
import tarfile
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image, PngImagePlugin

from mofo.data.sample import Sample
from mofo.evaluation.benchmark import Row

CONFIGS = Path(__file__).parents[1] / "configs"
PLACE = "/benchmarks"
NYU = (480, 640)
Files = dict[str, bytes]


def rows(protocol: str, benchmarks: Path) -> dict[str, Row]:
    """Of configs/eval/PROTOCOL.yaml, by name."""
    found = {}
    for row in composed(protocol):
        places = {name: getattr(row, name) for name in ("source", "list")}
        moved = {name: at and at.replace(PLACE, str(benchmarks)) for name, at in places.items()}
        found[row.name] = replace(row, **moved)
    return found


@cache
def composed(protocol: str) -> list[Row]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("evaluate", overrides=[f"eval={protocol}", f"paths.benchmarks={PLACE}"])
    return instantiate(cfg.eval.rows, _convert_="all")


def other(row: Row, *, options: dict[str, Any] | None = None, **changes: Any) -> Row:
    """The row with changes, those of its options one by one."""
    return replace(row, options=row.options | (options or {}), **changes)


def tar(path: Path, files: Files) -> Path:
    """Members as Marigold's archives name them, with their folders among them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        folder = tarfile.TarInfo("./some/folder")
        folder.type = tarfile.DIRTYPE
        out.addfile(folder)
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return path


def unpack(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def zipped(path: Path, files: Files, under: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as out:
        for number, (name, data) in enumerate(files.items()):
            method = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            out.writestr(under + name, data, compress_type=method)
    return path


def picture(seed: int, size: tuple[int, int], kind: str = "PNG") -> bytes:
    """Few grey values, so that it is small; lossless unless asked for a JPEG."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[: size[0] // 2, :, seed % 3] = 40 * (seed % 6)
    pixels[0, 0], pixels[-1, -1] = (250, 1, seed % 256), (2, seed % 256, 251)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def codes(size: tuple[int, int], planted: dict[tuple[int, int], int], **texts: str) -> bytes:
    """A 16-bit PNG that is 0 but for what is planted."""
    values = np.zeros(size, np.uint16)
    for at, code in planted.items():
        values[at] = code
    return png16(values, **texts)


def png16(values: np.ndarray, **texts: str) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def mask(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8) * 255).save(buffer, format="PNG")
    return buffer.getvalue()


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def dpt(values: np.ndarray) -> bytes:
    h, w = values.shape
    return struct.pack("<fii", 202021.25, w, h) + struct.pack(f"<{h * w}f", *values.ravel())


def nyu_files(numbers: tuple[int, ...] = (2, 1, 9)) -> Files:
    files: Files = {}
    for number in numbers:
        start = f"test/{'office' if number > 5 else 'kitchen'}_0004/"
        depth = codes(NYU, {(60, 60): 1000 + number})
        files[f"{start}rgb_{number:04d}.png"] = picture(number, NYU)
        files[f"{start}depth_{number:04d}.png"] = depth
        files[f"{start}filled_{number:04d}.png"] = codes(NYU, {(60, 60): 9})
    files["train/office_0001/rgb_0100.png"] = b"not looked at"
    return files


def nyu_row(tmp_path: Path, **changes) -> Row:
    return replace(rows("marigold", tmp_path)["NYUv2"], **{"count": 3, **changes})


def published_list(*numbers: int) -> str:
    """As Marigold's list is written: no line feed at the end."""
    lines = []
    for number in numbers:
        start = f"test/{'office' if number > 5 else 'kitchen'}_0004"
        names = (f"{start}/{kind}_{number:04d}.png" for kind in ("rgb", "depth", "filled"))
        lines.append(" ".join(names))
    return "\n".join(lines)


def measured(sample: Sample) -> dict[tuple[int, int], float]:
    """Depth in metres at every measured pixel."""
    assert sample.metres is not None
    assert sample.valid is not None
    assert not sample.metres[~sample.valid].any()
    at = [(int(y), int(x)) for y, x in np.argwhere(sample.valid)]
    return {pixel: float(sample.metres[pixel]) for pixel in at}


def as_float32(planted: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    return {at: float(np.float32(value)) for at, value in planted.items()}
