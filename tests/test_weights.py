"""Files of weights: strict, complete or absent, and what a base grows into."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import diffusers_network
from torch import Tensor, nn

from mofo.model import growth, weights
from mofo.model.dit import DiTConfig, ThreeStreamDiT

GOLDEN = Path(__file__).parent / "golden"
BASE = GOLDEN / "t2i_tiny" / "flux2_t2i.safetensors"
GROWN = DiTConfig(
    in_channels=16,
    depth_channels=64,
    context_in_dim=48,
    hidden_size=64,
    num_heads=2,
    depth_double=1,
    depth_single=2,
    depth_decoder_num_layers=1,
    axes_dim=[8, 8, 8, 8],
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A release folder that a test may damage."""
    folder = tmp_path / "release"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((GOLDEN / "tiny_v2" / name).read_bytes())
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, section: str, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[section] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder: Path, name: str, num_shards: int = 3) -> None:
    """Split a file as the large releases are split."""
    tensors = load_file(folder / name)
    where = {key: f"{name}-{i % num_shards}.safetensors" for i, key in enumerate(tensors)}
    for file in set(where.values()):
        save_file({key: tensors[key] for key in where if where[key] == file}, folder / file)
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / name).unlink()


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_read_and_exported_again_is_byte_identical(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    weights.save(weights.load(GOLDEN / "tiny_v2", dtype=dtype), first)
    weights.save(weights.load(first, dtype=dtype), second)
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    written, released = (load_file(f / "model.safetensors") for f in (first, GOLDEN / "tiny_v2"))
    assert written.keys() == released.keys()
    for key, tensor in released.items():
        kind = torch.float32 if key.startswith("dit.depth_final_layer.") else dtype
        assert torch.equal(written[key], tensor.to(kind))


def test_an_export_carries_codec_schedule_and_use(tmp_path: Path) -> None:
    release = weights.load(GOLDEN / "tiny_v2")
    use = {"image_size": [32, 48], "text": "small"}
    codec = replace(release.codec, depth_value_scale=2.0)
    schedule = replace(release.schedule, depth_shift_mu=0.5)
    weights.save(replace(release, use=use, codec=codec, schedule=schedule), tmp_path)
    again = weights.load(tmp_path)
    assert (again.use, again.codec, again.schedule) == (use, codec, schedule)
    assert again.dit.config == release.dit.config
    assert not again.dit.training


def test_only_the_body_takes_the_body_dtype() -> None:
    state = weights.load(GOLDEN / "tiny_v2", dtype=torch.bfloat16).dit.state_dict()
    for name, tensor in state.items():
        head = name.startswith("depth_final_layer.")
        assert tensor.dtype == (torch.float32 if head else torch.bfloat16)


def test_sharded_files_are_the_whole_file(folder: Path) -> None:
    shard(folder, "model.safetensors")
    assert same(weights.load(folder).dit, weights.load(GOLDEN / "tiny_v2").dit)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder, "model.safetensors")
    (folder / "model.safetensors-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors-1\.safetensors does not exist"):
        weights.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("dit.img_in.weight"), "1 missing: dit.img_in.weight"),
        (lambda t: t.update({"dit.more": torch.zeros(1)}), "1 unexpected: dit.more"),
        (
            lambda t: t.update({"dit.img_in.weight": torch.zeros(64, 17)}),
            r"of another shape: dit.img_in.weight is \[64, 17\], expected \[64, 16\]",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_with_its_file(
    folder: Path, change: Callable, message: str
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        weights.load(folder)
    assert str(folder) in str(caught.value)


def test_of_many_missing_tensors_five_are_named(folder: Path) -> None:
    edit_tensors(folder, lambda t: [t.pop(name) for name in sorted(t)[:9]])
    with pytest.raises(ValueError, match="9 missing: ") as caught:
        weights.load(folder)
    assert str(caught.value).count("dit.") == 5


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        weights.load(folder)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("dit", {"depth_single": 3}, "missing: dit.single_blocks.2"),
        ("dit", {"hidden_size": 32, "num_heads": 1}, "of another shape"),
        ("dit", {"hidden": 64}, r"unknown keys \['hidden'\]; accepted: \['in_channels'"),
        ("dit", {"num_heads": 3}, "hidden_size 64 is not a multiple"),
        ("depth", {"patch_size": 16}, "depth_channels is 64, but patches of 16 have 256"),
        ("depth", {"edge": 1}, r"unknown keys \['edge'\]"),
        ("depth", {"depth_normalize_mode": ["log"]}, r"normalises depth by \['log'\]; accepted"),
        ("schedule", {"mu": 1}, r"unknown keys \['mu'\]"),
        ("dit", {"num_heads": 0}, "cannot be used: .*'num_heads': 0"),
        ("dit", {"axes_dim": 4}, "cannot be used: .*'axes_dim': 4"),
    ],
)
def test_a_config_that_contradicts_weights_or_code_is_refused(
    folder: Path, section: str, changes: dict, message: str
) -> None:
    edit_config(folder, section, **changes)
    with pytest.raises(ValueError, match=message):
        weights.load(folder)


def test_an_unknown_variant_lists_the_known(folder: Path) -> None:
    (folder / "config.json").write_text('{"variant": "flux_rgbd_9b_v7"}')
    with pytest.raises(ValueError, match="'flux_rgbd_9b_v7'.*flux_rgbd_9b_v1, flux_rgbd_9b_v2"):
        weights.load(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no release folder"),
        ("{half", "not valid JSON"),
        ("[1, 2]", r"it is \[1, 2\], but must be an object"),
        ('{"dit": null}', "dit is None, but must be an object"),
    ],
)
def test_a_missing_or_broken_config_says_so(folder: Path, text: str | None, words: str) -> None:
    (folder / "config.json").unlink()
    if text:
        (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        weights.load(folder)


def test_a_full_disk_leaves_the_previous_export_and_no_half_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(tensors: dict, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    release = weights.load(folder)
    monkeypatch.setattr(weights, "save_file", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        weights.save(release, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_loading_survives_the_file_being_replaced(folder: Path) -> None:
    dit = weights.load(folder).dit
    edit_tensors(folder, lambda t: [tensor.zero_() for tensor in t.values()])
    assert same(dit, weights.load(GOLDEN / "tiny_v2").dit)


def test_an_outline_says_what_the_release_is_and_holds_nothing() -> None:
    outline, release = weights.outline(GOLDEN / "tiny_v2"), weights.load(GOLDEN / "tiny_v2")
    assert replace(outline, dit=release.dit) == release
    assert outline.dit.config == release.dit.config
    assert all(parameter.is_meta for parameter in outline.dit.parameters())


def test_the_numbers_of_a_file_are_counted_from_its_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    expected = sum(tensor.numel() for tensor in load_file(file).values())
    assert weights.count_elements(file) == expected
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        weights.count_elements(file)


FIRST, SECOND = "a" * 40, "b" * 40  # commits


@pytest.fixture
def hub_cache(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, offline: two commits of one release, the first with a tag."""
    from huggingface_hub import constants

    (folder / "ae_encoder.safetensors").touch()
    (folder / "ae_decoder.safetensors").touch()
    repository = tmp_path / "cache" / "models--org--name"
    for commit, scale in ((FIRST, 1.0), (SECOND, 2.0)):
        edit_config(folder, "depth", depth_value_scale=scale)
        shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(FIRST)
    (repository / "refs" / "main").write_text(SECOND)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, SECOND), ("main", SECOND), ("v1", FIRST), (FIRST, FIRST)]
)
def test_a_hub_id_is_found_offline_at_its_revision(
    hub_cache: Path, revision: str | None, commit: str
) -> None:
    folder = weights.fetch("org/name", revision)
    assert folder == hub_cache / "models--org--name" / "snapshots" / commit
    assert weights.load(folder).codec.depth_value_scale == (1.0 if commit == FIRST else 2.0)


def test_weights_load_by_hub_id(hub_cache: Path) -> None:
    assert same(weights.load("org/name").dit, weights.load(GOLDEN / "tiny_v2").dit)


def test_a_local_folder_wins_over_a_hub_id_and_has_no_revision(hub_cache: Path) -> None:
    Path("org/name").mkdir(parents=True)
    assert weights.fetch("org/name") == Path("org/name")
    assert weights.fetch("small") == weights.SMALL
    for name in ("org/name", "small"):
        with pytest.raises(ValueError, match="revision is 'v1', but .* leave revision out"):
            weights.fetch(name, "v1")


@pytest.mark.parametrize(
    ("name", "revision", "reason"),
    [
        ("org/other", None, r"org/other cannot be had \(.*HF_HUB_OFFLINE is set"),
        ("org/name", "v2", "org/name at revision v2 cannot be had.*HF_HUB_OFFLINE is set"),
        ("./org/name", None, "or a hub id, org/name$"),
        ("../name", None, "or a hub id, org/name$"),
        ("nowhere", None, "or a hub id, org/name$"),
    ],
)
def test_what_cannot_be_had_is_named_with_the_files_to_place(
    hub_cache: Path, name: str, revision: str | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"there is no folder {name}; accepted.*{reason}") as said:
        weights.fetch(name, revision)
    for file in ("config.json", "model", "ae_encoder", "ae_decoder"):
        assert file in str(said.value)
    assert "(--model FOLDER)" in str(said.value)


def test_a_half_downloaded_release_is_refused(hub_cache: Path) -> None:
    for file in (hub_cache / "models--org--name" / "snapshots" / SECOND).glob("ae_*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"lacks ae_\*\.safetensors"):
        weights.fetch("org/name")


def test_only_weights_and_configurations_are_asked_of_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "ae_encoder.safetensors",
        "ae_decoder.safetensors",
    ]
    others = ["modeling.py", "model.py", "pytorch_model.bin", "model.pt", "ae.ckpt", "model.pkl"]
    asked = {}

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked[name] = (
            revision,
            list(filter_repo_objects(wanted + others, allow_patterns=allow_patterns)),
        )
        return str(folder)

    (folder / "ae_basis.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert weights.fetch("org/name", "v1") == folder
    assert asked == {"org/name": ("v1", wanted)}


def velocity_without_depth(dit: ThreeStreamDiT) -> Tensor:
    golden = weights.read_tensors(GOLDEN / "t2i_tiny" / "golden.safetensors")
    with torch.no_grad():
        return dit(golden["ctx"], golden["x"], None, golden["t"], None, grid=(4, 4))[0]


def stage_1_export(folder: Path) -> Path:
    dit = growth.text_to_image(BASE)
    release = weights.load(GOLDEN / "tiny_v2")
    weights.save(replace(release, dit=dit), folder)
    return folder


def diffusers_folder(folder: Path) -> Path:
    network = diffusers_network(has_guidance=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    network.save_pretrained(folder / "transformer", max_shard_size="200KB")
    assert list((folder / "transformer").glob("*.index.json"))
    return folder


@pytest.fixture(params=["file", "export", "diffusers", "diffusers transformer"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    match request.param:
        case "file":
            return BASE
        case "export":
            return stage_1_export(tmp_path / "stage1")
        case "diffusers":
            return diffusers_folder(tmp_path)
    return diffusers_folder(tmp_path) / "transformer"


def test_a_grown_network_without_depth_is_exactly_its_base(base: Path) -> None:
    expected = velocity_without_depth(growth.text_to_image(base))
    assert expected.abs().max() > 0.01
    for grown in (growth.grow(base, GROWN), growth.start(base, GROWN)):
        assert torch.equal(velocity_without_depth(grown), expected)


def test_a_grown_depth_stream_is_a_copy_with_a_silent_head() -> None:
    state = growth.grow(BASE, replace(GROWN, depth_decoder_num_layers=2)).state_dict()
    for depth, image in [
        ("double_blocks.0.depth_attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight"),
        ("double_blocks.0.depth_mlp.2.weight", "double_blocks.0.img_mlp.2.weight"),
        ("double_stream_modulation_depth.lin.weight", "double_stream_modulation_img.lin.weight"),
        ("single_stream_modulation_depth.lin.weight", "single_stream_modulation.lin.weight"),
        ("depth_decoder_modulation.lin.weight", "single_stream_modulation.lin.weight"),
        ("time_in_depth.in_layer.weight", "time_in.in_layer.weight"),
        ("depth_decoder_blocks.0.linear1.weight", "single_blocks.0.linear1.weight"),
        ("depth_decoder_blocks.1.linear1.weight", "single_blocks.1.linear1.weight"),
    ]:
        assert torch.equal(state[depth], state[image])
        assert state[depth].data_ptr() != state[image].data_ptr()
    for name in ("cross_alpha_img", "cross_alpha_depth", "depth_final_layer.linear.weight"):
        assert not state[name].any()
    assert state["depth_in.weight"].std() > 0.01


def test_a_base_of_other_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"flux2_t2i.safetensors.*\n.*missing: single_blocks.2"):
        growth.grow(BASE, replace(GROWN, depth_single=3))


def test_a_base_that_states_other_axes_is_refused(tmp_path: Path) -> None:
    stage_1_export(tmp_path)
    with pytest.raises(ValueError, match=r"axes_dim is \[8, 8, 8, 8\], not \[2, 14, 14, 2\]"):
        growth.grow(tmp_path, replace(GROWN, axes_dim=[2, 14, 14, 2]))


def test_what_a_stage_1_export_states_is_what_its_teacher_is(tmp_path: Path) -> None:
    stage_1_export(tmp_path)
    edit_config(tmp_path, "dit", axes_dim=[2, 14, 14, 2], theta=100)
    config = growth.text_to_image(tmp_path).config
    assert (config.axes_dim, config.theta) == ([2, 14, 14, 2], 100)


def test_a_file_that_is_no_base_is_refused(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match="no FLUX.2 text-to-image base.*img_in.*other"):
        growth.grow(tmp_path / "file.safetensors", GROWN)
    with pytest.raises(ValueError, match="holds none of"):
        growth.grow(tmp_path, GROWN)


def test_training_goes_on_from_a_release_only_with_its_dimensions(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "tiny_v2", tmp_path / "release")
    release = weights.load(GOLDEN / "tiny_v2")
    assert same(growth.start(tmp_path / "release", release.dit.config), release.dit)
    with pytest.raises(ValueError, match="differs from the model config: theta is 2000, not 100"):
        growth.start(tmp_path / "release", replace(release.dit.config, theta=100))


def test_dimensions_of_a_base_are_read_off_its_tensors() -> None:
    expected = asdict(GROWN) | {"depth_channels": 0, "depth_decoder_num_layers": 0}
    assert asdict(growth.base_config(BASE)) == expected | {"cross_stream_timestep_mixing": False}


def test_diffusers_names_become_all_the_names_of_the_file(tmp_path: Path) -> None:
    read = growth.read_base(diffusers_folder(tmp_path))
    shapes = {name: tensor.shape for name, tensor in growth.read_base(BASE).items()}
    assert {name: tensor.shape for name, tensor in read.items()} == shapes
