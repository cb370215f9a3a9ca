"""The page's server without a browser: what it makes, refuses, serves and leaves behind."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import save_release

from mofo.cli import main
from mofo.demo.order import Limits, checked
from mofo.pipeline import Mofo

httpx = pytest.importorskip("httpx")  # comes with Gradio
page = pytest.importorskip("mofo.demo.page", reason="the page needs Gradio: pip install mofo[demo]")

ROOT = Path(__file__).parents[1]
LIMITS = Limits(megabytes=1, pixels=1000, prompt=60, steps=3, queue=2)
FIELDS = {"num_steps": 2, "cfg_scale": 2.5, "seed": 7, "log2_alpha": None}


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return save_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def mofo(release: Path) -> Mofo:
    return Mofo.load(release, device="cpu")


@pytest.fixture(scope="module")
def url(mofo: Mofo, release: Path) -> Iterator[str]:
    with page.serve(mofo, model=str(release), limits=LIMITS) as url:
        yield url


def ordered(root: Path, mode: str = "joint", **changes):
    fields = {"upload": None, "prompt": "a road", **FIELDS}
    fields |= {"log2_alpha": 5.0} if mode == "joint" else {}
    return checked(mode, **fields | changes, root=root, limits=LIMITS)


def uploaded(root: Path, name: str, **changes) -> dict[str, str]:
    """What a browser says of a file that Gradio stored under a name of its own choice."""
    path = root / f"stored{Path(name).suffix}"
    if name.endswith(".npy"):
        np.save(path, np.linspace(1, 2, 600).reshape(20, 30))
    else:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return {"path": str(path), "orig_name": name} | changes


@pytest.mark.parametrize(
    ("mode", "name", "changes"),
    [
        ("joint", "", {"prompt": '-- it\'s a "road"\n & $HOME', "log2_alpha": 0.0}),
        ("i2d", "-my'photo'.png", {"prompt": ""}),
        ("d2i", "depth.npy", {"prompt": "-road", "log2_alpha": -5.0}),
        ("d2i", "depth.npy", {"log2_alpha": 0.0}),
    ],
)
def test_the_command_line_makes_the_same_files(
    mofo: Mofo, release: Path, tmp_path: Path, monkeypatch, mode: str, name: str, changes: dict
) -> None:
    given = uploaded(tmp_path, name) if name else None
    order = ordered(tmp_path, mode, upload=given, **changes)
    steps = []
    order.make(mofo, LIMITS, lambda *at: steps.append(at)).save(tmp_path / "page")
    assert steps == [(1, 2), (2, 2)]

    monkeypatch.chdir(tmp_path)
    if given:
        Path(given["path"]).rename(name)
    line = order.command({"--model": str(release), "--device": "cpu"})
    assert "\n" not in line
    assert main(shlex.split(line)[1:]) == 0
    [out] = (tmp_path / "outputs").iterdir()
    for file in ("rgb.png", "depth_raw.npy", "cloud.glb"):
        one, other = (folder / file for folder in (tmp_path / "page", out))
        assert one.exists() == other.exists()
        assert not one.exists() or one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("mode", "changes", "reason"),
    [
        ("joint", {"prompt": " \n"}, "no prompt"),
        ("joint", {"prompt": None}, "no prompt"),
        ("joint", {"prompt": "a" * 61}, "61 characters, but at most 60"),
        ("joint", {"num_steps": 4}, "number of steps is 4; accepted: 1 to 3"),
        ("joint", {"num_steps": "2; rm"}, "number of steps is 2; rm"),
        ("joint", {"seed": None}, "seed is empty"),
        ("joint", {"seed": -1}, "seed is -1"),
        ("joint", {"cfg_scale": float("nan")}, "weight of the prompt is nan"),
        ("joint", {"log2_alpha": None}, "log2 alpha is empty"),
        ("i2d", {}, "no photo; choose a file"),
        ("d2i", {"upload": "/etc/passwd"}, "no depth map; choose a file"),
        ("d2i", {"upload": {"path": "/etc/passwd"}}, "not here any more"),
        ("i2d", {"upload": {"path": "\0"}}, "not here any more"),
    ],
)
def test_what_a_browser_may_not_send_is_refused(
    tmp_path: Path, mode: str, changes: dict, reason: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        ordered(tmp_path, mode, **changes)


def test_an_upload_outside_the_folder_is_refused_however_it_is_written(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    outside = uploaded(tmp_path, "photo.png")
    (inside / "link.png").symlink_to(outside["path"])
    for path in (outside["path"], f"{inside}/../stored.png", f"{inside}/link.png"):
        with pytest.raises(ValueError, match="not here any more"):
            ordered(inside, "i2d", upload={"path": path})


@pytest.mark.parametrize(
    ("mode", "pixels", "reason"),
    [
        ("d2i", np.zeros((9, 9), np.uint8), "mine.png cannot be read as depth .*8-bit"),
        ("i2d", np.zeros((40, 30, 3), np.uint8), "30 x 40 pixels, but at most 0.001 million"),
        ("d2i", np.ones((40, 30), np.uint16), "30 x 40 pixels"),
        ("i2d", None, "mine.png cannot be read as a picture"),
    ],
)
def test_a_bad_file_is_refused_by_the_visitors_name_for_it(
    mofo: Mofo, tmp_path: Path, mode: str, pixels: np.ndarray | None, reason: str
) -> None:
    path = tmp_path / "stored.png"
    if pixels is None:
        path.write_bytes(b"nothing")
    else:
        Image.fromarray(pixels).save(path)
    order = ordered(tmp_path, mode, upload={"path": str(path), "orig_name": "../mine.png"})
    with pytest.raises(ValueError, match=reason) as said:
        order.make(mofo, LIMITS, print)
    assert str(tmp_path) not in str(said.value)


def test_a_page_without_the_repository_has_no_photographs(
    mofo: Mofo, tmp_path: Path, monkeypatch
) -> None:
    def examples() -> int:
        built = page.build(mofo, tmp_path, shared={"--model": "small"})
        return sum(block["type"] == "dataset" for block in built.get_config_file()["components"])

    assert examples() == 3
    monkeypatch.setattr(page, "SAMPLES", tmp_path / "absent")
    assert examples() == 1


def test_only_this_machine_reaches_the_page_and_nothing_comes_from_elsewhere(url: str) -> None:
    assert url.startswith("http://127.0.0.1:")
    config = httpx.get(f"{url}config").json()
    assert not config["stylesheets"]
    assert not config["analytics_enabled"]
    assert "@import" not in httpx.get(f"{url}theme.css").text


@pytest.mark.parametrize("asked", ["file=", "file/", "proxy="])
@pytest.mark.parametrize(
    "what",
    [
        "/etc/passwd",
        str(ROOT / "README.md"),
        "README.md",
        "mofo/small/config.json",
        "{root}/../../etc/passwd",
        "http://127.0.0.1:1/",
        "https://example.org/",
    ],
)
def test_files_of_others_are_refused(url: str, asked: str, what: str) -> None:
    what = what.format(root=os.environ["GRADIO_TEMP_DIR"])
    escaped = what.replace("/..", "/%2e%2e")
    assert httpx.get(f"{url}gradio_api/{asked}{escaped}").status_code == 403


def test_a_folder_that_gradio_would_serve_is_refused(url: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GRADIO_EXAMPLES_CACHE", str(tmp_path))  # else one in the working directory
    (tmp_path / "private.txt").write_text("private")
    assert httpx.get(f"{url}gradio_api/file={tmp_path}/private.txt").status_code == 403


def test_an_upload_stays_in_the_folder_whatever_its_name(url: str) -> None:
    root = Path(os.environ["GRADIO_TEMP_DIR"])
    for name in ("../../escaped.png", "/etc/escaped.png", "..\\escaped.png"):
        [stored] = httpx.post(f"{url}gradio_api/upload", files={"files": (name, b"x")}).json()
        assert Path(stored).resolve().is_relative_to(root)
        assert httpx.get(f"{url}gradio_api/file={stored}").content == b"x"


@pytest.mark.parametrize("size", [1_100_000, 3_000_000])
def test_an_upload_that_is_too_large_is_refused(url: str, size: int) -> None:
    said = httpx.post(f"{url}gradio_api/upload", files={"files": ("a.png", bytes(size))})
    assert said.status_code == 413


def joined(url: str, session: str, prompt: str = "a road"):
    [form] = [
        one
        for one in httpx.get(f"{url}config").json()["dependencies"]
        if one["api_name"] == "joint"
    ]
    fields = {"data": [None, prompt, 2, 1, 0, 5], "fn_index": form["id"], "session_hash": session}
    return httpx.post(f"{url}gradio_api/queue/join", json=fields)


def answers(url: str, session: str) -> list:
    """The values that the components of the result panel get."""
    with httpx.stream("GET", f"{url}gradio_api/queue/data?session_hash={session}") as stream:
        for line in stream.iter_lines():
            said = json.loads(line.removeprefix("data: ")) if line else {}
            if said.get("msg") == "process_completed":
                return said["output"]["data"]
    raise AssertionError("the stream ended without a result")


def test_a_result_lists_its_files_and_serves_them(url: str, release: Path) -> None:
    assert joined(url, "one").status_code == 200
    status, _, picture, _, _, command, files = answers(url, "one")
    assert "24 x 16" in status
    assert command.startswith("mofo joint --prompt 'a road' --model")
    assert {"rgb.png", "depth_raw.npy", "depth_magma.png", "metadata.json"} <= {
        Path(one["path"]).name for one in files
    }
    metadata = next(one["path"] for one in files if one["path"].endswith("metadata.json"))
    about = httpx.get(f"{url}gradio_api/file={metadata}").json()
    assert (about["command"], about["model"]) == (command, str(release))
    assert httpx.get(picture["value"]["url"]).content.startswith(b"\x89PNG")


def test_what_was_wrong_is_shown_as_text(url: str) -> None:
    assert joined(url, "two", prompt="<b>" * 30).status_code == 200
    status, panel, *_ = answers(url, "two")
    assert "Not made: the prompt has 90 characters" in status
    assert panel["visible"] is False
    assert page._refused("<b>")[0].count("<") == 2


def test_one_sample_is_made_at_a_time_and_a_full_queue_says_so(mofo: Mofo, monkeypatch) -> None:
    free, running = threading.Event(), []

    def joint(*_, **settings):
        running.append(settings["seeds"])
        free.wait(60)
        raise ValueError("nothing was made")

    monkeypatch.setattr(mofo, "joint", joint)
    with page.serve(mofo, model="small", limits=LIMITS) as url:
        first = joined(url, "first").status_code
        while not running:
            threading.Event().wait(0.05)
        others = [joined(url, str(k)).status_code for k in range(LIMITS.queue + 1)]
        assert len(running) == 1
        free.set()
        assert "nothing was made" in answers(url, "first")[0]
    assert [first, *others] == [200] * (1 + LIMITS.queue) + [503]


def test_old_files_are_removed_while_the_page_is_up(mofo: Mofo, monkeypatch) -> None:
    monkeypatch.setattr(page, "CLEANING", 1)
    with page.serve(mofo, model="small", limits=Limits(keep_seconds=1)) as url:
        root = Path(os.environ["GRADIO_TEMP_DIR"])
        [uploaded] = httpx.post(
            f"{url}gradio_api/upload", files={"files": ("mine.png", b"x")}
        ).json()
        assert Path(uploaded).is_relative_to(root)
        joined(url, "one")
        answers(url, "one")
        for _ in range(300):  # a busy machine cleans late
            left = [p for name in ("mine.png", "rgb.png", "cloud.*") for p in root.rglob(name)]
            if not left:
                break
            threading.Event().wait(0.2)
        assert not left
    assert not root.exists()


def test_a_terminated_page_leaves_no_files(tmp_path: Path) -> None:
    code = """
from types import SimpleNamespace
from mofo.demo.page import launch
launch(SimpleNamespace(device=SimpleNamespace(type="cpu"), cfg_scale=4.0), model="small")
"""
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("GRADIO_TEMP_DIR", None)
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        assert "http://127.0.0.1:" in running.stdout.readline()
        assert list(tmp_path.glob("mofo-demo-*"))
        running.send_signal(signal.SIGTERM)
        assert running.wait() == 0
    assert not list(tmp_path.iterdir())
