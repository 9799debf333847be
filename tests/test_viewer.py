"""The viewer in a real browser: in JupyterLab, and as the page of `bitvae view`.

Screenshots are written to runs/screenshots; the end of a test run lists them.
"""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from bitvae import Bits

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def page():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1300, "height": 1500})
        page.set_default_timeout(90_000)
        yield page
        browser.close()


@contextmanager
def running(command, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    server = subprocess.Popen(command, **pipes, **options)
    try:
        yield server
    finally:
        server.terminate()
        server.wait(30)


def image_bytes(page, alt):
    "Return the bytes of an image as the browser holds them."
    img = page.locator(f'img[alt^="{alt}"]').first
    img.wait_for()
    data = img.evaluate(
        "async (img) => { await img.decode(); "
        "return [...new Uint8Array(await (await fetch(img.src)).arrayBuffer())] }"
    )
    return bytes(data)


def wait_for_change(page, alt, before):
    "Wait until an image differs, and return it."
    for _ in range(300):
        if (now := image_bytes(page, alt)) != before:
            return now
        page.wait_for_timeout(30)
    raise AssertionError(f"the image {alt!r} did not change")


def screenshot(page, name):
    folder = ROOT / "runs" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / name)
    assert (folder / name).stat().st_size > 20_000


def use_viewer(page, name):
    "Select scales, flip bits and undo; the same in JupyterLab and on the page."
    from playwright.sync_api import expect

    expect(page.get_by_text("10 of 10 scales (32x32)")).to_be_visible()
    full = image_bytes(page, "reconstruction")
    page.get_by_label("scales used").focus()
    for k in (9, 8, 7, 6, 5):  # the slider changes the image and the numbers
        page.keyboard.press("ArrowLeft")
        expect(page.get_by_text(f"{k} of 10 scales (")).to_be_visible()
    coarse = wait_for_change(page, "reconstruction", full)
    assert len(coarse) < len(full)
    screenshot(page, f"{name}-scales.png")
    page.get_by_role("button", name="to scale 3").click()  # a click on the strip selects a scale
    expect(page.get_by_text("4 of 10 scales (6x6)")).to_be_visible()
    before = image_bytes(page, "reconstruction")
    planes = page.locator('img[alt^="bit planes of scale 3"]')  # a click on a bit flips it
    planes.scroll_into_view_if_needed()
    bits = image_bytes(page, "bit planes")
    small = image_bytes(page, "small copy")
    expect(page.get_by_text("channels 0 to 5, in reading order")).to_be_visible()
    planes.click(position={"x": 5, "y": 5})
    expect(page.get_by_text("channel 0, row 0, column 0")).to_be_visible()
    expect(page.get_by_text("change by the last edit")).to_be_visible()
    expect(page.locator("figcaption", has_text="4 of 10 scales, edited")).to_be_visible()
    expect(page.get_by_text("edits: 1")).to_be_visible()
    expect(page.get_by_text("FlipBit(scale=3, row=0, column=0, channel=0, image=0)")).to_be_visible()
    edited = wait_for_change(page, "reconstruction", before)
    flipped = wait_for_change(page, "bit planes", bits)
    wait_for_change(page, "small copy", small)
    planes.hover(position={"x": planes.bounding_box()["width"] - 5, "y": 5})
    expect(page.get_by_text("under the pointer: channel 2, row 0, column 5")).to_be_visible()
    page.mouse.move(0, 0)
    expect(page.get_by_text("marked: channel 0, row 0, column 0")).to_be_visible()
    screenshot(page, f"{name}-flipped.png")
    page.get_by_role("button", name="undo").click()  # undo restores the identical image
    expect(page.get_by_text("edits: 0")).to_be_visible()
    assert wait_for_change(page, "reconstruction", edited) == before
    assert wait_for_change(page, "bit planes", flipped) == bits
    page.locator(".bitvae-image:has(img[alt^='bit planes'])").focus()
    for key in ("ArrowLeft", "ArrowUp", "Enter"):
        page.keyboard.press(key)  # the keyboard flips a bit, too
    expect(page.get_by_text("edits: 1")).to_be_visible()
    correct = page.get_by_label("later scales correct the edits")
    correct.check()
    page.get_by_role("button", name="undo").click()  # undoes the edit, and the check box with it
    expect(page.get_by_text("edits: 0")).to_be_visible()
    expect(correct).not_to_be_checked()
    expect(page.get_by_role("button", name="undo")).to_be_disabled()


def take_tour(page):
    "Three clicks: coarse to fine, self-correction, mixed images; each with a text and code that repeats it."
    from playwright.sync_api import expect

    expect(page.get_by_role("heading", name="Bits of an image")).to_be_visible()
    page.get_by_role("button", name="1. coarse to fine").click()
    expect(page.get_by_text("Scale 0 is 6 bits")).to_be_visible()
    expect(page.get_by_text("2 of 10 scales (2x2)")).to_be_visible()  # it plays
    page.get_by_role("button", name="stop").click()
    stopped = page.get_by_label("scales used").input_value()
    page.wait_for_timeout(1500)
    assert page.get_by_label("scales used").input_value() == stopped
    page.get_by_role("button", name="play").click()
    page.wait_for_function("k => document.querySelector('.bitvae-slider input').value > k", arg=stopped)
    page.get_by_role("button", name="2. flip and correct").click()
    text = page.get_by_text("One in five bits").inner_text()
    corrected, unedited, damaged = map(float, re.findall(r"([\d.]+) dB", text))
    assert unedited >= corrected > damaged + 2
    expect(page.get_by_text("chain_edits(FlipFraction(scales=(0, 1, 2, 3, 4), fraction=0.2")).to_be_visible()
    page.get_by_role("button", name="3. mix images").click()
    expect(page.get_by_text("Scales 0 to 4 come from chelsea.png")).to_be_visible()
    assert page.locator("[role=status] img").evaluate("e => e.naturalWidth") == 96  # the other image
    expect(page.get_by_text("10 of 10 scales (32x32)")).to_be_visible()
    code = page.locator(".bitvae-code pre")
    expect(code).to_contain_text("TakeScales(tok.encode(load_image(held_out_photographs")
    page.get_by_role("button", name="copy code").click()
    expect(page.get_by_role("button", name="copied")).to_be_visible()
    assert "mono" in code.evaluate("e => getComputedStyle(e).fontFamily")
    assert page.evaluate("navigator.clipboard.readText()") == code.inner_text()


def compare(page):
    "One zoom for all images and a divider, by keyboard; the images grow with the screen."
    style = "e => [e.style.transform, e.closest('.bitvae-compare').style.getPropertyValue('--split')]"
    images = page.locator(".bitvae-frame img")
    page.locator(".bitvae-original .bitvae-frame").focus()
    page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    transforms = {images.nth(i).evaluate(style)[0] for i in range(3)}
    assert len(transforms) == 1 and "scale(2)" in transforms.pop()
    page.get_by_role("button", name="show the whole image").click()
    page.get_by_role("button", name="swipe").click()
    page.get_by_label("divider between").focus()
    page.keyboard.press("ArrowRight")
    assert images.first.evaluate(style) == ["scale(1) translate(0%, 0%)", "51%"]
    boxes = [images.nth(i).bounding_box() for i in range(3)]
    assert boxes[0] == boxes[1] != boxes[2]  # the reconstruction covers the original
    screenshot(page, "swipe.png")
    page.get_by_role("button", name="side by side").click()
    before, widths = page.viewport_size, {390: 160, 1280: 390, 2560: 800}
    for width, least in widths.items():
        page.set_viewport_size({"width": width, "height": 1440})
        page.wait_for_timeout(200)
        assert images.first.bounding_box()["width"] > least
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        screenshot(page, f"page-{width}.png")
    page.set_viewport_size(before)


def choose_scales(page):
    "All scales are listed, by the index of the code, and the planes are those of the chosen one."
    from playwright.sync_api import expect

    scales = page.get_by_label("scales to edit")
    assert scales.evaluate("e => [e.size, e.length, e.multiple]") == [10, 10, True]
    scales.select_option("scale 2 (4x4)")
    expect(page.locator('img[alt="bit planes of scale 2"]')).to_be_visible()
    page.get_by_role("button", name="set to 0").click()
    expect(page.get_by_text("Fill(scales=(2,)")).to_be_visible()


def change_resolution(page):
    """Clicks on an image that is being replaced flip no bit of the next one.

    The page says that it works, and an action does not wait for the thumbnails of a large image.
    """
    from playwright.sync_api import expect

    planes, sizes = page.locator('img[alt^="bit planes"]'), page.get_by_label("resolution")
    busy, made = page.locator(".bitvae-busy"), page.locator('.bitvae-strip img[src^="blob:"]')
    sizes.select_option("512")
    planes.click(position={"x": 5, "y": 5})
    expect(busy).to_be_visible(timeout=1000)
    expect(page.get_by_text("13 of 13 scales (")).to_be_visible(timeout=90_000)
    expect(busy).to_be_hidden()
    page.get_by_role("button", name="to scale 3").click()
    expect(page.get_by_text("4 of 13 scales (")).to_be_visible(timeout=90_000)
    assert made.count() < 13
    sizes.select_option("256")
    planes.click(position={"x": 5, "y": 5})
    expect(page.get_by_text("10 of 10 scales (")).to_be_visible(timeout=90_000)
    page.wait_for_timeout(500)
    expect(page.get_by_text("edits: 0")).to_be_visible()


def upload(page, tmp_path):
    from playwright.sync_api import expect

    (tmp_path / "notes.png").write_bytes(b"not an image")
    Image.new("RGB", (400, 300), "teal").save(tmp_path / "teal.png")
    before = image_bytes(page, "the original")

    def choose(name):
        with page.expect_file_chooser() as chooser:
            page.locator(".widget-upload").click()
        chooser.value.set_files(tmp_path / name)

    choose("notes.png")
    expect(page.get_by_text("notes.png is not an image")).to_be_visible()
    assert image_bytes(page, "the original") == before
    choose("teal.png")
    teal = wait_for_change(page, "the original", before)
    assert Image.open(io.BytesIO(teal)).getpixel((9, 9)) == (0, 128, 128)
    expect(page.get_by_text("notes.png is not an image")).to_be_hidden()


def save(page, tmp_path):
    page.get_by_role("tab", name="save").click()
    for name in ("picture.png", "scales.gif", "picture.bits"):
        with page.expect_download() as info:
            page.get_by_role("button", name=name).click()
        info.value.save_as(tmp_path / name)
        assert info.value.suggested_filename == f"teal-{name}"
    assert Image.open(tmp_path / "scales.gif").n_frames == 10
    assert Image.open(tmp_path / "picture.png").size == (256, 256)
    assert len(Bits.load(tmp_path / "picture.bits")) == 10


def measure(page):
    from playwright.sync_api import expect

    page.get_by_role("tab", name="sensitivity").click()
    page.get_by_role("button", name="measure").click()
    expect(page.locator(".bitvae-heat td[title]").first).to_be_visible()  # a partial result
    page.get_by_role("button", name="cancel").click()
    expect(page.get_by_role("button", name="measure")).to_be_enabled()
    page.wait_for_timeout(2000)
    assert 0 < page.locator(".bitvae-heat td[title]").count() < 60  # nothing is added after cancel
    assert "nan" not in page.locator(".bitvae-heat").inner_text()
    expect(page.get_by_text("gray levels of 255")).to_be_visible()
    page.get_by_role("tab", name="one scale").click()
    expect(page.get_by_text("residual energy: ")).to_be_visible()


@needs_browser
def test_in_jupyterlab(page, tmp_path):
    from playwright.sync_api import expect

    (tmp_path / "nb").mkdir()
    shutil.copy(ROOT / "nbs" / "experiments" / "view.ipynb", tmp_path / "nb")
    cells = json.loads((tmp_path / "nb" / "view.ipynb").read_text())
    last = next(i for i, c in enumerate(cells["cells"]) if "viewer = view(" in "".join(c["source"]))
    cells["cells"] = cells["cells"][: last + 1]  # without the figures
    (tmp_path / "nb" / "view.ipynb").write_text(json.dumps(cells))
    settings = tmp_path / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    port = free_port()
    options = ["--no-browser", "--allow-root", "--expose-app-in-browser", "--ip=127.0.0.1", f"--port={port}"]
    options += ["--ServerApp.port_retries=0", "--IdentityProvider.token="]
    options += [f"--ServerApp.root_dir={tmp_path / 'nb'}"]
    folders = {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "ws")}
    with running([sys.executable, "-m", "jupyterlab", *options], env=os.environ | folders):
        wait_for_server(f"http://127.0.0.1:{port}/api")
        page.goto(f"http://127.0.0.1:{port}/lab/tree/view.ipynb?reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
        page.wait_for_function("""async () => { const p = window.jupyterapp.shell.currentWidget;
            await p.sessionContext.ready; return !!p.sessionContext.session?.kernel }""")
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        use_viewer(page, "lab")
        page.get_by_role("tab", name="one scale").click()
        expect(page.get_by_text("residual energy: ")).to_be_visible()
        dark = "'apputils:change-theme', {theme: 'JupyterLab Dark'}"
        page.evaluate(f"window.jupyterapp.commands.execute({dark})")
        page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
        color = "e => getComputedStyle(e).color.match(/\\d+/g).slice(0, 3).map(Number)"
        for part in ("figcaption", ".bitvae-strip button", ".bitvae-button"):
            assert min(page.locator(part).first.evaluate(color)) > 180, part  # light on dark
        inverted = "e => getComputedStyle(e).filter"  # charts are drawn in dark lines on white
        assert "invert" in page.locator(".bitvae-charts svg").first.evaluate(inverted)
        screenshot(page, "lab-dark.png")


def wait_for_server(address):
    for _ in range(240):
        try:
            return urllib.request.urlopen(address, timeout=30)
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"{address} does not answer")


def status(address):
    try:
        return urllib.request.urlopen(address, timeout=30).status
    except urllib.error.HTTPError as e:
        return e.code


@needs_browser
def test_as_a_page(page, tmp_path):
    Image.new("RGB", (300, 300), "maroon").save(tmp_path / "maroon.png")
    (tmp_path / "secret.png").write_bytes((tmp_path / "maroon.png").read_bytes())
    command = [sys.executable, "-m", "bitvae.cli", "view", "--no-browser"]
    with running([*command, "--port", str(free_port())]) as server:
        address = server.stdout.readline().split()[0]
        requests = []
        page.goto("about:blank")  # leaves JupyterLab, which asks its own server
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        take_tour(page)
        compare(page)
        choose_scales(page)
        page.get_by_role("button", name="reset").click()
        change_resolution(page)
        use_viewer(page, "page")
        upload(page, tmp_path)
        screenshot(page, "page-upload.png")
        save(page, tmp_path)
        measure(page)
        here = address.split("?")[0], "blob:", "data:", address.split("?")[0].replace("http", "ws")
        assert [url for url in requests if not url.startswith(here)] == []
    with running([*command, str(tmp_path / "maroon.png"), "--port", str(free_port())]) as server:
        address = server.stdout.readline().split()[0]
        check_access(page, address, tmp_path)


def check_access(page, address, tmp_path):
    "The page shows one image and uploads, and gives no access to other files or from other machines."
    port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=(.+)", address).groups()
    page.emulate_media(color_scheme="dark")
    page.goto(address)
    assert Image.open(io.BytesIO(image_bytes(page, "the original"))).getpixel((9, 9)) == (128, 0, 0)
    background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert max(page.evaluate(background)) < 60
    page.emulate_media(color_scheme="light")
    assert min(page.evaluate(background)) > 250
    assert not page.get_by_placeholder("or a path, and Enter").count()
    large = tmp_path / "large.png"  # larger than tornado's default message limit
    Image.frombytes("RGB", (2400, 2000), os.urandom(2400 * 2000 * 3)).save(large)
    before = image_bytes(page, "the original")
    with page.expect_file_chooser() as chooser:
        page.locator(".widget-upload").click()
    chooser.value.set_files(large)
    wait_for_change(page, "the original", before)
    for path in (
        "voila/files/view.ipynb",
        f"voila/files/..%2f..{tmp_path}/secret.png",
        f"voila/files{tmp_path}/secret.png",
        f"files{tmp_path}/secret.png",
        "api/contents",
        f"voila/static/..%2f..{tmp_path}/secret.png",
    ):
        assert status(f"http://127.0.0.1:{port}/{path}?token={token}") in (400, 403, 404), path
    assert "/login" in urllib.request.urlopen(f"http://127.0.0.1:{port}/").url  # without the token
    with socket.socket() as s:  # every address of this machine but loopback refuses
        s.settimeout(5)
        own = {a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        for host in [*own - {"127.0.0.1"}, "127.0.0.2"]:
            assert s.connect_ex((host, int(port))) != 0, host
