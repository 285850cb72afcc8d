"The page in a real browser: a picture is chosen, boxes are drawn, the slider hides them; wide and on a phone (skipped without Chromium)"
import base64, json, os, re, shutil, subprocess, time
from contextlib import ExitStack
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx"); pytest.importorskip("fastapi")
ws = pytest.importorskip("websockets.sync.client")
from test_serve import ROOT, running

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")


class Browser:
    "Headless Chromium, spoken to by its debugging protocol"
    def __init__(self, home):
        run = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0", "--use-fake-ui-for-media-stream",
               "--use-fake-device-for-media-stream", f"--user-data-dir={home}", "about:blank"]
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
            if m.get("method") == "Runtime.exceptionThrown" or (m.get("method") == "Log.entryAdded" and m["params"]["entry"]["level"] == "error"): self.faults.append(m["params"])
            if m.get("id") == self.n: assert "error" not in m, m; return m["result"]

    def js(self, text): return self("Runtime.evaluate", expression=text, returnByValue=True, awaitPromise=True)["result"].get("value")

    def until(self, text):
        for _ in range(300):
            if self.js(text): return
            time.sleep(.1)
        pytest.fail(f"never: {text}; status: {self.js('document.getElementById(`s`).textContent')}; {self.faults}")

    def choose(self, file):
        root = self("DOM.getDocument")["root"]["nodeId"]
        self("DOM.setFileInputFiles", nodeId=self("DOM.querySelector", nodeId=root, selector="#f")["nodeId"], files=[str(file)])

    def shot(self, file): Path(file).write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def close(self): self.open.close(); self.process.terminate(); self.process.wait(30)


def test_a_person_drops_a_picture(tmp_path):
    shots = Path(os.environ.get("RTDETR_KD_SHOTS", tmp_path))
    with running("--threads", 1) as p:
        b = Browser(tmp_path / "home")
        try:
            for name, width, height, mobile in (("wide", 1200, 800, False), ("phone", 390, 844, True)):
                b("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
                b("Page.navigate", url=p.at); b.until("document.readyState == 'complete' && !!document.getElementById('f')")
                b.choose(ROOT / "figures/scene.jpg"); b.until("/[1-9]\\d* objects/.test(document.getElementById('s').textContent)")
                seen = lambda: int(re.match(r"\d+", b.js("document.getElementById('s').textContent"))[0])
                many = seen()
                assert many == len([d for d in httpx.post(f"{p.at}/detect", files=dict(image=(ROOT / "figures/scene.jpg").read_bytes())).json()["detections"] if d["score"] >= .3])
                assert b.js("document.documentElement.scrollWidth") <= width                      # nothing sticks out of a phone
                b.shot(shots / f"page_{name}.png")
                b.js("const t = document.getElementById('t'); t.value = 0.75; t.dispatchEvent(new Event('input'))")
                assert seen() < many
            (tmp_path / "bad.jpg").write_text("no picture"); b.choose(tmp_path / "bad.jpg"); b.until("/no image/.test(document.getElementById('s').textContent)")
            b.faults = [f for f in b.faults if "415" not in str(f)]
            b.js("document.getElementById('v').click()"); b.until("/objects/.test(document.getElementById('s').textContent)")   # a camera (Chromium's fake one)
            b.js("document.getElementById('v').click()")
            assert not b.faults, b.faults
        finally: b.close()
