"""Published archives, read where they are: a tar, a zip, or the folder either unpacks to.

The members are found once, from the headers; each is then read by its offset. Nothing is unpacked
and no name in an archive becomes a path. An `Archive` may be used after a fork, in threads, and
pickled.
"""

import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from mofo.data.sample import DAMAGE

NUM_SHOWN = 10  # missing files that an error names
ZIP_START = b"PK\3\4"
ZIP_HEADER = 30  # bytes of a zip's local header, before the name

T = TypeVar("T")


class Member(NamedTuple):
    """Where a member is: `packed` means a zip's local header and its compression come first."""

    offset: int
    size: int
    packed: bool = False


class Archive:
    """Bytes by name; names are relative to `under`, a folder inside of the source."""

    def __init__(self, source: str | Path, *, under: str = "") -> None:
        self.source, self.under = Path(source), under.strip("/")
        self._members = self._index() if self.source.is_file() else None
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    def __contains__(self, name: str) -> bool:
        if self._members is None:
            return os.path.isfile(self._path(name))
        return name in self._members

    def names(self) -> list[str]:
        """Every file, in the archive's own order; a folder's sorted."""
        if self._members is not None:
            return list(self._members)
        root = self.source / self.under
        found = (Path(folder) / name for folder, _, files in os.walk(root) for name in files)
        return sorted(path.relative_to(root).as_posix() for path in found)

    def read(self, name: str) -> bytes:
        """All bytes of a member."""
        if self._members is None:
            return self._path(name).read_bytes()
        member = self._members[name]
        if not member.packed:
            return self._pread(member.offset, member.size)
        return self._unpack(member)

    def decode(self, name: str, decoder: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """What a decoder makes of a member; a ValueError with the member's name if it cannot."""
        try:
            return decoder(self.read(name), *arguments, **options)
        except DAMAGE as error:
            where = f"{self.source}: {name}"
            raise ValueError(f"{where} is damaged ({type(error).__name__}: {error})") from error

    def require(self, names: Iterable[str], download: str) -> None:
        """Refuse to go on without all of these, and say where the set is to be had."""
        if not self.source.exists():
            raise ValueError(f"{self.source} does not exist; {download}")
        missing = [name for name in names if name not in self]
        if missing:
            shown = ", ".join(missing[:NUM_SHOWN])
            more = f" and {len(missing) - NUM_SHOWN} more" if len(missing) > NUM_SHOWN else ""
            raise ValueError(f"{self.source} lacks {len(missing)} files: {shown}{more}; {download}")

    def _path(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/") or "\\" in name:
            raise ValueError(f"{name!r} is not inside of {self.source}; leave it out of the list")
        return self.source.joinpath(self.under, *parts)

    def _index(self) -> dict[str, Member]:
        if zipfile.is_zipfile(self.source):
            with zipfile.ZipFile(self.source) as file:
                entries = [
                    (entry.filename, Member(entry.header_offset, entry.compress_size, True))
                    for entry in file.infolist()
                    if not entry.is_dir()
                ]
        else:
            entries = _tar_members(self.source)
        start = f"{self.under}/" if self.under else ""
        names = ((name.removeprefix("./"), member) for name, member in entries)
        return {name[len(start) :]: member for name, member in names if name.startswith(start)}

    def _open(self) -> None:
        # At once, so that threads never open it for one another, and as long as the archive lives.
        self._file: BufferedReader | None = None
        if self._members is not None:
            self._file = open(self.source, "rb")  # noqa: SIM115

    def _pread(self, offset: int, size: int) -> bytes:
        assert self._file is not None  # only archives have members
        # At an offset, so that neither threads nor forked processes move one another's place.
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise EOFError(f"{len(data)} of {size} bytes at {offset}: the archive is cut short")
        return data

    def _unpack(self, member: Member) -> bytes:
        header = self._pread(member.offset, ZIP_HEADER)
        _, method, crc, name, extra = struct.unpack("<8sH4xI8xHH", header)
        data = self._pread(member.offset + len(header) + name + extra, member.size)
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"compression {method} is neither stored nor deflated; unpack the zip")
        data = data if method == zipfile.ZIP_STORED else zlib.decompress(data, -zlib.MAX_WBITS)
        # 0 where the writer did not seek back: the checksum then follows the data.
        if crc and zlib.crc32(data) != crc:
            raise ValueError("its checksum is wrong")
        return data


def _tar_members(path: Path) -> list[tuple[str, Member]]:
    try:
        tar = tarfile.open(path, mode="r:")  # noqa: SIM115
    except tarfile.ReadError as error:
        with path.open("rb") as file:
            start = file.read(len(ZIP_START))
        if start == ZIP_START or not start:
            raise _cut_short(path, "it has no end" if start else "it is empty") from error
        raise ValueError(
            f"{path} is neither a zip nor a plain tar ({error}); decompress it (gunzip, unxz), or "
            "unpack it and name the folder"
        ) from error
    with tar:
        try:
            return [(m.name, Member(m.offset_data, m.size)) for m in tar if m.isreg()]
        except tarfile.ReadError as error:
            raise _cut_short(path, error) from error


def _cut_short(path: Path, reason: object) -> ValueError:
    size = path.stat().st_size
    return ValueError(f"{path} is cut short at {size} bytes ({reason}); fetch it again")
