"The page in a real browser, wide and on a phone: a picture is chosen, boxes are drawn (skipped without Chromium)"
import base64, json, os, re, shutil, subprocess, time
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
ws = pytest.importorskip("websockets.sync.client")
from test_serve import ROOT, running

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")


class Browser:
    "Headless Chromium, spoken to by its debugging protocol"
    def __init__(self, home):
        run = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--remote-debugging-port=0", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
               f"--user-data-dir={home}", "about:blank"]
        self.process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            if (port := Path(home) / "DevToolsActivePort").exists() and port.read_text(): break
            time.sleep(.1)
        at = f"http://127.0.0.1:{port.read_text().split()[0]}/json"
        page = next(t for t in httpx.get(at, timeout=60).json() if t["type"] == "page")
        self.open, self.n, self.faults = ExitStack(), 0, []
        self.ws = self.open.enter_context(ws.connect(page["webSocketDebuggerUrl"], max_size=None))
        for domain in ("Page", "Runtime", "DOM", "Log"): self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.n += 1
        self.ws.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while True:
            m = json.loads(self.ws.recv(timeout=60))
            if is_fault(m): self.faults.append(m["params"])
            if m.get("id") != self.n: continue
            assert "error" not in m, m
            return m["result"]

    def js(self, text):
        r = self("Runtime.evaluate", expression=text, returnByValue=True, awaitPromise=True)
        return r["result"].get("value")

    def status(self): return self.js("document.getElementById('s').textContent")

    def until(self, text):
        for _ in range(300):
            if self.js(text): return
            time.sleep(.1)
        pytest.fail(f"never: {text}; status: {self.status()}; {self.faults}")

    def choose(self, file):
        root = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=root, selector="#f")["nodeId"]
        self("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def shot(self, file):
        Path(file).write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.open.close()
        self.process.terminate()
        self.process.wait(30)


def is_fault(m):
    "An exception on the page, or an error in its console"
    if m.get("method") == "Runtime.exceptionThrown": return True
    return m.get("method") == "Log.entryAdded" and m["params"]["entry"]["level"] == "error"


@pytest.fixture(scope="module")
def server():
    with running("--threads", 1) as p: yield p


@pytest.fixture(scope="module")
def chromium(server, tmp_path_factory):
    b = Browser(tmp_path_factory.mktemp("browser") / "home")
    yield b
    b.close()


@pytest.fixture
def browser(chromium):
    chromium.faults.clear()
    return chromium


def visit(b, at, width=1200, height=800, mobile=False):
    "Open the page in a window of this size"
    b("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
    b("Page.navigate", url=at)
    b.until("document.readyState == 'complete' && !!document.getElementById('f')")


FOUND = "/[1-9]\\d* object/.test(document.getElementById('s').textContent)"
SCENE = ROOT / "figures/scene.jpg"


@pytest.mark.parametrize("name, width, height, mobile", [("wide", 1200, 800, False), ("phone", 390, 844, True)])
def test_a_person_chooses_a_picture(server, browser, tmp_path, name, width, height, mobile):
    b, shots = browser, Path(os.environ.get("RTDETR_KD_SHOTS", tmp_path))
    visit(b, server.at, width, height, mobile)
    b.choose(SCENE)
    b.until(FOUND)
    shown = lambda: int(re.match(r"\d+", b.status())[0])
    found = httpx.post(f"{server.at}/detect", files=dict(image=SCENE.read_bytes())).json()["detections"]
    many = shown()
    assert many == len([d for d in found if d["score"] >= .3])
    assert b.js("document.documentElement.scrollWidth") <= width           # nothing sticks out of a phone
    b.shot(shots / f"page_{name}.png")
    b.js("const t = document.getElementById('t'); t.value = 0.75; t.dispatchEvent(new Event('input'))")
    assert shown() < many                                                  # the slider hides the unsure ones
    surest = [d["name"] for d in found if d["score"] >= .75]
    assert b.js("document.getElementById('c').getAttribute('aria-label')").endswith(", ".join(surest))
    b.js(f"const n = document.getElementById('n'); n.value = '{surest[0]}'; n.dispatchEvent(new Event('change'))")
    assert shown() == surest.count(surest[0])                              # and the list all other classes
    assert ("objects" in b.status()) == (shown() != 1)
    assert not b.faults, b.faults


LATE = """
const real = fetch, waiting = [];
window.fetch = (...x) => real(...x).then(r => waiting.length ? r : new Promise(go => waiting.push(() => go(r))));
window.release = () => waiting[0]();
"""
BUSY = "document.getElementById('m').getAttribute('aria-busy') == 'true'"


def test_a_late_answer_is_dropped(server, browser, tmp_path):
    "The first picture's answer comes after the second's: the second stays"
    b = browser
    visit(b, server.at)
    b.js(LATE)
    other = tmp_path / "other.png"
    Image.new("RGB", (300, 100)).save(other)
    b.choose(SCENE)
    b.until(BUSY)
    b.until("waiting.length == 1")
    b.choose(other)
    b.until(f"!({BUSY}) && picture && picture.width == 300")
    b.js("release()")
    time.sleep(.3)
    assert b.js("answer.width") == b.js("picture.width") == 300


def test_an_error_takes_the_boxes_away(server, browser, tmp_path):
    b = browser
    visit(b, server.at)
    b.choose(SCENE)
    b.until(FOUND)
    (tmp_path / "bad.jpg").write_text("no picture")
    b.choose(tmp_path / "bad.jpg")
    b.until("document.getElementById('s').className == 'bad'")
    assert b.js("answer === null && document.getElementById('c').width == 1 && document.getElementById('j').disabled")


def test_a_very_long_picture_fits_the_screen(server, browser, tmp_path):
    b = browser
    visit(b, server.at, 390, 844, True)
    Image.new("RGB", (600, 20_000), "white").save(tmp_path / "long.png")
    b.choose(tmp_path / "long.png")
    b.until("/object/.test(document.getElementById('s').textContent)")
    shape = b.js("const r = document.getElementById('c').getBoundingClientRect(); [r.width, r.height]")
    assert shape[1] <= 844 and shape[1] / shape[0] == pytest.approx(20_000 / 600, rel=.1)


COLOURS = """['body', 'button', 'select'].map(q => {
  const s = getComputedStyle(document.querySelector(q));
  return s.color + ' on ' + s.backgroundColor; })"""


def test_every_control_has_a_name_and_the_colours_follow_the_system(server, browser):
    b, seen = browser, {}
    visit(b, server.at)
    nodes = b("Accessibility.getFullAXTree")["nodes"]
    kinds = ("button", "slider", "combobox", "textbox", "image", "checkbox")
    controls = [n for n in nodes if n.get("role", {}).get("value") in kinds and not n.get("ignored")]
    assert len(controls) >= 7
    assert all(n["name"]["value"] for n in controls), controls
    for mode in ("light", "dark"):
        b("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=mode)])
        seen[mode] = b.js(COLOURS)
    assert all(a != b_ for a, b_ in zip(seen["light"], seen["dark"])), seen
    assert len(set(seen["dark"])) == 1                                     # one ink, one paper
    assert not b.faults, b.faults                                          # a favicon that is not there would be one


def test_a_file_that_is_no_picture(server, browser, tmp_path):
    visit(browser, server.at)
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    browser.choose(bad)
    browser.until("/no image/.test(document.getElementById('s').textContent)")
    assert not [f for f in browser.faults if "415" not in str(f)]


def test_the_camera(server, browser):
    "Chromium's fake one"
    visit(browser, server.at)
    browser.js("document.getElementById('v').click()")
    browser.until("/object/.test(document.getElementById('s').textContent)")
    browser.js("document.getElementById('v').click()")
    assert not browser.faults, browser.faults
