"""`mofo export`: the weights that were trained, in a whole folder, with a card that is true."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from made_lines import lines_of, write_run
from omegaconf import OmegaConf
from PIL import Image
from tiny import CONFIG, SIZE, network, save_release

from mofo import __version__
from mofo.cli import ACTIONS, main
from mofo.data.sample import Sample
from mofo.data.write import write
from mofo.evaluation.report import report
from mofo.model import weights
from mofo.options import parser
from mofo.pipeline import Mofo
from mofo.training import card, store
from mofo.training import export as exports
from mofo.training.export import export

ROOT = Path(__file__).parents[1]
SAMPLE = Sample(
    key="a",
    picture=Image.fromarray(np.full((*SIZE, 3), 100, np.uint8)),
    metres=np.linspace(1, 3, SIZE[0] * SIZE[1], dtype=np.float32).reshape(SIZE),
    valid=np.ones(SIZE, bool),
    intrinsics=None,
    captions=("a grey wall",),
    metric=True,
    source="camera A",
    licence="CC0-1.0",
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder as training leaves it: frozen config and a checkpoint with an average.

    Of its three training sets one is there, one is gone and one was replaced.
    """
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        changes = [f"model.{name}={value}" for name, value in CONFIG.items()]
        cfg = compose("train", [*changes, "name=tiny", f"data.size=[{SIZE[0]},{SIZE[1]}]"])
    bare = replace(SAMPLE, key="b", metres=None, valid=None, source="camera B")
    write([SAMPLE, bare], "sets/walls", "walls")
    write([replace(SAMPLE, source="secret")], "sets/new", "new", made_from={"seed": 2})
    OmegaConf.set_struct(cfg, False)
    cfg.data.sources = {
        "walls": {"shards": "sets/walls", "weight": 0.7, "max_kept": 0.15},
        "lost": {"shards": "sets/lost", "weight": 0.2},
        "replaced": {"shards": "sets/new", "weight": 0.1, "make": {"seed": 1}},
    }
    where = tmp_path / "runs" / "tiny"
    (where / "checkpoints").mkdir(parents=True)
    OmegaConf.save(cfg, where / "config.yaml", resolve=True)
    raw, average = network(1).state_dict(), network(2).state_dict()
    plant(where, 5, {"network": raw, "average": average}, samples_seen=160)
    return where


def plant(run: Path, step: int, parts: dict[str, dict], samples_seen: int = 0) -> None:
    """Leave a checkpoint in a run's folder, as training does."""
    named = parts.items()
    tensors = {f"{part}/{name}": one for part, state in named for name, one in state.items()}
    facts = {"data": {"samples_seen": samples_seen}, "commit": "0123456789ab"}
    store.save(run / "checkpoints", step, tensors, facts, keep=9).wait()


def edit_config(run: Path, changes: dict) -> None:
    cfg = OmegaConf.load(run / "config.yaml")
    OmegaConf.save(OmegaConf.merge(cfg, changes), run / "config.yaml")


def card_of(run: Path, out: Path, **options) -> str:
    export(run, out, **{"num_samples": 0} | options)
    return (out / "README.md").read_text()


def refused(capsys, argv: list) -> str:
    """What a refused command line prints, which must not be a traceback."""
    assert main([str(one) for one in argv]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def score(folder: Path, hashes: dict[str, str]) -> None:
    """Write a report into `folder` of what the names of `hashes` predict, and of a baseline."""
    judged = {**hashes, "constant": None}
    lines = [lines_of(name, num=2, weights=weights) for name, weights in judged.items()]
    report(write_run(folder, *lines))


@pytest.mark.parametrize(("kind", "seed"), [("ema", 2), ("raw", 1)])
def test_an_exported_run_is_what_was_trained(run: Path, tmp_path: Path, kind, seed) -> None:
    out = tmp_path / "out"
    export(run, out, averaged=kind == "ema", dtype=torch.float32, num_samples=0)
    wanted, mofo = network(seed).state_dict(), Mofo.load(out, device="cpu")
    for name, tensor in mofo.release.dit.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert mofo.size == SIZE
    frozen = OmegaConf.load(run / "config.yaml").objective
    assert mofo.release.schedule.rgb_shift_mu == frozen.image_schedule.mu
    assert mofo.joint("a kitchen", num_steps=2).depth.shape == SIZE


def test_a_release_draws_with_the_weight_of_the_prompt_that_it_recommends(
    run: Path, tmp_path: Path
) -> None:
    edit_config(run, {"callbacks": {"export": {"cfg_scale": 2.5}}})
    export(run, tmp_path / "out", num_samples=0)
    mofo = Mofo.load(tmp_path / "out", device="cpu")
    made = [
        mofo.joint("a kitchen", num_steps=1),
        mofo.depth_to_image(SAMPLE.metres, "a kitchen", num_steps=1),
        mofo.joint("a kitchen", num_steps=1, cfg_scale=3.0),
        mofo.image_to_depth(SAMPLE.image, num_steps=1),
    ]
    assert [one.metadata["cfg_scale"] for one in made] == [2.5, 2.5, 3.0, 1.0]


def test_export_load_export_keeps_every_byte_of_the_tensors(run: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    export(run, first, num_samples=0)
    assert {path.name for path in first.iterdir()} == {
        "README.md", "ae_basis.safetensors", "config.json", "config.yaml", "model.safetensors",
    }  # fmt: skip
    release = weights.load(first, dtype=torch.bfloat16)
    weights.save(release, second)
    before = weights.read_tensors(first / "model.safetensors")
    after = weights.read_tensors(second / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        head = name.startswith("dit.depth_final_layer.")
        assert tensor.dtype == after[name].dtype == (torch.float32 if head else torch.bfloat16)
        assert torch.equal(tensor, after[name])
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()
    assert (first / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()
    shipped = weights.read_tensors(ROOT / "mofo" / "small" / "ae_basis.safetensors")
    kept = weights.read_tensors(first / "ae_basis.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in shipped.items())


def test_an_export_from_the_shell_has_pictures_of_its_weights(run: Path, tmp_path: Path) -> None:
    edit_config(run, {"callbacks": {"preview": {"captions": ["a red sofa"]}}})
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert len({(out / "samples" / f"{seed}.png").read_bytes() for seed in range(4)}) == 4
    text = (out / "README.md").read_text()
    assert "a red sofa (seed 3)" in text
    assert re.findall(r"\]\((.*?)\)", text) == [f"samples/{seed}.png" for seed in range(4)]
    with Image.open(out / "samples" / "0.png") as opened:
        assert opened.width > 3 * card.SIDE
    export(run, tmp_path / "again", num_samples=1)
    export(run, tmp_path / "raw", num_samples=1, averaged=False)
    first, again, raw = (
        (tmp_path / name / "samples" / "0.png").read_bytes() for name in ("out", "again", "raw")
    )
    assert first == again
    assert first != raw


def test_without_previews_the_training_sets_give_the_captions(run: Path, tmp_path: Path) -> None:
    edit_config(run, {"callbacks": {"preview": None}})
    assert "a grey wall (seed 0)" in card_of(run, tmp_path / "out", num_samples=1)


def test_a_card_says_what_was_trained_and_how(run: Path, tmp_path: Path) -> None:
    text = card_of(run, tmp_path / "out")
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    about = OmegaConf.to_container(OmegaConf.create(head))
    assert (about["license"], about["library_name"]) == ("other", "mofo")
    assert "depth-estimation" in about["tags"]
    count = sum(tensor.numel() for tensor in network(0).state_dict().values())
    for words in (
        f"| parameters | {count / 1e6:.2f} M in ",
        "| resolution | 16x24 pixels |",
        f"`{weights.digest(tmp_path / 'out')}`",
        f"mofo {__version__}, torch {torch.__version__}",
        "| steps | 5 |",
        "| samples seen | 160 |",
        "| seed | 0 |",
        "| commit | 0123456789ab |",
        "| started from | random weights |",
        "| weights | average over training, decay 0.999 |",
        "hidden_size=32",
        "i2d_probability=0.2",
        "Not chosen yet",
    ):
        assert words in body, words
    assert "| weights | the last |" in card_of(run, tmp_path / "raw", averaged=False)


def test_commands_of_a_card_are_commands_of_mofo(run: Path, tmp_path: Path) -> None:
    edit_config(run, {"encoders": {"text": "some/qwen"}})
    for text in (card_of(run, tmp_path / "qwen"), card_of(run, tmp_path / "second")):
        lines = [line for line in text.splitlines() if line.startswith("mofo ")]
        modes = [parser(ACTIONS).parse_args(shlex.split(line)[1:]) for line in lines]
        assert [mode.mode for mode in modes] == ["joint", "i2d", "d2i"]
        assert {mode.text_encoder for mode in modes} == {"TEXT_ENCODER"}
        assert "that of the text encoder, `some/qwen`" in text


def test_a_card_quotes_the_sets_that_were_trained_on_and_invents_none(
    run: Path, tmp_path: Path
) -> None:
    text = card_of(run, tmp_path / "out").split("## Training data")[1].split("## Evaluation")[0]
    walls, lost, replaced = text.split("**")[2::2]
    assert "weight 0.7; max_kept=0.15" in walls
    assert "2 samples, 1 with depth, 2 in metres" in walls
    for words in ("from camera A", "from camera B", "licence: CC0-1.0"):
        assert words in walls
    for gone in (lost, replaced):
        assert "licences" in gone
        assert "not known" in gone
    assert "another set (seed=2)" in replaced
    assert "secret" not in text


def test_numbers_stand_beside_their_protocol_and_only_those_of_these_weights(
    run: Path, tmp_path: Path
) -> None:
    export(run, tmp_path / "out", num_samples=0)
    ours = weights.digest(tmp_path / "out")
    score(run.parent / "eval" / "any", {"mine": ours, "stranger": "0" * 16})
    text = card_of(run, tmp_path / "again")
    assert "marigold@1, least-squares scale and shift, clipped to 0.001–10; list d9a47a15" in text
    assert "Command `python evaluate.py`, commit abc, on one core." in text
    rows = {line.split()[0]: line for line in text.split("```text")[1].splitlines() if line}
    assert {"tiny", "constant"} <= rows.keys()
    assert "stranger" not in text
    assert "2/2" in rows["tiny"]
    assert "Not evaluated" in card_of(run, tmp_path / "raw", averaged=False)


def test_numbers_of_a_runs_own_export_are_those_of_its_rounded_weights(
    run: Path, tmp_path: Path
) -> None:
    export(run, run / "export", dtype=torch.float32, num_samples=0)
    score(run, {"mine": (whole := weights.digest(run / "export"))})
    assert f"Measured on weights {whole}" in card_of(run, tmp_path / "rounded")
    export(run, tmp_path / "raw", averaged=False, dtype=torch.float32, num_samples=0)
    (tmp_path / "raw" / "model.safetensors").replace(run / "export" / "model.safetensors")
    assert "Not evaluated" in card_of(run, tmp_path / "later")


def test_a_base_without_depth_claims_none(run: Path, tmp_path: Path) -> None:
    without = {"depth_channels": 0, "depth_decoder_num_layers": 0}
    without |= {"cross_stream_timestep_mixing": False}
    edit_config(run, {"model": without})
    plant(run, 6, {"network": network(1, **without).state_dict()})
    text = card_of(run, tmp_path / "out", averaged=False, num_samples=2)
    assert "It has no depth stream." in text
    assert "mofo i2d" not in text
    assert "## Evaluation" not in text
    assert not (tmp_path / "out" / "samples").exists()


def test_an_export_never_replaces_what_is_there(run: Path, tmp_path: Path, capsys) -> None:
    folder = save_release(tmp_path / "release")
    before = (folder / "model.safetensors").read_bytes()
    assert "holds a release already" in refused(capsys, ["export", run, "--out", folder])
    assert (folder / "model.safetensors").read_bytes() == before
    assert "is not empty" in refused(capsys, ["export", run, "--out", run])
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty", num_samples=0)
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_failure_at_the_very_end_leaves_nothing(run: Path, tmp_path: Path, monkeypatch) -> None:
    def fill_the_disk(folder: Path, *_, **__) -> None:
        assert (folder / "model.safetensors").exists()
        raise OSError("No space left on device")

    monkeypatch.setattr(exports, "write_card", fill_the_disk)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        export(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_samples_that_cannot_be_drawn_say_how_to_go_without(run: Path, tmp_path: Path) -> None:
    edit_config(run, {"encoders": {"text": str(tmp_path / "none")}})
    with pytest.raises(ValueError, match=r"no samples can be drawn: .*\(--samples 0\)"):
        export(run, tmp_path / "out")
    with pytest.raises(ValueError, match="-1 samples cannot be drawn; give 0 or more"):
        export(run, tmp_path / "out", num_samples=-1)
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_be_exported_says_why(run: Path, tmp_path: Path, capsys) -> None:
    argv = ["export", run, "--out", tmp_path / "out"]
    absent = ["export", tmp_path / "absent", "--out", tmp_path / "out"]
    assert "is no training run" in refused(capsys, absent)

    plant(run, 6, {"network": network(1).state_dict()})
    assert "--weights raw" in refused(capsys, argv)

    cfg = OmegaConf.load(run / "config.yaml")
    edit_config(run, {"model": {"hidden_size": 64}})
    assert "axes_dim" in refused(capsys, argv)
    part = OmegaConf.create({"model": cfg.model, "data": {"size": [64, 64]}})
    OmegaConf.save(part, run / "config.yaml")
    assert "lacks encoders.text, encoders.autoencoder" in refused(capsys, argv)
    OmegaConf.save(cfg, run / "config.yaml")
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    kept = run / "checkpoints" / "step_00000005"
    (kept / "manifest.json").write_text("{}")
    assert "has no checkpoint that is whole" in refused(capsys, argv)
    assert kept.exists()
    kept.rename(kept.with_suffix(".ckpt"))
    assert "written by an older version" in refused(capsys, argv)
    assert not (tmp_path / "out").exists()
