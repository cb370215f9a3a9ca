"""Configs: every experiment composes and builds, no file is idle, a misspelling is refused."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from mofo.model.dit import DiTConfig, ThreeStreamDiT

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
CHOICES = sorted(
    str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/*.yaml")
)
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def configs() -> Iterator[None]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def overrides(group: str, name: str) -> list[str]:
    if group == "schedule":  # mounted twice
        return [f"schedule@objective.{kind}_schedule={name}" for kind in ("image", "depth")]
    return [f"{group}={name}"]


def nodes(cfg: object) -> Iterator[dict]:
    """Everything in a plain config that names a constructor."""
    children = cfg.values() if isinstance(cfg, dict) else cfg if isinstance(cfg, list) else ()
    if isinstance(cfg, dict) and "_target_" in cfg:
        yield cfg
    for child in children:
        yield from nodes(child)


def test_help_lists_every_choice_of_training() -> None:
    lines = (CONFIGS / "train.yaml").read_text().split("Choices, CHOICE=NAME\n")[1].splitlines()
    words = {line.strip(" ,") for text in lines for line in text.replace(",", " ").split()}
    listed = {choice for choice in CHOICES if not choice.startswith("eval/")}
    assert {name for choice in listed for name in choice.split("/")} - {"schedule"} <= words


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_its_nodes_build(name: str) -> None:
    cfg = compose("train", overrides=[f"experiment={name}"])
    assert cfg.name == name
    for key in ("model", "objective", "optimizer", "data"):
        instantiate(cfg[key], _convert_="all")
    for callback in cfg.callbacks.values():
        instantiate(callback, _convert_="all")


@pytest.mark.parametrize("choice", CHOICES)
def test_no_file_is_idle_and_each_names_real_constructors(choice: str) -> None:
    group, name = choice.split("/")
    top = "evaluate" if group == "eval" else "train"
    cfg = compose(top, overrides=overrides(group, name))
    node = OmegaConf.to_container(cfg, resolve=True)
    found = list(nodes(node))
    assert found
    for row in found:
        assert get_class(row["_target_"])


@pytest.mark.parametrize("choice", CHOICES)
def test_every_key_of_our_constructors_is_listed(choice: str) -> None:
    """Else Hydra could not tell a misspelt override from a key that was left out."""
    group, name = choice.split("/")
    top = "evaluate" if group == "eval" else "train"
    cfg = OmegaConf.to_container(compose(top, overrides=overrides(group, name)), resolve=True)
    for row in nodes(cfg):
        if row["_target_"].startswith("mofo."):
            signature = inspect.signature(get_class(row["_target_"]))
            wired = {"device", "dtype"}  # Python's to choose
            assert set(row) - {"_target_"} == set(signature.parameters) - wired, row["_target_"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "Key 'lrr' is not in struct"),
        ("trainer.max_step=1", "Key 'max_step' is not in struct"),
        ("data.sources.scenes.wieght=1", "Key 'wieght' is not in struct"),
        ("nme=x", "Could not override 'nme'"),
        ("optimiser=adamw", "Could not override 'optimiser'"),
    ],
)
def test_a_misspelt_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        compose("train", overrides=[override])
    assert message in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize("choice", ["model=huge", "experiment=none", "trainer=tpu"])
def test_an_unknown_choice_lists_the_known(choice: str) -> None:
    with pytest.raises(Exception, match=f"Could not find '{choice.replace('=', '/')}'") as caught:
        compose("train", overrides=[choice])
    assert "Available options" in str(caught.value)


def test_the_command_refuses_a_misspelling_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "optimizer.lrr=1", f"paths.runs={tmp_path}/runs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "lrr" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_ablation_is_a_choice_on_the_command_line() -> None:
    chosen = ["model=370m", "schedule@objective.image_schedule=logit_normal"]
    cfg = compose("train", overrides=[*chosen, "objective.fill=mean"])
    assert cfg.model.hidden_size == 1024
    assert cfg.objective.image_schedule._target_.endswith("LogitNormal")
    assert cfg.objective.depth_schedule._target_.endswith("Uniform")


def model(name: str) -> DiTConfig:
    cfg: DictConfig = compose("train", overrides=[f"model={name}"])
    return instantiate(cfg.model, _convert_="all")


def count(config: DiTConfig) -> int:
    with torch.device("meta"):
        network = ThreeStreamDiT(config)
    return sum(parameter.numel() for parameter in network.parameters())


# klein's own counts: black-forest-labs/FLUX.2-klein-4B and -9B, transformer only.
NAMED = {"370m": 370e6, "800m": 800e6, "3b": 3e9, "klein_4b": 3.88e9, "klein_9b": 9.08e9}


@pytest.mark.parametrize("name", NAMED)
def test_sizes_are_what_their_names_say_as_text_to_image_models(name: str) -> None:
    alone = replace(model(name), depth_channels=0, cross_stream_timestep_mixing=False)
    assert count(alone) == pytest.approx(NAMED[name], rel=0.02)


def test_klein_9b_with_depth_is_the_released_network() -> None:
    assert asdict(model("klein_9b")) == asdict(DiTConfig())
    assert count(model("klein_9b")) == pytest.approx(11.99e9, rel=5e-4)


def test_sizes_grow_with_their_names() -> None:
    counts = [count(model(name)) for name in ("xs", "small", "s", *NAMED)]
    assert counts == sorted(counts)
    assert set(MODELS) == {"xs", "small", "s", *NAMED}
