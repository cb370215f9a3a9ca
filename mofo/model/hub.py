"""Names -> folders: a path on this machine, or a repository of the Hugging Face hub.

    folder = fetch("org/name", wanted, revision="v1.0")

What comes from the hub is weights, configurations and tokenizers; code is neither fetched nor run.
"""

import re
from pathlib import Path
from typing import NamedTuple

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # org/name; no ./name, no ../name
# Taken along where a repository has them.
BESIDE = (
    "model.safetensors.index.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


class Wanted(NamedTuple):
    """What a folder is for: each pattern must match a file in it."""

    patterns: tuple[str, ...]
    files: str  # the same in words
    option: str  # of the command line, where the folder can be given


def fetch(name: str | Path, wanted: Wanted, revision: str | None = None) -> Path:
    """The folder (or file) `name` if it exists, else a snapshot of the hub's repository `name`.

    A snapshot is downloaded once; offline, the one downloaded earlier is found again.
    """
    path = Path(name)
    if path.exists():
        if revision is not None:
            raise ValueError(
                f"revision is {revision!r}, but {name} is a folder on this machine and has none; "
                "leave revision out, or give a hub id"
            )
        return path
    reason = ""
    if HUB_ID.fullmatch(str(name)):
        found = _snapshot(str(name), wanted, revision)
        if isinstance(found, Path):
            return found
        reason = f". From the hub: {found}"
    option = wanted.option if wanted.option.endswith("=") else f"{wanted.option} "
    raise ValueError(
        f'there is no folder {name}; accepted are "small", a folder with {wanted.files} '
        f"({option}FOLDER), or a hub id, org/name{reason}"
    )


def _snapshot(name: str, wanted: Wanted, revision: str | None) -> Path | str:
    """The snapshot's folder, or why there is none."""
    from huggingface_hub import constants, snapshot_download  # slow, and seldom needed

    try:
        allowed = [*wanted.patterns, *BESIDE]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=allowed))
        missing = [pattern for pattern in wanted.patterns if not any(folder.glob(pattern))]
        if not missing:
            return folder
        reason = f"{folder} lacks {', '.join(missing)}"
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = str(error).strip().splitlines()[0]
    at = f"{name} at revision {revision}" if revision else name
    offline = "; HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or place the files"
    return f"{at} cannot be had ({reason})" + (offline if constants.HF_HUB_OFFLINE else "")
