"The server as a process of its own, with what the world sends it"
import base64, io, json, os, pickle, random, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
ROOT = Path(__file__).resolve().parent.parent
SCENE = (ROOT / "figures/scene.jpg").read_bytes()
TOY = ROOT / "weights/toy_student.safetensors"
ONNX = ROOT / "weights/toy_student.onnx"  # what is served without --weights


def free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


@contextmanager
def running(*words, script=None):
    "A server process, ready; asked to stop at the end"
    port = free_port()
    run = [sys.executable, script, str(port)] if script else [sys.executable, "-m", "rtdetr_kd.serve", "--port", str(port), *map(str, words)]
    p = subprocess.Popen(run, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    p.at = f"http://127.0.0.1:{port}"
    lines = p.lines = []
    with ThreadPoolExecutor(1) as reader:
        reader.submit(lambda: lines.extend(iter(p.stderr.readline, "")))
        try:
            for _ in range(3000):
                assert p.poll() is None, "".join(lines)
                try:
                    if httpx.get(f"{p.at}/readyz").status_code == 200: break
                except httpx.TransportError: pass
                time.sleep(.1)
            yield p
        finally:
            if p.poll() is None: p.terminate()
            p.wait(60)


@pytest.fixture(scope="module")
def server():
    with running("--threads", 1) as p: yield p


def family(pid): return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def rss(p): return sum(int(next(l for l in Path(f"/proc/{k}/status").read_text().splitlines() if l.startswith("VmRSS")).split()[1]) for k in family(p.pid)) / 1024


def post(p, data=SCENE, name="a.jpg", path="/detect", **kw):
    return httpx.post(p.at + path, files=dict(image=(name, data)), timeout=120, **kw)


def check_error(r, status, code=None):
    assert r.status_code == status, r.text
    e = r.json()
    assert set(e) == {"error"} and set(e["error"]) == {"code", "message", "image"} and e["error"]["message"]
    assert "Traceback" not in r.text and ".py" not in r.text
    if code: assert e["error"]["code"] == code


def packed(im, kind="PNG", **kw):
    b = io.BytesIO(); im.save(b, kind, **kw); return b.getvalue()


def scene(): return Image.open(io.BytesIO(SCENE)).convert("RGB")


def kinds():
    im, exif = scene(), Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray((np.asarray(im.convert("L")).astype(np.uint16) * 257))
    clear = im.convert("P"); clear.info["transparency"] = 0
    yield from {"rgb.png": packed(im), "plain.jpg": packed(im, "JPEG"), "turned.jpg": packed(im, "JPEG", exif=exif), "webp.webp": packed(im, "WEBP", lossless=True),
                "bmp.bmp": packed(im, "BMP"), "cmyk.jpg": packed(im.convert("CMYK"), "JPEG"), "grey16.png": packed(grey16), "grey.png": packed(im.convert("L")),
                "alpha.png": packed(im.convert("RGBA")), "palette.png": packed(clear, transparency=0), "la.png": packed(im.convert("LA")), "bit.png": packed(im.convert("1")),
                "moving.gif": packed(im, "GIF", save_all=True, append_images=[Image.new("RGB", im.size, "red")]), "one.png": packed(Image.new("RGB", (1, 1))),
                "line.png": packed(Image.new("RGB", (1, 20000), "red"))}.items()


@pytest.mark.parametrize("name, data", list(kinds()), ids=[k for k, _ in kinds()])
def test_the_same_as_detect(server, tmp_path, name, data):
    "Every kind of file gives over HTTP what `RTDETR.detect` gives for the file, in pixels of the picture as a person sees it"
    from rtdetr_kd.model.weights import load_model
    (tmp_path / name).write_bytes(data)
    want = load_model(TOY).detect(tmp_path / name, threshold=.4)
    r = post(server, data, name, params=dict(threshold=.4))
    assert r.status_code == 200, r.text
    a = r.json()
    assert (a["image"], a["height"], a["width"]) == (name, *want.image.shape[:2])
    assert a["orientation"] == (6 if name == "turned.jpg" else 1)
    assert [d["name"] for d in a["detections"]] == want.names
    if want.names:
        np.testing.assert_allclose([d["box"] for d in a["detections"]], want.boxes.clip(0), atol=.05)
        np.testing.assert_allclose([d["score"] for d in a["detections"]], want.scores, atol=1e-3)


def test_the_embedded_student():
    "What is served without --weights is the shipped student"
    from rtdetr_kd.deploy.open import open_model
    assert open_model(ONNX, threads=1).about["weights"] == open_model(TOY, threads=1).about["weights"], \
        "weights/toy_student.onnx is not the export of weights/toy_student.safetensors: write_onnx(load_model(...), ...), as in the Makefile's results"


def test_the_seeds_command(server):
    r = subprocess.run(["curl", "-s", "-X", "POST", f"{server.at}/detect", "-F", f"image=@{ROOT}/figures/scene.jpg"], capture_output=True, text=True)
    assert json.loads(r.stdout)["detections"] == post(server).json()["detections"] != []


def test_parameters(server):
    every = post(server, params=dict(threshold=0)).json()["detections"]
    assert len(every) > 20
    assert len(post(server, params=dict(threshold=0, max_detections=3)).json()["detections"]) == 3
    assert {d["name"] for d in post(server, params=dict(threshold=0, classes="two, six")).json()["detections"]} == {"two", "six"}
    coco = post(server, params=dict(threshold=.4, format="coco")).json()
    first = post(server, params=dict(threshold=.4)).json()["detections"][0]
    x, y, X, Y = first["box"]
    assert coco[0]["category_id"] == httpx.get(f"{server.at}/model").json()["category_ids"][first["label"]]
    assert coco[0]["bbox"] == pytest.approx([x, y, X - x, Y - y], abs=.02)
    raw = httpx.post(f"{server.at}/detect", content=SCENE, headers={"Content-Type": "image/jpeg"}, timeout=60)
    assert raw.json()["detections"] == post(server).json()["detections"]
    raw = httpx.post(f"{server.at}/detect/batch", content=SCENE, headers={"Content-Type": "image/jpeg"}, timeout=60)
    assert raw.json()["results"][0]["detections"] == post(server).json()["detections"]
    jpeg = post(server, headers={"Accept": "image/jpeg"})
    assert Image.open(io.BytesIO(jpeg.content)).size == scene().size
    for bad in (dict(threshold="nan"), dict(threshold=2), dict(threshold="x"), dict(max_detections=0), dict(max_detections=301), dict(classes="zebra"), dict(format="xml")):
        check_error(post(server, params=bad), 422, "parameter")


def test_hostile(server):
    jpg = packed(scene(), "JPEG")
    cases = [(b"", 400), (b"hello world", 415), (jpg[:len(jpg) // 2], 400), (jpg[:10], 415), (packed(Image.new("1", (20000, 9000))), 413),
             (packed(Image.new("1", (40000, 1))), 413), (b"%PDF-1.4", 415), (b"II*\0" + bytes(100), 415), (bytes(10_000), 415)]
    for data, status in cases: check_error(post(server, data), status)
    for p in (b"--x\r\n", b"", b"--x--\r\n"):
        r = httpx.post(f"{server.at}/detect", content=p, headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert 400 <= r.status_code < 500; check_error(r, r.status_code)
    check_error(httpx.post(f"{server.at}/detect", content=b"x", headers={"Content-Type": "multipart/form-data"}), 400)
    check_error(httpx.post(f"{server.at}/detect", content="x", headers={"Content-Type": "text/plain"}), 415, "content_type")
    check_error(httpx.post(f"{server.at}/detect", files=dict(picture=SCENE)), 422, "missing")
    check_error(httpx.post(f"{server.at}/detect", files=dict(image=(None, "/etc/passwd"))), 422, "missing")
    check_error(httpx.post(f"{server.at}/detect", files=[("image", SCENE)] * 2), 422, "too_many_files")
    check_error(httpx.post(f"{server.at}/detect/batch", files=[("image", SCENE)] * 33), 400)
    check_error(httpx.get(f"{server.at}/detect"), 405)
    check_error(httpx.get(f"{server.at}/../../etc/passwd"), 404)
    assert post(server, name="../../evil").json()["image"] == "../../evil" and httpx.get(f"{server.at}/readyz").status_code == 200


def test_base64(server):
    "Data URIs are read; what is not base64 is refused, not skipped over"
    send = lambda x, path="/detect": httpx.post(server.at + path, json=x, timeout=60)
    text = base64.b64encode(SCENE).decode()
    want = post(server).json()["detections"]
    for t in (text, "data:image/jpeg;base64," + text): assert send(dict(image=t)).json()["detections"] == want
    assert [r["detections"] for r in send(dict(image=[text, text]), "/detect/batch").json()["results"]] == [want] * 2
    for bad in ("!!!!aGVsbG8=$$$", "!!!!" + text, "data:image/png;base64", 7, None, [text, 3]): check_error(send(dict(image=bad)), 400, "base64")
    for bad in ({}, [], "x", dict(images=text)): check_error(send(bad), 422, "missing")
    check_error(httpx.post(f"{server.at}/detect", content="[" * 100_000, headers={"Content-Type": "application/json"}), 422, "missing")
    check_error(send(dict(image=[text] * 33), "/detect/batch"), 400); check_error(send(dict(image=[])), 400)
    check_error(send(dict(image=base64.b64encode(b"hello").decode())), 415, "not_an_image")


def test_memory_after_mixed_sizes(server):
    bodies = [packed(Image.effect_noise((37 * k + 1, 900 - 80 * k), 50), "JPEG") for k in range(11)]
    with httpx.Client(timeout=60) as c:
        for k in range(500):
            assert c.post(f"{server.at}/detect", content=bodies[k % 11], headers={"Content-Type": "image/jpeg"}).status_code == 200
            if k == 99: before = rss(server)
    assert rss(server) < before * 1.05


def test_colours(server):
    "Pure red is the same picture in every container"
    red = Image.new("RGB", (64, 64), "red")
    scores = [post(server, packed(red, k, **kw), params=dict(threshold=0, max_detections=1)).json()["detections"][0]["score"]
              for k, kw in [("PNG", {}), ("BMP", {}), ("WEBP", dict(lossless=True)), ("GIF", {})]]
    assert max(scores) - min(scores) < 1e-4


def test_batch_keeps_order_and_neighbours(server):
    files = [("image", (f"{k}.jpg", d)) for k, d in enumerate([SCENE, SCENE[:3000], SCENE, b"text", packed(Image.new("RGB", (9, 5)))])]
    r = httpx.post(f"{server.at}/detect/batch", files=files, timeout=60)
    assert r.status_code == 200
    out = r.json()["results"]
    assert [x.get("error", {}).get("code", "ok") for x in out] == ["ok", "undecodable", "ok", "not_an_image", "ok"]
    assert [x["error"]["image"] if "error" in x else x["image"] for x in out] == [f"{k}.jpg" for k in range(5)]
    assert out[0]["detections"] == out[2]["detections"] and (out[4]["width"], out[4]["height"]) == (9, 5)


def test_a_long_body_without_a_length(server):
    "60 MB in chunks, 20 are allowed: refused, and never held in memory"
    post(server)
    before, at = rss(server), int(server.at.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", at)) as s:
        s.settimeout(60)
        s.sendall(b"POST /detect HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=x\r\nTransfer-Encoding: chunked\r\n\r\n")
        part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        try:
            s.sendall(b"%x\r\n%s\r\n" % (len(part), part))
            for _ in range(60): s.sendall(b"%x\r\n" % 2**20 + bytes(2**20) + b"\r\n")
        except OSError: pass
        try: answer = s.recv(4000)
        except OSError: answer = b""
    assert b" 413 " in answer or not answer, answer  # a reset connection may swallow the answer, the log has it
    assert any('"status": 413' in l for l in server.lines)
    assert rss(server) - before < 30
    with socket.create_connection(("127.0.0.1", at)) as s:                                       # an announced length is enough
        s.sendall(b"POST /detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 60000000\r\n\r\n")
        s.settimeout(60); assert b" 413 " in s.recv(4000)


@pytest.mark.parametrize("n", [200, pytest.param(2400, marks=pytest.mark.slow)])
def test_mutated_images_and_memory(server, n):
    "No 5xx, whatever is flipped, cut or repeated; memory stays"
    rng, seeds = random.Random(n), [d for _, d in kinds() if len(d) < 200_000]
    seen, marks = {}, []
    with httpx.Client(timeout=60) as c:
        for k in range(n):
            b = bytearray(rng.choice(seeds))
            for _ in range(rng.choice([1, 1, 2, 8, 64])):
                i = rng.randrange(len(b))
                what = rng.randrange(4)
                if what == 0: b[i] = rng.randrange(256)
                elif what == 1: b[i] ^= 1 << rng.randrange(8)
                elif what == 2: del b[i:i + rng.randrange(1, 50)]
                else: b[i:i] = b[i:i + 30]
                if not b: b = bytearray(b"x")
            r = c.post(f"{server.at}/detect", files=dict(image=("m", bytes(b))))
            seen[r.status_code] = seen.get(r.status_code, 0) + 1
            assert r.status_code in (200, 400, 413, 415), r.text
            if r.status_code != 200: check_error(r, r.status_code)
            if k % (n // 3) == n // 3 - 1: marks.append(rss(server))
    assert seen.get(200, 0) and seen.get(400, 0), seen
    assert marks[-1] < marks[0] * (1.1 if n < 1000 else 1.05), marks
    print(n, "files:", seen, "MB:", [round(m) for m in marks])


@pytest.mark.slow
def test_memory_over_many_requests(server):
    "10,000 requests of every kind of file, after 1,000 to get there"
    bodies, marks = [d for k, d in kinds() if len(d) < 200_000], []
    with ThreadPoolExecutor(8) as pool, httpx.Client(timeout=60) as c:
        one = lambda k: c.post(f"{server.at}/detect", content=bodies[k % len(bodies)], headers={"Content-Type": "image/png"}).status_code
        for n in (1000, 10_000):
            assert set(pool.map(one, range(n))) == {200}
            marks.append(rss(server))
    assert abs(marks[1] / marks[0] - 1) < .05, marks
    print("MB:", [round(m) for m in marks])


def test_the_models_process_is_killed():
    "The server says so with errors, and ends, so that whoever started it starts it again"
    with running("--weights", TOY, "--threads", 1) as p:
        os.kill(family(p.pid)[1], signal.SIGKILL)
        r = post(p)
        assert r.status_code in (500, 503); check_error(r, r.status_code)
        assert p.wait(30) in (0, -signal.SIGTERM)


def test_documented(server):
    "Every answer has a schema and an example that fits it"
    api = httpx.get(f"{server.at}/openapi.json").json()
    for path in ("/detect", "/detect/batch"):
        op = api["paths"][path]["post"]
        assert {"400", "401", "408", "413", "415", "422", "500", "503", "504"} <= set(op["responses"])
        assert "multipart/form-data" in op["requestBody"]["content"] and op["responses"]["200"]["content"]["application/json"]["example"]
        for k, v in op["responses"].items():
            if k != "200": assert v["content"]["application/json"]["schema"]["$ref"].endswith("/Error") and {"code", "message"} <= set(v["content"]["application/json"]["example"]["error"])
        assert {"multipart/form-data", "image/*", "application/json"} == set(op["requestBody"]["content"])
    for path in ("/healthz", "/readyz", "/model", "/metrics", "/"): assert httpx.get(server.at + path).status_code == 200, path


def test_metrics_and_log(server):
    r = post(server, headers={"X-Request-ID": "abc-1"})
    assert r.headers["x-request-id"] == "abc-1" and len(post(server, headers={"X-Request-ID": "a b\\"}).headers["x-request-id"]) == 32
    httpx.get(f"{server.at}/nothing/{'x' * 50}")
    text = httpx.get(f"{server.at}/metrics").text
    assert 'rtdetr_requests_total{route="/detect",status="200"}' in text and "nothing" not in text
    for k in ("decode", "queue", "infer", "encode"): assert f'rtdetr_stage_seconds_count{{stage="{k}"}}' in text
    assert "rtdetr_images_in_house 0.0" in text
    time.sleep(.2)
    assert next(json.loads(l) for l in server.lines if '"abc-1"' in l)["status"] == 200


def test_token_reload_and_stop(tmp_path):
    "The command with other weights: a token, a limit, SIGHUP while requests run, SIGTERM with one in flight"
    own = tmp_path / "own.safetensors"
    own.write_bytes(TOY.read_bytes())
    with running("--weights", own, "--threads", 1, "--token", "secret", "--max-body", 200_000, "--threshold", .9) as p:
        key = dict(headers={"Authorization": "Bearer secret"})
        check_error(post(p), 401, "token"); check_error(post(p, headers={"Authorization": "Bearer secreT"}), 401, "token")
        check_error(httpx.get(f"{p.at}/model"), 401)
        check_error(post(p, bytes(300_000), **key), 413, "too_many_bytes")
        assert all(d["score"] >= .9 for d in post(p, **key).json()["detections"])                # the server's own threshold
        assert any(d["score"] < .9 for d in post(p, params=dict(threshold=.1), **key).json()["detections"])
        before = httpx.get(f"{p.at}/model", **key).json()["fingerprint"]
        from safetensors.torch import load_file, save_file
        from safetensors import safe_open
        state = load_file(own)
        with safe_open(own, "pt") as f: about = f.metadata()
        state["decoder.enc_output.0.weight"] = state["decoder.enc_output.0.weight"] * 1.25
        save_file(state, own, about)
        with ThreadPoolExecutor(3) as pool:
            hits = [pool.submit(post, p, **key) for _ in range(30)]
            p.send_signal(signal.SIGHUP)
            assert {h.result().status_code for h in hits} == {200}
        for _ in range(300):
            if httpx.get(f"{p.at}/model", **key).json()["fingerprint"] != before: break
            time.sleep(.1)
        else: pytest.fail("the new weights are not served")
        own.write_bytes(b"damaged"); p.send_signal(signal.SIGHUP)
        for _ in range(300):
            if any("reload refused" in l for l in p.lines): break
            time.sleep(.1)
        else: pytest.fail("nothing was said about damaged weights")
        assert post(p, **key).status_code == 200
        with ThreadPoolExecutor(4) as pool:
            hits = [pool.submit(httpx.post, f"{p.at}/detect/batch", files=[("image", SCENE)] * 8, timeout=60, **key) for _ in range(4)]
            for _ in range(200):
                if "rtdetr_images_in_house 0.0" not in httpx.get(f"{p.at}/metrics", **key).text: break
            p.terminate()
            done = [h for h in hits if not h.exception()]
        assert done and {h.result().status_code for h in done} == {200}                          # what was in flight is finished
        assert p.wait(60) in (0, -signal.SIGTERM) and not any("Traceback" in l for l in p.lines)


MOODY = '''
"A server of a model with moods: the first pixel's red says which"
import sys, time
import numpy as np, uvicorn
from rtdetr_kd.deploy.runner import Runner
from rtdetr_kd.serve.batching import Limits
from rtdetr_kd.serve.app import create_app
def call(f):
    mood = int(f["images"][:, 0, 0, 0].max())
    if mood == 200: time.sleep(3)
    if mood == 100: raise RuntimeError("secret of the house")
    n = len(f["images"])
    return dict(scores=np.float32([[.9, np.nan if mood == 50 else .8]] * n), labels=np.zeros((n, 2), int), boxes=np.float32([[[.985, .4, 1.085, .6], [0, 0, 1, 1]]] * n))
about = dict(names=["bolt"], category_ids=[3], size=16, weights="w", precision="fp32", post="fractions")
app = create_app(Runner(call, about, "test", "fp32"), Limits(room=20, batch=10, seconds=20))
uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
'''


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    f = tmp_path_factory.mktemp("moody") / "moody.py"
    f.write_text(MOODY)
    with running(script=f) as p: yield p


def mood(k): return packed(Image.new("RGB", (100, 50), (k, 0, 0)))


def test_a_models_own_faults(moody):
    check_error(post(moody, mood(100)), 500, "fault")
    assert "secret" not in post(moody, mood(100)).text
    a = post(moody, mood(50)).json()["detections"]
    assert len(a) == 1 and a[0]["name"] == "bolt" and a[0]["box"] == [98.5, 20, 100, 30]          # no NaN, nothing outside
    assert "rtdetr_nonfinite_total 1.0" in httpx.get(f"{moody.at}/metrics").text


def test_busy(moody):
    "A slow model: health answers at once, what is too much is told to come back, who leaves frees the place"
    with ThreadPoolExecutor(26) as pool:
        slow = [pool.submit(post, moody, mood(200)) for _ in range(26)]
        time.sleep(1.5)
        took = []
        for _ in range(10):
            t = time.perf_counter(); assert httpx.get(f"{moody.at}/healthz").status_code == 200; took.append(time.perf_counter() - t)
        rs = [f.result() for f in slow]
    assert sorted(took)[5] < .2, took
    busy = [r for r in rs if r.status_code == 503]
    assert len(busy) == 6 and all(r.headers["retry-after"] == "1" for r in busy)
    assert [r.status_code for r in rs].count(200) == 20
    for r in busy: check_error(r, 503, "busy")
    for _ in range(12):
        try: httpx.post(f"{moody.at}/detect", files=dict(image=mood(200)), timeout=.3)
        except httpx.TimeoutException: pass
    for _ in range(100):
        text = httpx.get(f"{moody.at}/metrics").text
        if "rtdetr_images_in_house 0.0" in text: break
        time.sleep(.1)
    assert "rtdetr_images_in_house 0.0" in text
    t = time.perf_counter(); assert post(moody, mood(0)).status_code == 200
    assert time.perf_counter() - t < 9                                                         # not behind twelve pictures of 3 s


def test_alive_before_it_is_ready():
    "While the model warms up, the process answers, and says that it is not ready; a time limit is kept; then SIGTERM's way out"
    from fastapi.testclient import TestClient
    from rtdetr_kd.deploy.runner import Runner
    from rtdetr_kd.serve.batching import Limits
    from rtdetr_kd.serve.app import create_app
    go, about = threading.Event(), dict(names=["a", "b"], category_ids=[1, 2], size=16, weights="w", precision="fp32", post="fractions")
    def call(f):
        go.wait(); n = len(f["images"])
        return dict(scores=np.full((n, 1), .9, np.float32), labels=np.ones((n, 1), int), boxes=np.tile(np.float32([0, 0, 1, 1]), (n, 1, 1)))
    with TestClient(create_app(Runner(call, about, "test", "fp32"), Limits(seconds=.5))) as c:
        send = lambda: c.post("/detect", files=dict(image=mood(0)))
        assert c.get("/healthz").status_code == 200
        for r in (c.get("/readyz"), send()): check_error(r, 503, "not_ready"); assert r.headers["retry-after"] == "1"
        go.set()
        for _ in range(300):
            if c.get("/readyz").status_code == 200: break
            time.sleep(.02)
        assert [d["name"] for d in send().json()["detections"]] == ["b"]                          # the model's own names
        go.clear(); check_error(send(), 504, "timeout"); go.set()


class Payload:
    def __reduce__(self): return (os.system, ("touch /tmp/rtdetr_kd_payload_ran",))


@pytest.mark.parametrize("words, says", [("nope.onnx", "no such model file"), ("a.txt", "a model file ends in"), ("{dir}/bad.onnx", "is no"), ("{dir}/evil.pth", "a model file ends in"),
                                         ("{dir}/evil.safetensors", "."), ("{dir}/a.engine", "TensorRT is not installed|GPU|build it again")])
def test_what_cannot_be_served(tmp_path, words, says):
    from rtdetr_kd.serve.app import main
    (tmp_path / "bad.onnx").write_bytes(b"bad"); (tmp_path / "a.engine").write_bytes(b"bad")
    for name in ("evil.pth", "evil.safetensors"): (tmp_path / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(SystemExit, match=says) as e: main(["--port", "0", "--threads", "1", "--weights", words.format(dir=tmp_path)])
    assert str(e.value).startswith("Stopped: ") and not Path("/tmp/rtdetr_kd_payload_ran").exists()


def test_a_port_that_is_taken(capsys):
    from rtdetr_kd.serve.app import main
    with socket.create_server(("127.0.0.1", 0)) as s:
        with pytest.raises(SystemExit, match="Stopped: .* another --port"): main(["--port", str(s.getsockname()[1])])


@pytest.mark.parametrize("kind", ["xml", pytest.param("int8.onnx", marks=pytest.mark.slow), pytest.param("int8.xml", marks=pytest.mark.slow)])
def test_other_runtimes(tmp_path, kind):
    "OpenVINO and eight bits behind the same server find what the embedded student finds"
    pytest.importorskip("openvino"); pytest.importorskip("onnx")
    from fastapi.testclient import TestClient
    from rtdetr_kd.serve.apart import open_served
    from rtdetr_kd.deploy.export import write_openvino
    from rtdetr_kd.deploy.verify import overlaps
    from rtdetr_kd.serve.app import create_app
    if kind == "xml": path = write_openvino(ONNX, tmp_path / "m.xml")
    else:
        from rtdetr_kd.data.dataset import load_data
        from rtdetr_kd.deploy.calibrate import calibrate
        from rtdetr_kd.deploy.quantize import write_int8
        path = write_int8(ONNX, tmp_path / f"m.{kind[5:]}", calibrate(ONNX, load_data("toy")["select"], 32), "openvino" if kind == "int8.xml" else "onnxruntime")
    def found(path):
        with TestClient(create_app(open_served(path, copies=2, threads=1))) as c:
            while c.get("/readyz").status_code != 200: time.sleep(.05)
            assert c.get("/model").json()["precision"].startswith("int8" if "int8" in kind and path != ONNX else "fp32")
            with ThreadPoolExecutor(4) as pool: rs = list(pool.map(lambda _: c.post("/detect", files=dict(image=SCENE)), range(8)))
            return [r.json()["detections"] for r in rs][-1]
    a, b = found(ONNX), found(path)
    near = overlaps(np.float32([d["box"] for d in a]), np.float32([d["box"] for d in b]))
    assert all(near[i].max() > (.8 if "int8" in kind else .99) and a[i]["name"] == b[near[i].argmax()]["name"] for i in range(len(a)) if a[i]["score"] > .5)


def test_container():
    "What the Dockerfile copies is there, and the command it gives is one; compose is YAML that says the same"
    import shlex, yaml
    from rtdetr_kd.serve.app import EMBEDDED, arguments
    lines = [l.split(maxsplit=1) for l in (ROOT / "Dockerfile").read_text().splitlines() if l and l[0] != "#"]
    copied = [f for k, v in lines if k == "COPY" for f in shlex.split(v)[:-1]]
    assert all((ROOT / f).exists() for f in copied) and str(EMBEDDED.relative_to(ROOT)) in copied
    assert not set(copied) & set((ROOT / ".dockerignore").read_text().split())
    keys = {k: v for k, v in lines}
    assert arguments(json.loads(keys["CMD"])).host == "0.0.0.0" and keys["USER"] == "serve" and "/readyz" in keys["HEALTHCHECK"]
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["rtdetr_kd"]
    assert service["build"] == "." and service["read_only"] and service["ports"] == ["127.0.0.1:8000:8000"]


def test_by_schema(server, tmp_path):
    "schemathesis makes requests out of the OpenAPI document: nothing it thinks of is answered by 5xx or undocumented"
    pytest.importorskip("schemathesis")
    exe = Path(sys.executable).with_name("schemathesis")
    r = subprocess.run([exe, "run", f"{server.at}/openapi.json", "--max-examples", "25", "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
                        "--phases", "examples,coverage,fuzzing", "--seed", "1", "--no-color"], cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert r.returncode == 0, r.stdout[-5000:] + r.stderr[-1000:]
