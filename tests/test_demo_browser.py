"""The page in a real Chromium: type, choose, make, look, download. Not run where there is none."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mofo.pipeline import Mofo

page = pytest.importorskip("mofo.demo.page", reason="the page needs Gradio: pip install mofo[demo]")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
trimesh = pytest.importorskip("trimesh")

PATIENCE = 120_000  # milliseconds: of a machine that is busy with other things
DRAWN = """() => {
    const canvas = document.querySelector("#cloud canvas");
    const pixels = new Uint32Array(
        canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
    return new Set(pixels).size;
}"""
NATURAL_WIDTHS = "images => images.map(image => image.complete ? image.naturalWidth : 0)"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with page.serve(Mofo.load("small", device="cpu"), model="small") as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    if not (path := shutil.which("chromium") or shutil.which("chromium-browser")):
        pytest.skip("no Chromium is installed here")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: "playwright.Browser", url: str) -> Iterator["playwright.Page"]:
    """The page, opened; at the end it must not have complained or asked another machine."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    tab, asked, complaints = context.new_page(), [], []
    tab.set_default_timeout(PATIENCE)
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda said: said.type == "error" and complaints.append(said.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(url)
    yield tab
    context.close()
    assert not complaints
    assert asked
    assert not [one for one in asked if not one.startswith((url, "data:", "blob:"))]


def choose(tab: "playwright.Page", mode: str, field: str, file: Path) -> None:
    tab.get_by_role("tab", name=mode).click()
    for _ in range(5):  # a choice made before the page listens is lost; people choose again
        try:
            with tab.expect_request("**/upload*", timeout=PATIENCE / 5):
                tab.locator(f"{field} input[type=file]").set_input_files(file)
            return
        except playwright.TimeoutError:
            continue
    pytest.fail(f"the page did not take {file.name}")


def make(tab: "playwright.Page", button: str, num_steps: int = 4) -> str:
    """What the status line says once a result or a refusal is there."""
    tab.get_by_role("button", name="Settings").locator("visible=true").click()
    tab.get_by_label("number input for Steps").locator("visible=true").fill(str(num_steps))
    before = tab.text_content("#status p")
    tab.get_by_role("button", name=button, exact=True).click()
    changed = "said => document.querySelector('#status p').textContent != said"
    tab.wait_for_function(changed, arg=before)
    return tab.text_content("#status p") or ""


def shown_widths(tab: "playwright.Page") -> list[int]:
    """The natural widths of picture and depth, once they are there."""
    for name in ("#picture", "#depth"):
        tab.wait_for_function(
            "name => document.querySelector(`${name} img`)?.naturalWidth > 0", arg=name
        )
    return tab.locator("#picture img, #depth img").evaluate_all(NATURAL_WIDTHS)


def test_words_become_pictures_and_a_cloud_that_can_be_downloaded(
    tab: "playwright.Page", tmp_path: Path
) -> None:
    tab.get_by_label("What the picture shall show").locator("visible=true").fill("it's a road")
    assert "64 x 64" in make(tab, "Make picture and depth", num_steps=10)
    assert shown_widths(tab) == [64, 64]
    assert tab.locator("#picture img").evaluate("image => image.clientWidth") > 200
    tab.wait_for_function(f"({DRAWN})() > 1")
    line = tab.input_value("#command textarea")
    assert line.startswith("""mofo joint --prompt 'it'"'"'s a road' --model small""")
    assert "--num-steps 10 " in line

    with tab.expect_download() as waiting:
        tab.locator("#files a[download='cloud.glb']").click()
    waiting.value.save_as(tmp_path / "cloud.glb")
    assert len(trimesh.load(tmp_path / "cloud.glb").geometry["geometry_0"].vertices) > 1


def test_a_photo_becomes_depth_on_a_phone(tab: "playwright.Page", tmp_path: Path) -> None:
    tab.set_viewport_size({"width": 390, "height": 844})
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).resize((90, 60)).save(tmp_path / "my photo.jpg")
    choose(tab, "Photo", "#photo", tmp_path / "my photo.jpg")
    tab.wait_for_selector("#photo img")
    assert "90 x 60" in make(tab, "Make depth")
    assert shown_widths(tab) == [90, 90]
    assert "--image 'my photo.jpg'" in tab.input_value("#command textarea")
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    tab.wait_for_function(f"({DRAWN})() > 1")


def test_an_8_bit_picture_is_no_depth_and_the_page_says_why(
    tab: "playwright.Page", tmp_path: Path
) -> None:
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "drawn.png")
    choose(tab, "Depth", "#map", tmp_path / "drawn.png")
    tab.get_by_text("drawn.png").wait_for()
    said = make(tab, "Make picture")
    assert "Not made: drawn.png cannot be read as depth (an 8-bit picture" in said
    assert not tab.locator("#panel").is_visible()
