"""The page as a person uses it: `python app.py` with the embedded base, in a real Chromium.

Without a Chromium these tests are skipped and say so; METALORA_BROWSER_TESTS=required makes that a failure.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file

from metalora import Identity
from metalora.samples import read_samples

ROOT = Path(__file__).parents[1]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT = 60_000  # ms
SAMPLES, PROMPTS = read_samples()


@pytest.fixture(scope="module")
def browser():
    """A Chromium of the system's."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if not found:
        reason = f"there is no Chromium here; install one ({', '.join(NAMES)})"
        (pytest.fail if os.environ.get("METALORA_BROWSER_TESTS") == "required" else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(browser, tmp_path_factory):
    """`python app.py` as it comes, with no network to go to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("app") / "log").open("w+")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("METALORA_")} | {"HF_HUB_OFFLINE": "1"}
    app = subprocess.Popen([sys.executable, "app.py", "--host", "127.0.0.1", "--port", str(port)], cwd=ROOT, stdout=log, stderr=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while not _answers(url):
            assert app.poll() is None and time.monotonic() < end, (log.seek(0), log.read())[1]
            time.sleep(0.2)
        yield url
    finally:
        app.terminate()
        app.wait(30)
        log.close()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture
def visit(browser, address):
    """Opens the page as a fresh visitor, ready for work. In the end: nothing was asked of other hosts, and no script failed."""
    contexts, outside, faults = [], [], []

    def open_page(width: int = 1400, height: int = 900, **how):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **how))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.wait_for_selector(".status.ready")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not outside and not faults


def set_steps(page, steps: int) -> None:
    """Few steps, for speed. A slider that has just been unfolded takes the page's value once more, after a moment."""
    page.locator(".more").first.locator("button").first.click()
    box = page.locator("#learning-steps input[type=number]")
    for _ in range(20):
        box.fill(str(steps))
        box.blur()
        page.wait_for_timeout(500)
        if box.input_value() == str(steps):
            return
    pytest.fail("the slider does not keep the number")


def learn(page) -> None:
    page.click("#learn")
    page.wait_for_selector(".learning.done")


def pictures(page, at_least: int = 1):
    page.wait_for_function(f"document.querySelectorAll('#pictures .gallery-item img').length >= {at_least}")
    page.wait_for_selector("#generate", state="visible")
    return page.locator("#pictures .gallery-item")


def download(page, button: str, folder: Path) -> Path:
    with page.expect_download() as coming:
        page.click(button)
    path = folder / coming.value.suggested_filename
    coming.value.save_as(path)
    return path


def test_a_sample_from_the_first_click_to_the_files(visit, tmp_path):
    page = visit()
    number = len(SAMPLES) - 1  # a thing; people are learnt further down
    page.locator("#samples button").nth(number).click()
    page.wait_for_selector("#photo img")
    page.wait_for_selector(f"#domain input[value='{SAMPLES[number].domain}']:checked")
    set_steps(page, 40)
    page.click("#learn")
    page.wait_for_function("/step \\d+ of 40 · loss [\\d.]+ · [\\d.]+ it\\/s · .+ left/.test(document.querySelector('#card').innerText)")
    page.wait_for_selector(".learning.done")
    assert page.locator("#card .frame img").count() == 1  # the likeness came while it learnt

    page.locator("#prompts button").last.click()
    wanted = PROMPTS[:8][-1]
    page.wait_for_function("text => document.querySelector('#prompt textarea').value === text", arg=wanted)
    page.click("#generate")
    shown = pictures(page, 4)
    assert re.search(r"(similarity to your photo -?\d\.\d\d|no face found)", shown.first.inner_text()) and "seed 0" in shown.first.inner_text()
    assert shown.first.locator("img").bounding_box()["width"] > 120  # however few pixels it has
    made = Image.open(io.BytesIO(page.request.get(shown.first.locator("img").get_attribute("src")).body()))
    assert made.format == "PNG" and made.info["AI-generated"] == "true"

    identity = download(page, "#get-identity", tmp_path)
    assert Identity.load(identity).domain == SAMPLES[number].domain and Identity.load(identity).steps == 40
    assert all(key.startswith("transformer.") for key in load_file(download(page, "#get-diffusers", tmp_path)))
    assert all(key.startswith("lora_unet_") for key in load_file(download(page, "#get-kohya", tmp_path)))

    other = visit()  # somebody else, another day
    with other.expect_file_chooser() as chooser:
        other.click("#load")
    chooser.value.set_files(str(identity))
    other.wait_for_selector("#get-kohya:not([disabled])")
    other.click("#generate")
    assert pictures(other).count()


def test_a_photo_of_ones_own_is_learnt_and_stopped(visit):
    page = visit()
    page.locator("#photo input[type=file]").set_input_files(SAMPLES[0].held_out[0])
    page.wait_for_selector("#photo img")
    set_steps(page, 2000)
    page.click("#learn")
    page.wait_for_function("/step \\d+ of 2000/.test(document.querySelector('#card').innerText)")
    asked = time.monotonic()
    page.click("#stop")
    page.wait_for_selector(".learning.stopped")
    assert time.monotonic() - asked < 2.5  # a second, and what a busy machine adds
    page.wait_for_selector("#learn", state="visible")
    assert "Stopped" in page.locator("#card").inner_text()
    assert page.locator("#get-identity").is_disabled()


def test_a_bad_file_is_answered_with_a_sentence(visit, tmp_path):
    (tmp_path / "photo.jpg").write_text("this is no picture")
    page = visit()
    page.locator("#photo input[type=file]").set_input_files(str(tmp_path / "photo.jpg"))
    says = page.locator("[data-testid=toast-body]").inner_text()
    assert "photo" in says and "Traceback" not in says and says.rstrip().endswith(".")
    page.locator("#samples button").first.click()  # and on it goes
    page.wait_for_selector("#photo img")


def test_of_several_faces_one_is_clicked(visit, tmp_path):
    left, right = (Image.open(s.photo).convert("RGB") for s in SAMPLES[:2])
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left)
    both.paste(right, (left.width, 0))
    both.save(tmp_path / "both.png")
    page = visit()
    page.locator("#photo input[type=file]").set_input_files(str(tmp_path / "both.png"))
    page.wait_for_function("document.querySelectorAll('#faces .gallery-item').length === 2")
    set_steps(page, 5)
    page.click("#learn")
    assert "several faces; click the one" in page.locator("[data-testid=toast-body]").inner_text()
    page.locator("#faces button").nth(1).click()
    time.sleep(0.5)
    learn(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_sticks_out(visit, scheme):
    page = visit(390, 844, is_mobile=True, has_touch=True, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    tiles = [page.locator("#samples button").nth(i).bounding_box() for i in range(len(SAMPLES))]
    assert all(0 <= tile["x"] and tile["x"] + tile["width"] <= 390 and tile["width"] > 50 for tile in tiles)


def test_without_a_person_the_page_says_what_to_do(visit):
    page = visit()
    page.click("#generate")
    assert "Learn a person first" in page.locator("[data-testid=toast-body]").inner_text()
