"""The page in a real browser: drop a photo, write a sentence, read three probabilities."""

import io
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from fake_model import FakeModel
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("playwright.sync_api")

import uvicorn
from playwright.sync_api import sync_playwright

from clseave_cli.core.config import ServeConfig
from clseave_cli.core.prediction.service import create_app


def _find_browser():
    """One on the path, or the one that `playwright install chromium` has put away."""
    for name in ("chromium", "google-chrome", "chrome"):
        if path := shutil.which(name):
            return path
    with sync_playwright() as starter:
        bundled = Path(starter.chromium.executable_path)
    return bundled if bundled.is_file() else None


_BROWSER = _find_browser()
pytestmark = pytest.mark.skipif(_BROWSER is None, reason="no Chromium here")

_DROP = """([target, bytes]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], "photo.png", {type: "image/png"}));
    document.querySelector(target).dispatchEvent(
        new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
}"""


@pytest.fixture(scope="module")
def address():
    listening = socket.create_server(("127.0.0.1", 0))
    app = create_app(FakeModel(), ServeConfig(max_megapixels=1))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as starter:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = starter.chromium.launch(executable_path=_BROWSER, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, opened; a script error or a request to elsewhere fails the test."""
    page = browser.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda entry: entry.type == "error" and problems.append(entry.text))
    inside = (address, "blob:", "data:")
    page.on("request", lambda sent: sent.url.startswith(inside) or problems.append(sent.url))
    page.goto(address)
    # Not `wait_for_function`: the page's security policy forbids what it evaluates.
    page.wait_for_selector("#lang option", state="attached")
    yield page
    page.close()
    assert [each for each in problems if "413" not in each] == []


def _png(colour, size=(32, 32)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def _ask(page, sentence, photo=None, target="#drop"):
    """Drops a photo, a green one by default, and asks about a sentence."""
    page.evaluate(_DROP, [target, list(photo or _png((0, 255, 0)))])
    page.fill("#hypothesis", sentence)
    page.click("#ask")


def _percents(page):
    page.wait_for_selector("#answer .percent")
    return [float(text.removesuffix(" %")) for text in page.locator(".percent").all_inner_texts()]


def test_a_dropped_photo_and_a_sentence_give_three_probabilities(page):
    assert page.locator("#ask").is_disabled()
    assert page.locator("#lang option").all_inner_texts() == ["English (en)", "German (de)"]
    page.select_option("#lang", "de")
    _ask(page, "Das ist grün.")
    percents = _percents(page)
    assert page.locator(".row span:first-child").all_inner_texts() == [
        "entailment", "neutral", "contradiction",
    ]  # fmt: skip
    assert sum(percents) == pytest.approx(100, abs=0.2) and percents[1] == max(percents)
    assert page.locator("#answer h2").inner_text().startswith("Neutral")
    assert page.locator("#answer .note").inner_text().startswith("align-de · ")


def test_a_chosen_photo_works_as_well_and_enter_asks(page):
    photo = {"name": "p.png", "mimeType": "image/png", "buffer": _png((255, 0, 0))}
    page.set_input_files("#image", photo)
    assert page.locator("#photo").is_visible() and not page.locator("#hint").is_visible()
    page.fill("#hypothesis", "It is red.")
    page.press("#hypothesis", "Enter")
    assert _percents(page)[0] == max(_percents(page))


def test_a_refusal_is_shown_in_words(page):
    _ask(page, "x", _png((1, 2, 3), (1200, 1000)), target="body")
    page.wait_for_selector("#answer .problem")
    assert "more than 1 megapixels" in page.locator("#answer .problem").inner_text()


@pytest.mark.parametrize("change", ["sentence", "language", "photo"])
def test_no_answer_stays_beside_another_question(page, change):
    _ask(page, "It is green.")
    _percents(page)
    if change == "sentence":
        page.type("#hypothesis", "!")
    elif change == "language":
        page.select_option("#lang", "de")
    else:
        page.evaluate(_DROP, ["#drop", list(_png((255, 0, 0)))])
    assert page.locator("#answer").inner_text() == ""


def test_an_answer_that_comes_after_an_edit_is_not_shown(page):
    held = []
    page.route("**/judge", lambda route: held.append(route))
    _ask(page, "It is green.")
    page.wait_for_selector("#ask:disabled")
    assert page.inner_text("#ask") == "Asking…"
    page.type("#hypothesis", "!")
    with page.expect_response("**/judge"):
        held[0].continue_()
    page.wait_for_timeout(50)
    assert page.locator("#answer").inner_text() == "" and page.inner_text("#ask") == "Ask"


def test_on_a_phone_the_answer_comes_into_view(page):
    page.set_viewport_size({"width": 390, "height": 480})
    _ask(page, "It is green.")
    _percents(page)
    bottom = page.locator("#answer .row >> nth=2").bounding_box()
    assert bottom["y"] + bottom["height"] < 480
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_several_lines_an_example_and_a_warning(page):
    page.click("#examples button >> nth=0")
    page.wait_for_selector("#photo:not([hidden])")
    assert page.input_value("#hypothesis") == "There is a red circle."
    page.fill("#hypothesis", "There is a red circle.\n赤い円があります。\n")
    page.click("#ask")
    page.wait_for_selector("#answer .answer")
    sentences = page.locator(".sentence").all_inner_texts()
    assert sentences == ["There is a red circle.", "赤い円があります。"]
    assert page.locator(".problem").all_inner_texts() == [
        "Warning: the sentence is not in the script of en; check the language."
    ]
