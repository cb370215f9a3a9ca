"""Who started this process, and where it stands among the others: SLURM, torchrun, or nobody."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from omegaconf import DictConfig

from mofo.training.attempts import Refused


@dataclass(frozen=True, kw_only=True)
class Launch:
    """`nodes` and `devices` (ranks of each node) as the launcher gave them; None: it gave none."""

    by: str
    rank: int
    nodes: int | None = None
    devices: int | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> "Launch":
        """What the environment says; Refused where no training can follow from it."""
        if "TORCHELASTIC_RUN_ID" in environ:
            world, local = int(environ["WORLD_SIZE"]), int(environ["LOCAL_WORLD_SIZE"])
            return cls(
                by="torchrun", rank=int(environ["RANK"]), nodes=world // local, devices=local
            )
        # A batch script has SLURM_NTASKS too, and a shell of salloc: srun alone has steps.
        if "SLURM_STEP_NUM_TASKS" not in environ:
            return cls(by="nobody", rank=int(environ.get("LOCAL_RANK", "0")))
        tasks, nodes = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_STEP_NUM_NODES"])
        if tasks > 1 and environ.get("SLURM_NTASKS_PER_NODE") != str(tasks // nodes):
            raise Refused(
                f"SLURM started {tasks} tasks on {nodes} nodes, but --ntasks-per-node is "
                f"{environ.get('SLURM_NTASKS_PER_NODE', 'not given')}; ask for one task a GPU with "
                "--nodes and --ntasks-per-node"
            )
        rank = int(environ["SLURM_PROCID"])
        return cls(by="SLURM", rank=rank, nodes=nodes, devices=tasks // nodes)

    def environment(self) -> ClusterEnvironment:
        """The same for Lightning, which by itself takes a batch script's rank for all of them."""
        match self.by:
            case "SLURM":
                # Its own requeue saves inside the signal handler, in every process of the job.
                return SLURMEnvironment(auto_requeue=False)
            case "torchrun":
                return TorchElasticEnvironment()
            case _:
                return LightningEnvironment()

    def trainer(self, cfg: DictConfig) -> dict[str, Any]:
        """What `trainer` of a config becomes; Refused if it asks for something else."""
        given = {"num_nodes": self.nodes, "devices": self.devices}
        out: dict[str, Any] = {"plugins": [self.environment()]}
        for name, there in given.items():
            asked = cfg.trainer[name]
            if there is None:
                out[name] = 1 if asked == "auto" and name == "num_nodes" else asked
                continue
            if asked not in ("auto", there):
                raise Refused(
                    f"trainer.{name} is {asked}, but {self.by} started {self.nodes} nodes of "
                    f"{self.devices} ranks each; leave it out, it is taken from there"
                )
            out[name] = there
        return out
