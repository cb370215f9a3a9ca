"""`make`: from the name of a converter to a finished set of shards.

A converter is a module of `mofo.data.convert` with a `VERSION`, raised whenever its samples change,
and a function `convert(**options)` that yields samples.
"""

import logging
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

import mofo.data.convert
from mofo.data.shards import write

log = logging.getLogger(__name__)


def make(
    folder: str | Path, *, converter: str, samples_per_shard: int = 1000, **options: Any
) -> bool:
    """Convert into `folder`; False, and nothing done, if the same set is there already."""
    known = sorted(module.name for module in pkgutil.iter_modules(mofo.data.convert.__path__))
    if converter not in known:
        raise ValueError(f"converter {converter!r} is unknown; there are {known}")
    module = import_module(f"mofo.data.convert.{converter}")
    made = write(
        module.convert(**options),
        folder,
        converter,
        samples_per_shard=samples_per_shard,
        made_from={
            "converter": converter,
            "version": module.VERSION,
            "samples_per_shard": samples_per_shard,
            **options,
        },
        total=options.get("count"),
    )
    log.info("%s %s", "wrote" if made else "nothing to do, already finished:", folder)
    return made
