"""`Mirror`: the numbers of a run at Weights & Biases; `metrics.jsonl` stays the truth."""

import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

HOST = "api.wandb.ai"
RUN_ID = "wandb_id"


class Mirror(WandbLogger):
    """The one run that a folder has there, however often it is started again.

    Values stand over `trainer/global_step`, so those of steps that are repeated after a kill fall
    on themselves. Without a login nothing is asked for and nothing sent: `wandb sync` does that
    later, from the run folder. WANDB_MODE, if set, decides.
    """

    def __init__(self, *, folder: str, project: str, name: str) -> None:
        super().__init__(
            name=name,
            project=project,
            id=_run_id(Path(folder)),
            save_dir=folder,
            resume="allow",
            offline="WANDB_MODE" not in os.environ and not _has_login(os.environ),
        )


@rank_zero_only
def _run_id(folder: Path) -> str:
    """Made at the first start; not the run's name, under which others may have a run."""
    path = folder / RUN_ID
    if not path.exists() or not path.read_text():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text()


def _has_login(environ: Mapping[str, str]) -> bool:
    if environ.get("WANDB_API_KEY"):
        return True
    try:
        logins = netrc.netrc(environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    host = environ.get("WANDB_BASE_URL", HOST).rpartition("//")[2].partition("/")[0]
    return logins.authenticators(host) is not None
