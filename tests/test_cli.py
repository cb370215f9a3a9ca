"""The `mofo` command: fast help, every mode from the shell to files, one line for every mistake."""

import errno
import json
import resource
import shlex
import subprocess
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from made_lines import lines_of, write_run
from PIL import Image
from tiny import save_release

from mofo import calls, memory, options
from mofo.cli import ACTIONS, _names, find, main
from mofo.data import fit
from mofo.data.make import load
from mofo.model import weights

ROOT = Path(__file__).parents[1]
FEW = ["--num-steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    inside = tmp_path / "in"
    inside.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(inside / "a.png")
    Image.fromarray(pixels[:, :10]).convert("CMYK").save(inside / "b.jpg")
    np.save(inside / "slope.npy", np.linspace(2, 2.3, 600).reshape(20, 30))
    return inside


def only(parent: Path) -> Path:
    """The one run's folder in an output folder."""
    [folder] = parent.iterdir()
    return folder


def refused(capsys, argv: list[str]) -> str:
    """What a refused command line prints, which must not be a traceback."""
    assert main([str(one) for one in argv]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    *before, line = said.err.splitlines()
    assert all(one.startswith(("needs: ", "has: ", "model: ")) for one in before)
    assert line.startswith("mofo ")
    return line


def test_help_answers_in_half_a_second_and_teaches() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    made = subprocess.run(
        [sys.executable, "-m", "mofo.cli", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: a busy machine must not fail a fast program.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    for words in (
        "mofo joint --prompt",
        "mofo i2d --image",
        "mofo d2i --depth",
        "export",
        "0 = no",
    ):
        assert words in made.stdout


def test_joint_runs_from_the_shell(folder: Path, tmp_path: Path) -> None:
    argv = ["-m", "mofo.cli", "joint", "--model", folder, "--prompt", "a kitchen", *FEW]
    made = subprocess.run(
        [sys.executable, *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert made.returncode == 0, made.stderr
    out = only(tmp_path / "outputs")
    assert out.name.endswith("-joint")
    assert f"a kitchen -> {out.relative_to(tmp_path)}" in made.stdout
    assert {"rgb.png", "depth_raw.npy", "depth_magma.png", "metadata.json"} <= {
        path.name for path in out.iterdir()
    }
    metadata = json.loads((out / "metadata.json").read_text())
    assert metadata["input"] == "a kitchen"
    assert metadata["command"] == shlex.join(["mofo", *map(str, argv[2:])])


def test_i2d_takes_files_folders_and_patterns_and_skips_what_is_broken(
    folder: Path, inputs: Path, tmp_path: Path, capsys
) -> None:
    (inputs / "broken.png").write_bytes(b"nothing")
    out = tmp_path / "out"
    sources = [str(inputs), str(inputs / "*.jpg"), str(inputs / "a.png")]
    argv = ["i2d", "--model", str(folder), "--output-dir", str(out), "--image", *sources, *FEW]
    assert main(argv) == 2
    said = capsys.readouterr()
    assert "broken.png cannot be read as a picture" in said.err
    folder = only(out)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert np.load(folder / "a" / "depth_raw.npy").shape == (20, 30)
    assert np.load(folder / "b" / "depth_raw.npy").shape == (20, 10)
    assert said.out.count("depth ") == 2
    assert "2 of 3 made" in said.out


def test_d2i_and_several_samples(folder: Path, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main([
        "d2i", "--model", str(folder), "--depth", str(inputs / "slope.npy"), "--prompt", "a wall",
        "--num-samples", "2", "--seed", "4", "--log2-alpha", "-8", "--sor", "--fov-deg", "50",
        "--output-dir", str(out), *FEW,
    ])  # fmt: skip
    folder = only(out)
    assert sorted(path.name for path in folder.iterdir()) == ["slope-seed4", "slope-seed5"]
    written = json.loads((folder / "slope-seed5" / "metadata.json").read_text())
    assert {"mode": "d2i", "seed": 5, "log2_alpha": -8.0, "prompt": "a wall"}.items() <= (
        written.items()
    )
    assert written["cloud"]["fov_deg"] == 50.0
    assert written["cloud"]["drop_outliers"] is True
    assert written["cloud"]["num_points"] > 0
    assert (folder / "slope-seed5" / "cloud.glb").exists()


@pytest.mark.parametrize(("given", "size"), [("8", (8, 8)), ("24x16", (16, 24))])
def test_resolution_is_the_networks_size(
    folder: Path, tmp_path: Path, capsys, given: str, size: tuple[int, int]
) -> None:
    argv = ["joint", "--model", folder, "--prompt", "a", *FEW, "--output-dir", tmp_path / "out"]
    assert main([str(one) for one in [*argv, "--resolution", given]]) == 0
    assert np.load(only(tmp_path / "out") / "depth_raw.npy").shape == size
    assert f"estimated for {size[0]}x{size[1]}," in capsys.readouterr().err
    said = refused(capsys, [*argv[:-1], tmp_path / "none", "--resolution", "20"])
    assert "image is 20x20, but both sides must be multiples of 8" in said
    assert not (tmp_path / "none").exists()


def test_mistakes_are_one_line_and_write_nothing(
    folder: Path, inputs: Path, tmp_path: Path, capsys
) -> None:
    out = ["--output-dir", tmp_path / "out", "--model", folder, *FEW]
    for argv, words in (
        (["joint", "--prompt", "a", *out[:2], "--model", tmp_path], "is no release folder"),
        (
            ["joint", "--prompt", "a", *out[:2], "--model", "no/where"],
            "there is no folder no/where",
        ),
        (["joint", "--prompt", "a", *out, "--device", "gpu"], "device is 'gpu'"),
        (["joint", "--prompt", "a", *out, "--text-encoder", "no/where"], "no/where"),
        (["i2d", "--image", inputs / "none*", *out], "matches no file"),
        (["d2i", "--depth", tmp_path, "--prompt", "", *out], "holds no .npy"),
        (["d2i", "--depth", inputs / "a.png", "--prompt", "", *out], "colours"),
    ):
        assert words in refused(capsys, argv)
    assert not (tmp_path / "out").exists()


def test_an_option_typed_again_adds_to_its_inputs(
    folder: Path, inputs: Path, tmp_path: Path
) -> None:
    each = [part for name in ("a.png", "b.jpg") for part in ("--image", inputs / name)]
    out = ["--output-dir", tmp_path / "out", "--model", folder, *FEW]
    assert main([str(one) for one in ["i2d", *each, *out]]) == 0
    assert {path.name for path in only(tmp_path / "out").iterdir()} == {"a", "b"}


def test_weights_that_are_no_numbers_are_refused_at_the_first_sample(
    tmp_path: Path, capsys
) -> None:
    folder = save_release(tmp_path / "release")
    tensors = weights.read_tensors(folder / "model.safetensors")
    tensors["dit.img_in.weight"] = tensors["dit.img_in.weight"] * float("nan")
    weights.write_tensors(tensors, folder / "model.safetensors")
    argv = ["joint", "--prompt", "a", "--model", folder, "--output-dir", tmp_path / "out", *FEW]
    assert "gave numbers that are not finite; its weights are damaged" in refused(capsys, argv)


def test_a_full_disk_is_named_whatever_is_written(
    folder: Path, inputs: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "depth_raw.npy")

    monkeypatch.setattr(Path, "write_bytes", full)
    argv = ["i2d", "--image", inputs / "a.png", "--model", folder, *FEW]
    argv += ["--output-dir", tmp_path / "out"]
    assert "No space left on device: 'depth_raw.npy'; free some space" in refused(capsys, argv)
    assert not list(only(tmp_path / "out").iterdir())


def test_damaged_weights_are_named(tmp_path: Path, capsys) -> None:
    folder = save_release(tmp_path / "release")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    argv = ["joint", "--prompt", "a", "--model", folder, "--output-dir", tmp_path / "out", *FEW]
    assert "model.safetensors is not a complete safetensors file" in refused(capsys, argv)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["paint"],
        ["joint"],
        ["joint", "--prompt", "a", "--refine"],
        ["joint", "--prompt", "a", "--num-samples", "0"],
        ["joint", "--prompt", "a", "--resolution", "8x"],
        ["joint", "--prompt", "a", "--resolution", "0"],
        ["joint", "--prompt", "a", "--seed", "-1"],
        ["joint", "--prompt", "a", "--cfg-scale", "nan"],
        ["joint", "--prompt", "a", "--num-steps", "1.5"],
        ["joint", "--prompt", "a", "--edge-rtol", "-1"],
        ["i2d", "--image", "a.png", "--fit", "crop"],
        ["i2d", "--image", "a.png", "--fov-deg", "180"],
        ["convert", "unknown", "--out", "x"],
    ],
)
def test_unknown_words_and_values_exit_with_2(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: mofo" in capsys.readouterr().err


def test_folder_names_differ_and_stay_inside() -> None:
    sources = [Path("x/a.png"), Path("y/a.jpg"), Path("...png"), "../a b!", "../A b", ""]
    assert _names(sources) == ["a", "a-2", "input", "a-b", "a-b-2", "no-prompt"]
    assert len(_names(["word " * 100])[0]) < 50


def test_find_keeps_the_order_and_drops_repeats(inputs: Path) -> None:
    assert find([str(inputs / "b.jpg"), str(inputs)], (".png", ".jpg")) == [
        inputs / "b.jpg",
        inputs / "a.png",
    ]


def test_convert_makes_a_set_once(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    keys = tmp_path / "keys.txt"
    keys.write_text("bookshelf\n")
    argv = ["convert", "samples", "--keys", str(keys), "--out", str(tmp_path / "set")]
    assert main(argv) == 0
    assert (tmp_path / "set" / "manifest.json").exists()
    assert "set: 1 samples in 1 shards, " in capsys.readouterr().out
    assert main(argv) == 0
    assert "finished already" in capsys.readouterr().out
    scenes = ["convert", "generated", "--count", "2", "--split", "none", "--out", tmp_path / "no"]
    assert "split is 'none'" in refused(capsys, scenes)
    empty = ["convert", "kitti", "--source", tmp_path / "set", "--out", tmp_path / "no"]
    assert "expected" in refused(capsys, empty)
    lost = ["convert", "images", "--source", tmp_path / "lost", "--out", tmp_path / "no"]
    assert f"there is no folder {tmp_path / 'lost'}; relative paths" in refused(capsys, lost)
    lost = [*lost[:3], "data/samples", *lost[4:], "--captions", "lost.csv"]
    said = refused(capsys, lost)
    assert "there is no file lost.csv; relative paths are looked for in the current" in said
    assert said.endswith(str(ROOT))
    assert not (tmp_path / "no").exists()


def test_a_full_disk_says_that_the_same_command_goes_on(capsys, monkeypatch, tmp_path) -> None:
    def full(*args: object, **options: object) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mofo.data.make.make", full)
    scenes = ["convert", "generated", "--count", "2", "--split", "test"]
    said = refused(capsys, [*scenes, "--out", tmp_path])
    assert "free some space; the same command goes on from here" in said


def test_a_converter_is_called_with_its_options_of_their_types(monkeypatch, tmp_path) -> None:
    called: dict = {}
    monkeypatch.setattr("mofo.data.make.make", lambda *args, **kw: called.update(kw) or True)
    monkeypatch.setattr("mofo.data.make.summary", str)
    here = str(tmp_path)
    argv = ["convert", "colmap", "--source", here, "--out", here, "--max-error", "1"]
    assert main([*argv, "--metric", "--processes", "3"]) == 0
    assert called["source"] == here
    assert (type(called["max_error"]), called["max_error"]) == (float, 1.0)
    assert called["metric"] is True
    assert called["min_track"] == 3
    assert (called["converter"], called["processes"]) == ("colmap", 3)
    scenes = ["generated", "--split", "test", "--count", "2", "--size", "32", "48"]
    main(["convert", *scenes, "--out", here])
    assert called["size"] == [32, 48]


@pytest.mark.parametrize("name", options.CONVERTERS)
def test_every_converter_says_what_it_reads(name: str) -> None:
    module = load(name)
    parser = options.convert_parser(name, module)
    shown = parser.format_help()
    assert f"\n    mofo convert {name} " in shown
    assert getattr(module, "TREE", "") in shown
    assert set(getattr(module, "OPTIONS", {})) <= set(signature(module.find).parameters)
    for action in parser._actions:
        assert not (action.help or "").startswith(("(", " ")), action
        assert action.help, action
    known = {option for action in parser._actions for option in action.option_strings}
    for parameter in signature(module.find).parameters:
        assert f"--{parameter.replace('_', '-')}" in known
    assert {"--out", "--processes", "--max-bad-fraction", "--samples-per-shard"} <= known


def test_the_list_of_converters_says_what_each_is(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in options.CONVERTERS:
        about = (load(name).__doc__ or "").splitlines()[0]
        assert f"  {name:<12} {about}" in lines


def test_the_choices_are_those_of_the_package() -> None:
    assert options.FITS == fit.FITS
    assert options.PLANS == memory.PLANS
    assert options.NUM_SEEDS == calls.NUM_SEEDS


@pytest.mark.parametrize("plan", memory.PLANS)
def test_every_plan_makes_the_same_and_says_what_it_needs(
    folder: Path, inputs: Path, tmp_path: Path, capsys, plan: str
) -> None:
    argv = ["i2d", "--model", folder, "--image", inputs / "a.png", "--prompt", "a", *FEW]
    assert main([str(one) for one in [*argv, "--output-dir", tmp_path / "first"]]) == 0
    assert main([str(one) for one in [*argv, "--output-dir", tmp_path / plan, "--plan", plan]]) == 0
    said = capsys.readouterr().err
    assert "needs: network" in said
    assert f'plan "{plan}" takes' in said
    first, second = (np.load(only(tmp_path / x) / "depth_raw.npy") for x in ("first", plan))
    assert (first == second).all()
    assert json.loads((only(tmp_path / plan) / "metadata.json").read_text())["plan"] == plan


def test_report_of_one_run_or_of_several(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = write_run(tmp_path / "first", lines_of(num=5))
    second = write_run(tmp_path / "second", lines_of(num=5, seed=1))
    assert main(["report", str(first), "--title", "Mine"]) == 0
    assert "<h1>Mine</h1>" in (first / "report.html").read_text()
    assert "AbsRel" in capsys.readouterr().out
    assert main(["report", str(first), str(second)]) == 0
    folder = only(tmp_path / "outputs")
    assert folder.name.endswith("-report")
    said = capsys.readouterr().out
    assert str(folder.relative_to(tmp_path) / "report.html") in said
    assert "mofo (first) − mofo (second)" in said
    assert main(["report", str(first), str(second), "--out", str(tmp_path / "both")]) == 0
    names = {f"report.{suffix}" for suffix in ("html", "md", "tex", "csv", "json")}
    assert names == {path.name for path in (tmp_path / "both").iterdir()}
    (tmp_path / "empty").mkdir()
    assert "has no lines to report on" in refused(capsys, ["report", tmp_path / "empty"])
    assert "is no folder" in refused(capsys, ["report", tmp_path / "nothing"])


def test_every_option_has_a_help_text() -> None:
    modes = options.parser(ACTIONS)._subparsers._group_actions[0].choices
    for mode in modes.values():
        for action in mode._actions:
            assert action.help, action
            assert len(mode.format_help()) > 100


def test_joint_works_offline_with_the_shipped_model(tmp_path: Path) -> None:
    """Needs the weights in mofo/small."""
    out = tmp_path / "out"
    argv = ["joint", "--prompt", "a street with a red car", "--output-dir", str(out), *FEW]
    assert main(argv) == 0
    assert Image.open(only(out) / "rgb.png").size == (64, 64)


@pytest.mark.parametrize(("mode", "said"), [("inspect", "stopped\n"), ("convert", "goes on from")])
def test_ctrl_c_ends_with_one_line(
    mode: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mofo.data.make.load", interrupt)
    monkeypatch.setattr("mofo.data.inspect.inspect", interrupt)
    rest = ["colmap", "--source", "x", "--out", "y"] if mode == "convert" else ["shards"]
    assert main([mode, *rest]) == 130
    assert said in capsys.readouterr().err
