"""Models of both kinds and baselines: what is asked of them, and what is refused."""

import re
from pathlib import Path
from string import Template
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from judged import MODEL, PICTURES, ROW, SAMPLES, depths, go, listed, sample
from omegaconf import DictConfig
from PIL import Image
from published import codes, picture, tar
from transformers import (
    BertConfig,
    BertModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
)
from transformers import DPTImageProcessorPil as Processor

from evaluate import evaluate
from mofo.evaluation.contender import Contender
from mofo.evaluation.kept import keeping
from mofo.evaluation.lines import read_lines
from mofo.evaluation.predictors import (
    Predictor,
    constant,
    mean_map,
    of_release,
    of_transformers,
    shown_at,
)
from mofo.evaluation.protocol import Fit, Protocol
from mofo.model import weights

ROOT = Path(__file__).parents[1]


def test_a_predictor_declares_its_kind_and_gives_one_map_per_image() -> None:
    with pytest.raises(ValueError, match="predictions of x are is 'depth'.*metric.*disparity"):
        Predictor(name="x", kind="depth", predict=constant.predict)
    short = Predictor(name="x", kind="scale", predict=lambda images, keys: [])
    with pytest.raises(ValueError, match="x gave 0 depth maps for 3 images"):
        short(PICTURES, ["a", "b", "c"])


def test_mean_map_is_the_mean_of_unit_mean_depth_at_measured_pixels() -> None:
    depth = np.array([[1, 3], [2, 2]], np.float32)
    picture = Image.new("RGB", (2, 2))
    valid = np.array([[True, True], [True, False]])
    first = sample(0, picture=picture, metres=depth, valid=np.ones((2, 2), bool))
    second = sample(1, picture=picture, metres=10 * depth, valid=valid)
    none = sample(2, metres=None, valid=None)
    [got] = mean_map([first, second, none], side=2)([np.array(picture)], ["x"])
    assert np.allclose(got.depth, [[0.5, 1.5], [1.0, 1.0]])
    large = np.zeros((4, 6, 3), np.uint8)
    assert mean_map([first], side=2)([large], ["x"])[0].depth.shape == (4, 6)


def test_mean_map_weighs_images_equally_and_predicts_one_where_nothing_was_measured() -> None:
    low = np.zeros((8, 8), bool)
    low[4:] = True
    metres = np.tile(np.array([1.0, 3.0], np.float32).repeat(4), (8, 1))
    one = sample(0, picture=Image.new("RGB", (8, 8)), metres=metres, valid=low)
    [got] = mean_map([one], side=2)([np.zeros((2, 2, 3), np.uint8)], ["x"])
    assert np.allclose(got.depth, [[1, 1], [0.5, 1.5]])


def test_a_training_set_without_depth_has_no_mean_map() -> None:
    with pytest.raises(ValueError, match="no measured depth"):
        mean_map([sample(0, metres=None, valid=None)])


def test_a_releases_noise_follows_the_key_and_untrusted_pixels_have_no_depth() -> None:
    asked = {}

    def image_to_depth(images, *, seeds, **how):
        asked.update(zip("ab"[: len(images)], seeds, strict=True), how=how)
        depth = np.ones((2, 2), np.float32)
        grey = [image[0, 0, 0] for image in images]
        return [
            SimpleNamespace(depth=depth, valid=depth > g, uncertainty=0.1 * depth) for g in grey
        ]

    mofo = SimpleNamespace(image_to_depth=image_to_depth, dtype=torch.float32, weights_hash="f00d")
    predictor = of_release(mofo, name="mofo", num_steps=4, ensemble=2, fit="stretch", size=[8, 16])
    images = [np.full((2, 2, 3), grey, np.uint8) for grey in (0, 9)]
    first, second = predictor(images, ["one", "two"])
    assert (first.depth == 1).all()
    assert np.isnan(second.depth).all()
    assert first.uncertainty == pytest.approx(0.1)
    together = dict(asked)
    predictor(images[1:], ["two"])
    assert asked["a"] == together["b"] != together["a"]
    assert asked["how"] == {"num_steps": 4, "ensemble": 2, "fit": "stretch", "size": (8, 16)}
    assert (predictor.kind, predictor.weights) == ("scale", "f00d")
    assert predictor.settings["seed"] == 0


def test_pictures_are_shown_at_the_size_of_the_rule_and_predictions_brought_back() -> None:
    seen = []

    def make(image, key):
        seen.append(image.shape)
        depth = image.mean(2)
        depth[:2] = np.nan
        return depth

    ramp = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (40, 1))[..., None].repeat(3, 2)
    [made] = shown_at(depths(make), 30)([ramp], ["x"])
    assert seen == [(20, 30, 3)]
    assert made.depth.shape == (40, 60)
    finite = np.isfinite(made.depth)
    assert not finite[:3].any()
    assert finite[6:].all()
    assert np.abs(made.depth[6:] - ramp[6:, :, 0]).max() < 5
    assert shown_at(constant, None) is constant


def save(network, folder: Path, size: int = 28) -> Path:
    network.save_pretrained(folder)
    Processor(size={"height": size, "width": size}, ensure_multiple_of=14).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def depth_anything(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
        image_size=28, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
        apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5], neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4,
        head_hidden_size=4,
    )  # fmt: skip
    network = DepthAnythingForDepthEstimation(config)
    return save(network, tmp_path_factory.mktemp("models") / "depth-anything")


@pytest.fixture(scope="module")
def dpt(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=16, backbone_out_indices=[0, 1, 2, 3], is_hybrid=False,
        neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4,
    )  # fmt: skip
    return save(DPTForDepthEstimation(config), tmp_path_factory.mktemp("models") / "dpt", size=32)


@pytest.mark.parametrize("name", ["depth_anything", "dpt"])
def test_a_depth_model_of_transformers_predicts_at_the_size_of_each_picture(request, name) -> None:
    folder = request.getfixturevalue(name)
    predictor = of_transformers(folder, name="theirs", kind="disparity")
    made = predictor(PICTURES, ["a", "b", "c"])
    assert [one.depth.shape for one in made] == [(30, 40), (30, 40), (30, 45)]
    assert all(np.isfinite(one.depth).all() for one in made)
    assert np.array_equal(made[0].depth, made[1].depth)
    [alone] = predictor(PICTURES[2:], ["c"])
    assert np.allclose(alone.depth, made[2].depth, rtol=1e-5)
    assert predictor.weights == weights.digest(folder)
    assert made[0].depth.std() > 0


def test_a_depth_model_runs_and_is_reported_in_its_own_space(tmp_path, depth_anything) -> None:
    fit = Fit(alignment="disparity", predicts=["disparity"], floor=1e-3, positive_only=True)
    protocol = Protocol(id="test@1", about="", fits={"disparity": fit})
    contender = Contender(model=str(depth_anything), kind="disparity")
    judged = contender.predictor(ROW, listed(SAMPLES))
    lines = go(tmp_path, predictors=[judged], protocol=protocol)
    assert len(lines) == 7
    for line in lines:
        assert (line["predictor"], line["kind"]) == ("depth-anything", "disparity")
        # a random network's disparity may be negative everywhere: then that is what is said
        assert line["fits"] or "positive" in line["failed"]


def test_what_a_depth_model_predicts_must_be_said(depth_anything) -> None:
    with pytest.raises(ValueError, match="depth-anything are is not said; say kind="):
        Contender(model=str(depth_anything)).predictor(ROW, listed(SAMPLES))
    with pytest.raises(ValueError, match="kind is metric, but small is a mofo release"):
        Contender(model="small", kind="metric").predictor(ROW, listed(SAMPLES))


def test_a_depth_model_without_all_of_its_weights_is_refused(tmp_path, depth_anything) -> None:
    tensors = weights.read_tensors(depth_anything / "model.safetensors")
    lost = sorted(tensors)[0]
    for path in depth_anything.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rest = {name: tensor for name, tensor in tensors.items() if name != lost}
    weights.write_tensors(rest, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 of the tensors .*{lost}"):
        of_transformers(tmp_path, name="x", kind="disparity")


def test_a_model_that_is_none_of_depth_is_refused(tmp_path) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    save(BertModel(config), tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded as a depth model of transformers"):
        of_transformers(tmp_path, name="x", kind="disparity")


def test_an_unknown_model_is_refused_at_once_offline(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", str(tmp_path / "nothing")):
        with pytest.raises(ValueError, match=f"there is no folder {name}"):
            Contender(model=name, kind="disparity").predictor(ROW, listed(SAMPLES))


def test_another_contender_takes_over_how_to_ask_but_not_what_it_is() -> None:
    first = Contender(model="a", kind="disparity", num_steps=4, seed=3, label="first")
    assert first.another("b", "folder") == Contender(model="folder", num_steps=4, seed=3, label="b")
    second = first.another("c", {"model": "d", "kind": "metric", "seed": 1})
    assert (second.kind, second.seed, second.num_steps) == ("metric", 1, 4)
    with pytest.raises(ValueError, match="also={e: ...} has modell, but accepted are: model, pred"):
        first.another("e", {"modell": "d"})
    with pytest.raises(ValueError, match="needs a model or predictions"):
        first.another("e", {"kind": "scale"})


# The command


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("evaluate", list(overrides))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("limit=-1", "limit is -1, but must be a whole number, 1 or more"),
        ("limit=0", "limit is 0, but must be"),
        ("batch_size=0", "batch_size is 0, but must be"),
        ("workers=0", "workers is 0, but must be"),
        ("num_steps=0", "num_steps is 0, but must be"),
        ("ensemble=0", "ensemble is 0, but must be"),
        ("name=../x", "name is '../x', but must be the plain name of a folder"),
        ("name=..", "name is '..', but must be"),
        ("count=3", "count is 3, but must name sets: 'count={SET: VALUE}'"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_made(tmp_path, override, words) -> None:
    cfg = composed(f"paths.runs={tmp_path / 'runs'}", override)
    cfg.eval.rows = [{**ROOMS, "shards": str(tmp_path / "none")}]
    with pytest.raises(ValueError, match=re.escape(words)):
        evaluate(cfg)
    assert not list(tmp_path.iterdir())


ROOMS = {"_target_": "mofo.evaluation.benchmark.Row", "name": "rooms"}


def test_a_kind_that_the_protocol_cannot_score_is_refused_before_weights_are_loaded(
    tmp_path, monkeypatch, depth_anything
) -> None:
    def refuse(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("mofo.evaluation.contender.Mofo.load", refuse)
    monkeypatch.setattr("mofo.evaluation.contender.of_transformers", refuse)
    shared = [f"run_dir={tmp_path / 'run'}", "eval=scale"]
    for asked in (
        [f"release={depth_anything}", "kind=disparity"],
        [f"also={{theirs: {{model: {depth_anything}, kind: disparity}}}}"],
    ):
        with pytest.raises(ValueError, match="scale@1 scores .*, not disparity"):
            evaluate(composed(*shared, *asked))
    with pytest.raises(ValueError, match="metric@1 scores .*, not scale"):
        evaluate(composed(f"run_dir={tmp_path / 'run'}", "eval=metric"))
    keeping(MODEL, tmp_path, "NYUv2")
    with pytest.raises(ValueError, match="metric@1 scores .*, not scale"):
        evaluate(composed(f"run_dir={tmp_path}", "eval=metric", f"predictions={tmp_path}/model"))


@pytest.mark.parametrize("eval_name", ["marigold", "scale"])
def test_the_remedies_in_errors_can_be_typed(tmp_path, eval_name) -> None:
    """Another list and another count are accepted by what their errors say to type."""
    source, truth = tmp_path / "kitti.tar", sample(0, (352, 1216))
    files = {"d/a.png": picture(1, (352, 1216)), "d/b.png": codes((352, 1216), {(200, 600): 900})}
    tar(source, files)
    folder = tmp_path / "kitti"
    folder.mkdir()
    (folder / "eigen_test_files_with_gt.txt").write_text("d/a.png d/b.png 1")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    np.save(theirs / "d_a.npy", truth.metres)
    asked = [
        f"eval={eval_name}", f"run_dir={tmp_path / 'run'}", f"predictions={theirs}", "kind=scale",
        f"paths.benchmarks={tmp_path}", "sets=[KITTI]", f"source={{KITTI: {source}}}",
    ]  # fmt: skip
    for _ in range(2):
        with pytest.raises(ValueError, match="KITTI") as caught:
            evaluate(composed(*asked))
        [typed] = re.findall(r"'((?:count|list_sha256)=[^']*)'", str(caught.value))
        asked.append(typed)
    assert asked[-2:] == ["list_sha256={KITTI: null}", "count={KITTI: 1}"]
    assert "theirs" in evaluate(composed(*asked))
    assert read_lines(tmp_path / "run")[0]["failed"] is None


def test_help_teaches_the_keys_of_this_command_and_no_others() -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("evaluate", return_hydra_config=True)
    said = Template(cfg.hydra.help.template).substitute()  # as Hydra does
    assert "python evaluate.py model=small eval=small" in said
    for key in set(composed()) - {"eval"}:
        assert re.search(rf"^{key}: ", said, re.MULTILINE) or key in ("captions", "paths"), key
    for path in (ROOT / "configs" / "eval").glob("*.yaml"):
        assert re.search(rf"^  {path.stem} +\w", said, re.MULTILINE), path
    assert "a plain folder name" in said
    assert "370m" not in said
    assert "override hydra" not in said
    assert len(said.splitlines()) < 90
    assert max(map(len, said.splitlines())) <= 100


def test_a_set_that_the_protocol_does_not_define_is_refused() -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("evaluate", ["eval=marigold", "sets=[Sintel]"])
        elsewhere = compose("evaluate", ["eval=marigold", "source={Sintel: x}"])
    for one in (cfg, elsewhere):
        with pytest.raises(ValueError, match="does not define the sets Sintel; it defines: NYUv2"):
            evaluate(one)
