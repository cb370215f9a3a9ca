"""`mofo demo`: a page on which the three modes are tried, with Gradio.

    launch(Mofo.load("small"), model="small")       # http://127.0.0.1:7860, until Ctrl+C
    with serve(mofo, model="small") as url: ...     # the same, until the block ends

The page needs no network: no fonts, scripts or statistics from elsewhere. One sample is made at a
time, the others wait. All files lie in one temporary folder, nothing outside it is served, and it
is gone when the server ends. What was wrong with an input is said on the page.
"""

import html
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from gradio import routes
from PIL import Image

from mofo.data.inputs import read_depth
from mofo.demo.order import LIMITS, MAX_CFG_SCALE, MAX_SEED, Limits, Order, checked, is_inside
from mofo.picture import depth_picture
from mofo.pipeline import Mofo
from mofo.result import CLOUDS

HERE = Path(__file__).parent
SAMPLES = HERE.parents[1] / "data/samples"  # absent where mofo came from a wheel
EXAMPLES = ("cones", "motorcycle", "bookshelf", "zed_office", "zod_000014")
PROMPTS = (
    "a cozy sunlit kitchen with wooden cabinets",
    "a photo of a wide city road between tall buildings",
    "a photo of a wooden bookshelf full of books",
)
# What the small model knows (mofo.data.scenes).
SMALL_PROMPTS = (
    "a room with a red sofa and a wooden table, blue walls",
    "a room with a green bed and a lamp, wooden floor",
    "a street with two trees and white houses, clear sky",
)
# How firmly a given depth is kept, as log2_alpha (the method's project page shows -5 to -15); 0
# stands for exactly.
HOLDS = [("exactly", 0.0), ("closely", -15.0), ("loosely", -5.0)]
DEPTH_SUFFIXES = [".npy", ".npz", ".exr", ".png", ".tif", ".tiff"]
SHARP = 256  # pictures with shorter sides are enlarged as squares, not blurred
CLEANING = 60  # seconds between two looks for files that are too old
PROGRESS = gr.Progress()
HEADING = """<h1>mofo</h1>
<p>One model of pictures and their depth: give it words, a photo or a depth map, and it makes what
is missing. Model: <code>{model}</code></p>"""
# On a phone the results stand below the form: they are scrolled to.
SHOW_STATUS = """(...values) => {
    const status = document.getElementById("status");
    if (status.getBoundingClientRect().top > innerHeight / 3) status.scrollIntoView();
    return values;
}"""
CLOUD = '<canvas role="img" aria-label="Point cloud; drag to turn it"></canvas>'

Form = tuple[gr.Button, list[Any]]  # what starts it, and its fields in the order of `checked`


def launch(mofo: Mofo, **settings: Any) -> None:
    """`serve` until Ctrl+C or a SIGTERM; neither leaves files behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with serve(mofo, **settings) as url:
        print(f"{url} (Ctrl+C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


@contextmanager
def serve(
    mofo: Mofo,
    *,
    model: str,
    text_encoder: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    limits: Limits = LIMITS,
) -> Iterator[str]:
    """The page's address, where it answers until the block ends; then its files are gone.

    `model` and `text_encoder` are what `mofo` was loaded from, for the command lines on the page.
    `port` None takes the first free one from 7860.
    """
    shared = {"--model": model, "--device": mofo.device.type}
    if text_encoder is not None:
        shared["--text-encoder"] = text_encoder
    with _temporary_root() as root:
        page = build(mofo, root, shared=shared, limits=limits)
        guard = {"root": root, "max_bytes": (limits.megabytes + 1) * 10**6}
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=limits.megabytes * 10**6,
            app_kwargs={"middleware": [(_Guard, (), guard)]},
            theme=gr.themes.Base(
                font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css_paths=HERE / "page.css",
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            _frontend=False,  # skips a look at the page that fails after 3 s on a busy machine
        )
        try:
            yield url
        finally:
            page.close(verbose=False)


def build(mofo: Mofo, root: Path, *, shared: dict[str, str], limits: Limits = LIMITS) -> gr.Blocks:
    """The page. `root` must be Gradio's temporary folder, `shared` is for `Order.command`."""
    cleaning = (CLEANING, limits.keep_seconds)
    with gr.Blocks(title="mofo", analytics_enabled=False, delete_cache=cleaning) as page:
        gr.HTML(HEADING.format(model=html.escape(shared["--model"])), elem_id="heading")
        with gr.Row():
            with gr.Column(scale=2, min_width=300), gr.Tabs():
                with gr.Tab("Text"):
                    joint = _joint_form(limits, shared["--model"], mofo.cfg_scale)
                with gr.Tab("Photo"):
                    i2d = _i2d_form(limits)
                with gr.Tab("Depth"):
                    d2i = _d2i_form(limits, root, mofo.cfg_scale)
            with gr.Column(scale=3, min_width=300):
                outputs = _result_panel()
        for mode, (button, fields) in {"joint": joint, "i2d": i2d, "d2i": d2i}.items():

            def answer(progress=PROGRESS, *values, mode=mode) -> list[Any]:
                try:
                    order = checked(mode, *values, root=root, limits=limits)
                    return _made(order, mofo, root, shared, limits, progress)
                except (ValueError, OSError) as error:
                    return _refused(str(error))

            button.click(
                answer,
                fields,
                outputs,
                preprocess=False,  # Gradio's own fails on a broken picture without saying why
                show_progress_on=outputs[0],
                concurrency_id="network",
                api_name=mode,
                api_visibility="private",
                js=SHOW_STATUS,
            ).then(None, js=SHOW_STATUS)
    return page.queue(max_size=limits.queue, api_open=False, default_concurrency_limit=1)


@contextmanager
def _temporary_root() -> Iterator[Path]:
    """A folder for all that Gradio writes; it is told so by the environment and, since it looked
    there when it was imported, by a name of its own."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="mofo-demo-") as folder:
        root = Path(folder).resolve()
        os.environ["GRADIO_TEMP_DIR"] = routes.DEFAULT_TEMP_DIR = str(root)
        try:
            yield root
        finally:
            del os.environ["GRADIO_TEMP_DIR"]
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


class _Guard:
    """Refuses, before Gradio sees them, requests for files outside `root` and bodies too large.

    Gradio alone would also serve a cache in the working directory, and fetch from other servers.
    """

    def __init__(self, app: Any, *, root: Path, max_bytes: int) -> None:
        self.app, self.root, self.max_bytes = app, root, max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        asked = re.search("/(?:file[=/]|proxy=)(.*)", scope.get("path", ""), re.DOTALL)
        length = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if asked and not is_inside(asked[1], self.root):
            status = 403
        elif not length.isdigit() or int(length) > self.max_bytes:
            status = 413
        else:
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def _made(
    order: Order, mofo: Mofo, root: Path, shared: dict[str, str], limits: Limits, progress: Any
) -> list[Any]:
    """Make it, save it, and show it: values for the components of `_result_panel`."""
    started = time.perf_counter()

    def on_step(done: int, total: int) -> None:
        progress(done / total, desc=f"step {done} of {total}")

    result = order.make(mofo, limits, on_step)
    command = order.command(shared)
    made_by = {
        "input": order.name or order.prompt,
        "command": command,
        "model": shared["--model"],
    }
    # In Gradio's folder it is served where it lies, and removed when it is too old.
    folder = Path(tempfile.mkdtemp(prefix="result-", dir=root))
    replace(result, metadata=result.metadata | made_by).save(folder)
    height, width = result.depth.shape
    said = f"{width} x {height} in {time.perf_counter() - started:.1f} s, seed {order.seed}"
    if not (has_cloud := (cloud := folder / CLOUDS[0]).exists()):
        reason = json.loads((folder / "metadata.json").read_text())["cloud"]["reason"]
        said = f"{said}. There is no point cloud: {reason}"
    look = ["sharp"] if max(height, width) < SHARP else []
    return [
        f"<p>{html.escape(said)}</p>",
        gr.update(visible=True),
        gr.update(value=folder / "rgb.png", elem_classes=look),
        gr.update(value=folder / "depth_magma.png", elem_classes=look),
        gr.update(value=f"gradio_api/file={quote(str(cloud))}", visible=has_cloud),
        command,
        sorted(map(str, folder.iterdir())),
    ]


def _refused(reason: str) -> list[Any]:
    said = f'<p class="refusal" role="alert">Not made: {html.escape(reason)}.</p>'
    return [said, gr.update(visible=False), *[gr.skip()] * 5]


def _result_panel() -> list[Any]:
    """Status line, the panel, and in it picture, depth, cloud, command line and files."""
    status = gr.HTML("<p>What you make appears here.</p>", elem_id="status", min_height=56)
    with gr.Column(visible=False, elem_id="panel") as panel:
        with gr.Row():
            shown: dict[str, Any] = {"buttons": ["fullscreen"], "min_width": 140}
            picture = gr.Image(label="Picture", interactive=False, elem_id="picture", **shown)
            depth = gr.Image(label="Depth", interactive=False, elem_id="depth", **shown)
        cloud = gr.HTML(
            html_template=CLOUD, js_on_load=(HERE / "cloud.js").read_text(), elem_id="cloud"
        )
        command = gr.Textbox(
            label="The same again, on a command line", lines=2, buttons=["copy"], elem_id="command"
        )
        files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="files")
    return [status, panel, picture, depth, cloud, command, files]


def _joint_form(limits: Limits, model: str, cfg_scale: float) -> Form:
    prompt = _prompt("What the picture shall show", limits)
    button = gr.Button("Make picture and depth", variant="primary")
    prompts = SMALL_PROMPTS if model == "small" else PROMPTS
    gr.Examples([[one] for one in prompts], prompt)
    with gr.Accordion("Settings", open=False):
        sampling = _sampling(cfg_scale, limits)
        tilt = gr.Slider(0, 10, 5, step=0.5, label="Picture before depth (0: together)")
    return button, [gr.State(), prompt, *sampling, tilt]


def _i2d_form(limits: Limits) -> Form:
    photo = gr.Image(
        label="Photo", sources=["upload", "clipboard"], type="filepath", height=260, elem_id="photo"
    )
    prompt = _prompt("What it shows (may stay empty)", limits)
    button = gr.Button("Make depth", variant="primary")
    if examples := [[str(path), caption] for path, _, caption in _samples()]:
        gr.Examples(examples, [photo, prompt], visible_columns=[0])
    with gr.Accordion("Settings", open=False):
        sampling = _sampling(1.0, limits)
    return button, [photo, prompt, *sampling, gr.State()]


def _d2i_form(limits: Limits, root: Path, cfg_scale: float) -> Form:
    label = "Depth: .npy, .npz, .exr, 16-bit PNG or TIFF"
    depth = gr.File(label=label, file_types=DEPTH_SUFFIXES, height=140, elem_id="map")
    prompt = _prompt("What the picture shall show", limits)
    button = gr.Button("Make picture", variant="primary")
    drawn = gr.Image(visible=False)  # depth files have no thumbnails: the examples bring theirs
    examples = []
    for _, path, caption in _samples():
        if path is not None:
            Image.fromarray(depth_picture(*read_depth(path))).save(root / path.name)
            examples.append([str(root / path.name), str(path), caption])
    if examples:
        gr.Examples(examples, [drawn, depth, prompt], visible_columns=[0])
    with gr.Accordion("Settings", open=False):
        sampling = _sampling(cfg_scale, limits)
        hold = gr.Radio(HOLDS, value=0.0, label="Keep the given depth")
    return button, [depth, prompt, *sampling, hold]


def _prompt(label: str, limits: Limits) -> gr.Textbox:
    return gr.Textbox(label=label, lines=2, max_length=limits.prompt)


def _sampling(cfg_scale: float, limits: Limits) -> list[Any]:
    return [
        gr.Slider(1, limits.steps, 50, step=1, label="Steps"),
        gr.Slider(0, MAX_CFG_SCALE, cfg_scale, step=0.5, label="Weight of the prompt"),
        gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED),
    ]


def _samples() -> list[tuple[Path, Path | None, str]]:
    """Photograph, depth where it is dense, and caption; none without the repository."""
    if not (captions := SAMPLES / "captions.json").is_file():
        return []
    said, found = json.loads(captions.read_text()), []
    for name in EXAMPLES:
        about = json.loads((SAMPLES / f"{name}.json").read_text())
        depth = SAMPLES / about["depth"] if about["density"] == "dense" else None
        found.append((SAMPLES / about["image"], depth, said[name]))
    return found
