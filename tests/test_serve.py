"The server as a process of its own, with what the world sends it"
import base64, io, json, os, pickle, random, re, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
ROOT = Path(__file__).resolve().parent.parent
SCENE = (ROOT / "figures/scene.jpg").read_bytes()
TOY = ROOT / "weights/toy_student.safetensors"
ONNX = ROOT / "weights/toy_student.onnx"  # what is served without --weights


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def running(*words, script=None):
    "A server process, ready; asked to stop at the end"
    port = free_port()
    command = ["-m", "rtdetr_kd.serve", "--port", str(port), *map(str, words)]
    run = [sys.executable, *([script, str(port)] if script else command)]
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


def family(pid):
    "A process and its children"
    threads = Path(f"/proc/{pid}/task").glob("*/children")  # a child belongs to the thread that started it
    return [pid, *(int(c) for t in threads for c in t.read_text().split())]


def rss(p):
    "MB of a process and its children"
    def kilobytes(pid):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(l for l in lines if l.startswith("VmRSS")).split()[1])
    return sum(map(kilobytes, family(p.pid))) / 1024


def until(f, what, seconds=300):  # a busy machine takes long to start a process
    "Wait until `f()` is true"
    end = time.monotonic() + seconds
    while not f():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(.1)


def post(p, data=SCENE, name="a.jpg", path="/detect", **kw):
    return httpx.post(p.at + path, files=dict(image=(name, data)), timeout=120, **kw)


def check_error(r, status, code=None):
    assert r.status_code == status, r.text
    e = r.json()
    assert set(e) == {"error"}
    assert set(e["error"]) == {"code", "message", "image"}
    assert e["error"]["message"]
    assert "Traceback" not in r.text
    assert ".py" not in r.text
    if code: assert e["error"]["code"] == code


def packed(im, kind="PNG", **kw):
    b = io.BytesIO()
    im.save(b, kind, **kw)
    return b.getvalue()


def scene(): return Image.open(io.BytesIO(SCENE)).convert("RGB")


def kinds():
    "A file of every kind: name, bytes"
    im, exif = scene(), Image.Exif()
    exif[0x0112] = 6
    clear = im.convert("P")
    clear.info["transparency"] = 0
    yield "rgb.png", packed(im)
    yield "plain.jpg", packed(im, "JPEG")
    yield "turned.jpg", packed(im, "JPEG", exif=exif)
    yield "webp.webp", packed(im, "WEBP", lossless=True)
    yield "bmp.bmp", packed(im, "BMP")
    yield "cmyk.jpg", packed(im.convert("CMYK"), "JPEG")
    yield "grey16.png", packed(Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257))
    yield "grey.png", packed(im.convert("L"))
    yield "alpha.png", packed(im.convert("RGBA"))
    yield "palette.png", packed(clear, transparency=0)
    yield "la.png", packed(im.convert("LA"))
    yield "bit.png", packed(im.convert("1"))
    yield "moving.gif", packed(im, "GIF", save_all=True, append_images=[Image.new("RGB", im.size, "red")])
    yield "scan.tif", packed(im, "TIFF", compression="tiff_lzw")
    if features.check("avif"): yield "phone.avif", packed(im, "AVIF")
    yield "one.png", packed(Image.new("RGB", (1, 1)))
    yield "line.png", packed(Image.new("RGB", (1, 20000), "red"))


@pytest.mark.parametrize("name, data", list(kinds()), ids=[k for k, _ in kinds()])
def test_the_same_as_detect(server, tmp_path, name, data):
    "Every kind of file gives over HTTP what `RTDETR.detect` gives for it, in pixels of the picture as a person sees it"
    from rtdetr_kd.model.weights import load_model
    (tmp_path / name).write_bytes(data)
    want = load_model(TOY).detect(tmp_path / name, threshold=.4)
    r = post(server, data, name, params=dict(threshold=.4))
    assert r.status_code == 200, r.text
    a = r.json()
    assert a["image"] == name
    assert (a["height"], a["width"]) == want.image.shape[:2]
    assert a["orientation"] == (6 if name == "turned.jpg" else 1)
    assert [d["name"] for d in a["detections"]] == want.names
    if want.names:
        np.testing.assert_allclose([d["box"] for d in a["detections"]], want.boxes.clip(0), atol=.05)
        np.testing.assert_allclose([d["score"] for d in a["detections"]], want.scores, atol=1e-3)


def test_the_embedded_student():
    "What is served without --weights is the shipped student"
    from rtdetr_kd.deploy.open import open_model
    mark = lambda path: open_model(path, threads=1).about["weights"]
    told = f"{ONNX.name} is not the export of {TOY.name}: write it again, as in the Makefile's results"
    assert mark(ONNX) == mark(TOY), told


def test_the_seeds_command(server):
    run = ["curl", "-s", "-X", "POST", f"{server.at}/detect", "-F", f"image=@{ROOT}/figures/scene.jpg"]
    r = subprocess.run(run, capture_output=True, text=True)
    assert json.loads(r.stdout)["detections"] == post(server).json()["detections"] != []


def found(server, **params): return post(server, params=params).json()["detections"]


def test_parameters(server):
    assert len(found(server, threshold=0)) > 20
    assert len(found(server, threshold=0, max_detections=3)) == 3
    assert {d["name"] for d in found(server, threshold=0, classes="two, six")} == {"two", "six"}


def test_coco_rows(server):
    coco = post(server, params=dict(threshold=.4, format="coco")).json()
    first = found(server, threshold=.4)[0]
    x, y, X, Y = first["box"]
    assert coco[0]["category_id"] == httpx.get(f"{server.at}/model").json()["category_ids"][first["label"]]
    assert coco[0]["bbox"] == pytest.approx([x, y, X - x, Y - y], abs=.02)
    assert {r["image_id"] for r in coco} == {1}


def test_coco_rows_are_numbered(server):
    "1 to n, or from the parameter on; COCO's own reader takes them, which refuses names"
    files = [("image", (f"{k}.jpg", SCENE)) for k in range(3)]
    def numbers(**more):
        r = httpx.post(f"{server.at}/detect/batch", files=files, params=dict(format="coco", **more), timeout=60)
        return [rows[0]["image_id"] for rows in r.json()["results"]]
    assert numbers() == [1, 2, 3]
    assert numbers(image_id=139) == [139, 140, 141]
    check_error(post(server, params=dict(format="coco", image_id="a.jpg")), 422, "parameter")


def test_bare_bytes_and_a_picture_back(server):
    def raw(path):
        return httpx.post(server.at + path, content=SCENE, headers={"Content-Type": "image/jpeg"}, timeout=60).json()
    assert raw("/detect")["detections"] == found(server)
    assert raw("/detect/batch")["results"][0]["detections"] == found(server)
    jpeg = post(server, headers={"Accept": "image/jpeg"})
    assert Image.open(io.BytesIO(jpeg.content)).size == scene().size


@pytest.mark.parametrize("name, value", [("threshold", "nan"), ("threshold", 2), ("threshold", "x"), ("format", "xml"),
                                         ("max_detections", 0), ("max_detections", 301), ("classes", "zebra"),
                                         ("treshold", .9), ("threshold", [.9, .1])])
def test_bad_parameters(server, name, value):
    check_error(post(server, params={name: value}), 422, "parameter")


def test_a_misspelt_parameter_is_named(server):
    said = post(server, params=dict(treshold=.9)).json()["error"]["message"]
    assert "did you mean 'threshold'" in said


def test_a_name_in_the_extended_spelling_is_a_file(server):
    "`filename*=` alone, as some clients send it, and a picture larger than what a text field may be"
    from PIL import Image as I
    noise = packed(I.effect_noise((1200, 1200), 90))
    assert len(noise) > 1_100_000
    for data in (SCENE, noise):
        head = b"--xyz\r\nContent-Disposition: form-data; name=\"image\"; filename*=UTF-8''a%20b.jpg\r\n\r\n"
        r = httpx.post(f"{server.at}/detect", content=head + data + b"\r\n--xyz--\r\n", timeout=120,
                       headers={"Content-Type": "multipart/form-data; boundary=xyz"})
        assert r.status_code == 200 and r.json()["image"] == "a b.jpg"


@pytest.mark.parametrize("kind", ["pth", "folder"])
def test_weights_from_elsewhere_are_served(tmp_path, kind):
    "An official checkpoint and a Hugging Face folder, as --weights promises"
    import torch
    from rtdetr_kd.model.detector import RTDETR, Spec
    from rtdetr_kd.model.foreign_weights import save_huggingface
    from rtdetr_kd.serve.worker_process import open_served
    torch.manual_seed(0)
    m = RTDETR(Spec(["x", "y"], width=16, d=64, d_ff=64, expansion=.5, layers=2, image_size=640)).eval()
    if kind == "folder": save_huggingface(m, path := tmp_path / "theirs")
    else: torch.save(dict(model=m.state_dict()), path := tmp_path / "x.pth")
    r = open_served(path, threads=1)
    assert (r.size, len(r.names), r.backend) == (640, 2, "torch-cpu")
    x = np.random.default_rng(0).integers(0, 255, (1, 640, 640, 3), np.uint8)
    from rtdetr_kd.deploy.runner import run_torch
    assert np.abs(r(x)[0] - run_torch(m)(x)[0]).max() < 1e-5


def hostile_files():
    "What is no picture, or too large a one: bytes, status"
    jpg = packed(scene(), "JPEG")
    yield b"", 400
    yield b"hello world", 415
    yield jpg[:len(jpg) // 2], 400
    yield jpg[:10], 415
    yield packed(Image.new("1", (20000, 9000))), 413
    yield packed(Image.new("1", (40000, 1))), 413
    yield b"%PDF-1.4", 415
    yield b"II*\0" + bytes(100), 415
    yield bytes([0, 0, 0, 24]) + b"ftypheic" + bytes(100), 415
    yield packed(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), 400
    yield bytes(10_000), 415


def test_hostile_files(server):
    for data, status in hostile_files(): check_error(post(server, data), status)


def test_a_phones_format_is_named(server):
    said = post(server, bytes([0, 0, 0, 24]) + b"ftypheic" + bytes(100)).json()["error"]["message"]
    assert "HEIC" in said and "JPEG" in said


def scan_bomb():
    "184 kB that would keep a thread busy for a minute"
    d = packed(Image.effect_noise((2000, 2000), 0).convert("L"), "JPEG", progressive=True)
    return d[:-2] + d[d.rindex(b"\xff\xda"):-2] * 12_000 + b"\xff\xd9"


def test_a_jpeg_that_repeats_its_last_scan(server):
    "Refused at once, in both places at a time"
    d = scan_bomb()
    start = time.perf_counter()
    with ThreadPoolExecutor(4) as pool: answers = list(pool.map(lambda _: post(server, d), range(4)))
    for r in answers: check_error(r, 413, "too_many_scans")
    assert time.perf_counter() - start < 20
    assert post(server).status_code == 200


def test_a_progressive_jpeg_is_fine(server):
    r = post(server, packed(scene(), "JPEG", progressive=True, quality=95))
    assert r.status_code == 200


def test_hostile_requests(server):
    send = lambda path="/detect", **kw: httpx.post(server.at + path, timeout=60, **kw)
    for p in (b"--x\r\n", b"", b"--x--\r\n"):
        r = send(content=p, headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert 400 <= r.status_code < 500
        check_error(r, r.status_code)
    check_error(send(content=b"x", headers={"Content-Type": "multipart/form-data"}), 400)
    check_error(send(content="x", headers={"Content-Type": "text/plain"}), 415, "content_type")
    check_error(send(files=dict(picture=SCENE)), 422, "missing")
    check_error(send(files=dict(image=(None, "/etc/passwd"))), 422, "missing")
    check_error(send(files=[("image", SCENE)] * 2), 422, "too_many_files")
    check_error(send("/detect/batch", files=[("image", SCENE)] * 33), 400, "too_many_files")
    check_error(httpx.get(f"{server.at}/detect"), 405)
    check_error(httpx.get(f"{server.at}/../../etc/passwd"), 404)
    assert post(server, name="../../evil").json()["image"] == "../../evil"
    assert httpx.get(f"{server.at}/readyz").status_code == 200


def test_base64(server):
    "Data URIs are read; what is not base64 is refused, not skipped over"
    send = lambda x, path="/detect": httpx.post(server.at + path, json=x, timeout=60)
    text, want = base64.b64encode(SCENE).decode(), found(server)
    for t in (text, "data:image/jpeg;base64," + text): assert send(dict(image=t)).json()["detections"] == want
    assert [r["detections"] for r in send(dict(image=[text, text]), "/detect/batch").json()["results"]] == [want] * 2
    for bad in ("!!!!aGVsbG8=$$$", "!!!!" + text, "data:image/png;base64", 7, None, [text, 3]):
        check_error(send(dict(image=bad)), 400, "base64")
    for bad in ({}, [], "x", dict(images=text)): check_error(send(bad), 422, "missing")
    deep = httpx.post(f"{server.at}/detect", content="[" * 100_000, headers={"Content-Type": "application/json"})
    check_error(deep, 422, "missing")
    check_error(send(dict(image=[text] * 33), "/detect/batch"), 400, "too_many_files")
    check_error(send(dict(image=[])), 400)
    check_error(send(dict(image=base64.b64encode(b"hello").decode())), 415, "not_an_image")


def raw(server, data, wait=60):
    "Bytes to the server; what comes back until it closes the connection"
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=wait) as s:
        try: s.sendall(data)
        except OSError: pass                                               # closed while we were sending
        try: return b"".join(iter(lambda: s.recv(65536), b""))
        except ConnectionResetError: return b"reset"


def post_head(*lines, length=len(SCENE)):
    own = [b"POST /detect HTTP/1.1", b"Host: a", b"Content-Type: image/jpeg", b"Content-Length: %d" % length, *lines]
    return b"\r\n".join(own) + b"\r\n\r\n"


@pytest.mark.parametrize("to", [b"h2c", b"websocket"])
def test_a_body_with_an_upgrade(server, to):
    "Java's own client asks for h2c first: its picture is answered all the same; nobody hangs"
    head = post_head(b"Connection: close, Upgrade, HTTP2-Settings", b"Upgrade: " + to, b"HTTP2-Settings: AAMAAABkAAQ")
    answer = raw(server, head + SCENE)
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
    assert json.loads(answer.split(b"\r\n\r\n")[1])["detections"] == found(server)
    socket_of_pages = (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
                       b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
    assert raw(server, socket_of_pages).startswith(b"HTTP/1.1 200")


def test_headers_without_an_end(server):
    "20 MB of one header, and 200,000 headers: refused when 16 kB are here, long before the rest"
    start, before = time.perf_counter(), rss(server)
    many = b"".join(b"X-%d: a\r\n" % k for k in range(200_000))
    for data in (b"X-A: " + 20_000_000 * b"a", many):
        answer = raw(server, b"GET /detect HTTP/1.1\r\nHost: a\r\n" + data)
        assert answer == b"reset" or answer.startswith(b"HTTP/1.1 400"), answer[:200]
    assert time.perf_counter() - start < 10
    assert rss(server) - before < 10
    middle = raw(server, b"GET /model HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-A: " + 15_900 * b"a" + b"\r\n\r\n")
    assert middle.startswith(b"HTTP/1.1 200")
    assert raw(server, b"GET /" + 17_000 * b"a" + b" HTTP/1.1\r\nHost: a\r\n\r\n")[9:12] in (b"400", b"431")


def test_json_does_not_hold_the_others_up(server):
    "19 MB of brackets took the event loop eight seconds"
    body = b'{"a":' + b"[" + b"[]," * 6_300_000 + b"[]]}"
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(httpx.post, f"{server.at}/detect", content=body, timeout=60,
                           headers={"Content-Type": "application/json"})
        took = []
        while not slow.done(): took.append(health(server))
    check_error(slow.result(), 422, "missing")
    assert max(took) < 1, max(took)


def test_slow_and_idle_sockets_take_no_room(server):
    "80 bodies that never come and 300 sockets that say nothing, with room for 64: everybody else is answered"
    begun = post_head() + SCENE[:100]
    with ExitStack() as open_ones:
        connect = lambda: open_ones.enter_context(socket.create_connection(("127.0.0.1", port_of(server)), timeout=60))
        for _ in range(300): connect()
        for _ in range(80): connect().sendall(begun)
        until(lambda: metric(server, "rtdetr_images_in_house") == 0, "an empty house")
        assert [post(server).status_code for _ in range(5)] == [200] * 5
        assert httpx.get(f"{server.at}/readyz").status_code == 200


def test_all_of_it_at_once(tmp_path):
    "The pair of bombs, 64 slow sockets, 300 idle ones and twelve reloads: ordinary requests are answered meanwhile"
    weights, bomb = tmp_path / "own.onnx", scan_bomb()
    weights.write_bytes(ONNX.read_bytes())
    with running("--threads", 1, "--weights", weights) as p, ExitStack() as open_ones, ThreadPoolExecutor(4) as pool:
        connect = lambda: open_ones.enter_context(socket.create_connection(("127.0.0.1", port_of(p)), timeout=60))
        for _ in range(300): connect()
        for _ in range(64): connect().sendall(post_head() + SCENE[:100])
        bombs, took = [], []
        for k in range(12):
            bombs += [pool.submit(post, p, bomb) for _ in range(2)]
            p.send_signal(signal.SIGHUP)
            start = time.perf_counter()
            assert post(p).status_code == 200
            took.append(time.perf_counter() - start)
        assert {b.result().status_code for b in bombs} == {413}
        assert sorted(took)[6] < 2, took
        until(lambda: any('"reloaded"' in l for l in p.lines), "a reload")
        assert httpx.get(f"{p.at}/readyz").status_code == 200
        assert len(family(p.pid)) == 1                                     # ONNX Runtime needs no process of its own


def metric(p, name):
    text = httpx.get(f"{p.at}/metrics").text
    return float(next(l for l in text.splitlines() if l.startswith(name + " ")).split()[1])


def test_what_is_refused_early_closes(server):
    "Who announces 60 MB is told and not listened to"
    answer = raw(server, post_head(length=60_000_000))                      # returns, so it was closed
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()


def test_head_is_get_without_a_body(server):
    for path in ("/", "/healthz", "/readyz", "/model", "/metrics", "/openapi.json"):
        r = httpx.head(server.at + path)
        assert (r.status_code, r.content) == (200, b""), path
    assert httpx.head(f"{server.at}/detect").status_code == 405


def test_a_picture_is_sent_to_whoever_wants_one(server):
    kind = lambda accept: post(server, headers=dict(Accept=accept)).headers["content-type"]
    for accept in ("image/jpeg", "image/*", "application/json;q=0.1, image/jpeg"): assert kind(accept) == "image/jpeg"
    for accept in ("*/*", "image/jpeg;q=0", "application/json", "text/html, image/webp, */*"):
        assert kind(accept) == "application/json"


def test_a_sixteen_bit_png_of_many_pixels(server):
    "77 kB that unfold into 38 million values of 16 bits took 984 MB; now an RGB copy is the largest thing"
    data = packed(Image.fromarray(np.zeros((6200, 6200), np.uint16)))
    assert len(data) < 100_000
    peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())[1]) / 1024
    before = rss(server)
    assert post(server, data).status_code == 200
    assert peak() - before < 450, (peak(), before)


def test_a_containers_quota(tmp_path):
    "`docker run --cpus 1.5` leaves every core in sight"
    from rtdetr_kd.serve.batching import usable_cores
    (tmp_path / "cpu.max").write_text("max 100000")
    seen = usable_cores(tmp_path)
    assert seen == len(os.sched_getaffinity(0))
    for text, cores in (("50000 100000", 1), ("150000 100000", min(2, seen)), ("6400000 100000", seen)):
        (tmp_path / "cpu.max").write_text(text)
        assert usable_cores(tmp_path) == cores


def test_pixels_in_flight(monkeypatch):
    "Two large pictures are not decoded at the same time; a small one passes"
    from rtdetr_kd.serve import batching
    budget, most, go = batching.Budget(50_000), [], threading.Event()
    def slow(im, data, **how):
        most.append(budget.used)
        if im.width == 200: go.wait(30)
        return np.zeros((im.height, im.width, 3), np.uint8)
    monkeypatch.setattr(batching, "pixels_of", slow)
    large, small = (packed(Image.new("L", (w, w))) for w in (200, 50))
    with ThreadPoolExecutor(4) as pool:
        one = lambda d: pool.submit(batching.prepare_image, "a", d, batching.Limits(), 16, budget)
        jobs = [one(d) for d in (large, large, small)]
        assert jobs[2].result(30)[1].width == 50
        go.set()
        assert [j.result(30)[1].width for j in jobs] == [200, 200, 50]
    assert max(most) <= 42_500                                             # one large, one small


def test_memory_after_mixed_sizes(server):
    bodies = [packed(Image.effect_noise((37 * k + 1, 900 - 80 * k), 50), "JPEG") for k in range(11)]
    kind = {"Content-Type": "image/jpeg"}
    with httpx.Client(timeout=60) as c:
        for k in range(300):
            assert c.post(f"{server.at}/detect", content=bodies[k % 11], headers=kind).status_code == 200
            if k == 99: before = rss(server)
    assert rss(server) < before * 1.05


def test_colours(server):
    "Pure red is the same picture in every container"
    red = Image.new("RGB", (64, 64), "red")
    def score(kind, **kw):
        return post(server, packed(red, kind, **kw), params=dict(threshold=0)).json()["detections"][0]["score"]
    scores = [score("PNG"), score("BMP"), score("WEBP", lossless=True), score("GIF")]
    assert max(scores) - min(scores) < 1e-4


def test_batch_keeps_order_and_neighbours(server):
    sent = [SCENE, SCENE[:3000], SCENE, b"text", packed(Image.new("RGB", (9, 5)))]
    files = [("image", (f"{k}.jpg", d)) for k, d in enumerate(sent)]
    r = httpx.post(f"{server.at}/detect/batch", files=files, timeout=60)
    assert r.status_code == 200
    out = r.json()["results"]
    assert [x.get("error", {}).get("code", "ok") for x in out] == ["ok", "undecodable", "ok", "not_an_image", "ok"]
    assert [x.get("error", x)["image"] for x in out] == [f"{k}.jpg" for k in range(5)]
    assert out[0]["detections"] == out[2]["detections"]
    assert (out[4]["width"], out[4]["height"]) == (9, 5)


CHUNKED = (b"POST /detect HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=x\r\n"
           b"Transfer-Encoding: chunked\r\n\r\n")
ANNOUNCED = b"POST /detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 60000000\r\n\r\n"


def port_of(server): return int(server.at.rsplit(":", 1)[1])


def test_a_long_body_without_a_length(server):
    "60 MB in chunks, 20 are allowed: refused, and never held in memory"
    post(server)
    before = rss(server)
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=60) as s:
        s.sendall(CHUNKED)
        try:
            s.sendall(b"%x\r\n%s\r\n" % (len(part), part))
            for _ in range(60): s.sendall(b"%x\r\n" % 2**20 + bytes(2**20) + b"\r\n")
        except OSError: pass
        try: answer = s.recv(4000)
        except OSError: answer = b""
    assert b" 413 " in answer or not answer, answer  # a reset connection may swallow the answer, the log has it
    until(lambda: any('"status": 413' in l for l in server.lines), "a line in the log")
    assert rss(server) - before < 30


def test_a_long_body_that_is_announced(server):
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=60) as s:
        s.sendall(ANNOUNCED)
        assert b" 413 " in s.recv(4000)


def mutated(rng, seed):
    "A file with bytes changed, flipped, cut out or repeated"
    b = bytearray(seed)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        i = rng.randrange(len(b))
        what = rng.randrange(4)
        if what == 0: b[i] = rng.randrange(256)
        elif what == 1: b[i] ^= 1 << rng.randrange(8)
        elif what == 2: del b[i:i + rng.randrange(1, 50)]
        else: b[i:i] = b[i:i + 30]
        if not b: b = bytearray(b"x")
    return bytes(b)


@pytest.mark.parametrize("n", [200, pytest.param(2400, marks=pytest.mark.slow)])
def test_mutated_images_and_memory(server, n):
    "No 5xx, whatever is flipped, cut or repeated; memory stays"
    rng, seeds = random.Random(n), [d for _, d in kinds() if len(d) < 200_000]
    seen, marks = {}, []
    with httpx.Client(timeout=60) as c:
        for k in range(n):
            r = c.post(f"{server.at}/detect", files=dict(image=("m", mutated(rng, rng.choice(seeds)))))
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
    bodies, marks, kind = [d for _, d in kinds() if len(d) < 200_000], [], {"Content-Type": "image/png"}
    with ThreadPoolExecutor(8) as pool, httpx.Client(timeout=60) as c:
        def one(k): return c.post(f"{server.at}/detect", content=bodies[k % len(bodies)], headers=kind).status_code
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
        assert r.status_code in (500, 503)
        check_error(r, r.status_code)
        assert p.wait(30) in (0, -signal.SIGTERM)


ORPHAN = """
import time
from rtdetr_kd.serve.worker_process import WorkerProcess
w = WorkerProcess()
print(w.process.pid, flush=True)
time.sleep(600)
"""


def test_a_models_process_ends_with_its_server():
    "Also with one that is killed and can tell nobody"
    p = subprocess.Popen([sys.executable, "-c", ORPHAN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = Path("/proc") / p.stdout.readline().strip()
    assert child.exists()
    p.kill()
    p.wait()
    ended = lambda: not child.exists() or "(zombie)" in (child / "status").read_text()
    until(ended, "the end of the model's process", 60)


@pytest.mark.parametrize("path", ["/detect", "/detect/batch"])
def test_documented(server, path):
    "Every answer has a schema and an example that fits it"
    op = httpx.get(f"{server.at}/openapi.json").json()["paths"][path]["post"]
    assert {"400", "401", "408", "413", "415", "422", "500", "503", "504"} <= set(op["responses"])
    assert op["responses"]["200"]["content"]["application/json"]["example"]
    example = op["requestBody"]["content"]["application/json"]["example"]
    assert httpx.post(server.at + path, json=example, timeout=60).status_code == 200
    assert {"multipart/form-data", "image/*", "application/json"} == set(op["requestBody"]["content"])
    for status, answer in op["responses"].items():
        if status == "200": continue
        content = answer["content"]["application/json"]
        assert content["schema"]["$ref"].endswith("/Error")
        assert {"code", "message"} <= set(content["example"]["error"])


def test_what_is_served_is_typed(server):
    op = httpx.get(f"{server.at}/openapi.json").json()
    schema = op["paths"]["/model"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert set(op["components"]["schemas"][schema["$ref"].split("/")[-1]]["properties"]) == set(
        httpx.get(f"{server.at}/model").json())


def test_schemas_have_the_names_that_clients_know(server):
    schemas = httpx.get(f"{server.at}/openapi.json").json()["components"]["schemas"]
    assert {"Detection", "Answer", "CocoRow", "Problem", "Error", "Answers"} <= set(schemas)
    assert all(schemas[n]["title"] == n for n in ("Answer", "Problem", "Error", "Answers"))


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/model", "/metrics", "/"])
def test_other_routes(server, path): assert httpx.get(server.at + path).status_code == 200


def test_metrics_and_log(server):
    r = post(server, headers={"X-Request-ID": "abc-1"})
    assert r.headers["x-request-id"] == "abc-1"
    assert len(post(server, headers={"X-Request-ID": "a b\\"}).headers["x-request-id"]) == 32
    httpx.get(f"{server.at}/nothing/{'x' * 50}")
    text = httpx.get(f"{server.at}/metrics").text
    assert 'rtdetr_requests_total{route="/detect",status="200"}' in text
    assert "nothing" not in text
    for k in ("decode", "queue", "infer", "encode"): assert f'rtdetr_stage_seconds_count{{stage="{k}"}}' in text
    assert "rtdetr_images_in_house 0.0" in text
    until(lambda: any('"abc-1"' in l for l in server.lines), "a line in the log")
    assert next(json.loads(l) for l in server.lines if '"abc-1"' in l)["status"] == 200


def first_fingerprint():
    from rtdetr_kd.deploy.open import open_model
    return open_model(TOY, threads=1).about["weights"]


def other_weights(path, factor=1.25):
    "The same student with one tensor changed"
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    state = load_file(path)
    with safe_open(path, "pt") as f: about = f.metadata()
    state["decoder.enc_output.0.weight"] = state["decoder.enc_output.0.weight"] * factor
    save_file(state, path, about)


KEY = dict(headers={"Authorization": "Bearer secret"})


@pytest.fixture(scope="class")
def own(tmp_path_factory):
    "The command with weights, a token, a limit and a threshold of its own"
    weights = tmp_path_factory.mktemp("own") / "own.safetensors"
    weights.write_bytes(TOY.read_bytes())
    words = ["--weights", weights, "--threads", 1, "--token", "secret", "--max-body", 200_000, "--threshold", .9,
             "--cors", "https://a.example"]
    with running(*words) as p:
        p.weights = weights
        yield p


class TestOwnWeights:
    def test_token_and_limit(self, own):
        check_error(post(own), 401, "token")
        check_error(post(own, headers={"Authorization": "Bearer secreT"}), 401, "token")
        assert post(own, headers={"Authorization": "bearer secret"}).status_code == 200
        ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        assert httpx.options(f"{own.at}/detect", headers=ask).headers["access-control-allow-origin"] == ask["Origin"]
        op = httpx.get(f"{own.at}/openapi.json", **KEY).json()
        assert op["components"]["securitySchemes"]["token"] == dict(type="http", scheme="bearer")
        assert op["paths"]["/detect"]["post"]["security"] == [dict(token=[])]
        check_error(httpx.get(f"{own.at}/model"), 401)
        check_error(post(own, bytes(300_000), **KEY), 413, "too_many_bytes")

    def test_the_servers_own_threshold(self, own):
        scores = lambda **kw: [d["score"] for d in post(own, **kw, **KEY).json()["detections"]]
        assert all(s >= .9 for s in scores())
        assert any(s < .9 for s in scores(params=dict(threshold=.1)))

    def test_sighup_while_requests_run(self, own):
        fingerprint = lambda: httpx.get(f"{own.at}/model", **KEY).json()["fingerprint"]
        before = fingerprint()
        other_weights(own.weights)
        with ThreadPoolExecutor(3) as pool:
            hits = [pool.submit(post, own, **KEY) for _ in range(30)]
            own.send_signal(signal.SIGHUP)
            assert {h.result().status_code for h in hits} == {200}
        until(lambda: fingerprint() != before, "the new weights")

    def test_damaged_weights(self, own):
        own.weights.write_bytes(b"damaged")
        own.send_signal(signal.SIGHUP)
        until(lambda: any("reload refused" in l for l in own.lines), "a word about damaged weights")
        assert post(own, **KEY).status_code == 200

    def test_weights_that_answer_nonsense(self, own):
        "NaN in one tensor: such a model would answer 200 with no detections from then on"
        own.weights.write_bytes(TOY.read_bytes())
        other_weights(own.weights, float("nan"))
        own.send_signal(signal.SIGHUP)
        until(lambda: any("no number" in l for l in own.lines), "a word about NaN")
        assert post(own, params=dict(threshold=.1), **KEY).json()["detections"]

    def test_twelve_signals_at_once(self, own):
        "One reload at a time: never more than two models, and the last file is served"
        fingerprint = lambda: httpx.get(f"{own.at}/model", **KEY).json()["fingerprint"]
        until(lambda: len(family(own.pid)) == 2, "what was refused before has ended")
        most, before = 0, fingerprint()
        for k in range(12):
            own.weights.write_bytes(TOY.read_bytes())
            if k == 11: other_weights(own.weights, 1.5)
            own.send_signal(signal.SIGHUP)
            time.sleep(.2)
            most = max(most, len(family(own.pid)) - 1)
        until(lambda: fingerprint() != before and fingerprint() != first_fingerprint(), "the last file")
        assert most <= 2                                                   # the old one and the new one
        until(lambda: len(family(own.pid)) == 2, "the others have ended")

    def test_sigterm_with_requests_in_flight(self, own):
        eight = dict(files=[("image", SCENE)] * 8, timeout=60)
        with ThreadPoolExecutor(4) as pool:
            hits = [pool.submit(httpx.post, f"{own.at}/detect/batch", **eight, **KEY) for _ in range(4)]
            for _ in range(200):
                if "rtdetr_images_in_house 0.0" not in httpx.get(f"{own.at}/metrics", **KEY).text: break
            own.terminate()
            done = [h for h in hits if not h.exception()]
        assert done
        assert {h.result().status_code for h in done} == {200}
        assert own.wait(60) in (0, -signal.SIGTERM)
        assert not any("Traceback" in l for l in own.lines)


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
    n, boxes = len(f["images"]), [[.985, .4, 1.085, .6], [0, 0, 1, 1]]
    scores = [.9, np.nan if mood == 50 else .8]
    return dict(scores=np.float32([scores] * n), labels=np.zeros((n, 2), int), boxes=np.float32([boxes] * n))
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
    r = post(moody, mood(100), headers={"X-Request-ID": "faulty-1"})
    check_error(r, 500, "fault")
    assert "secret" not in r.text
    assert r.headers["x-request-id"] == "faulty-1"
    assert r.headers["x-content-type-options"] == "nosniff"
    text = httpx.get(f"{moody.at}/metrics").text
    assert 'rtdetr_requests_total{route="/detect",status="500"} 1.0' in text
    assert 'status="499"' not in text


def test_no_nan_and_nothing_outside(moody):
    a = post(moody, mood(50)).json()["detections"]
    assert [d["name"] for d in a] == ["bolt"]
    assert a[0]["box"] == [98.5, 20, 100, 30]
    assert "rtdetr_nonfinite_total 1.0" in httpx.get(f"{moody.at}/metrics").text


def health(p):
    "Seconds that /healthz takes"
    start = time.perf_counter()
    assert httpx.get(f"{p.at}/healthz").status_code == 200
    return time.perf_counter() - start


def test_busy(moody):
    "A slow model: health answers at once, what is too much is told to come back"
    with ThreadPoolExecutor(26) as pool:
        slow = [pool.submit(post, moody, mood(200)) for _ in range(26)]
        time.sleep(1.5)
        took = [health(moody) for _ in range(10)]
        answers = [f.result() for f in slow]
    assert sorted(took)[5] < .2, took
    busy = [r for r in answers if r.status_code == 503]
    assert len(busy) == 6
    assert all(r.headers["retry-after"] == "1" for r in busy)
    for r in busy: check_error(r, 503, "busy")
    assert [r.status_code for r in answers].count(200) == 20


def test_who_leaves_frees_the_place(moody):
    for _ in range(12):
        try: httpx.post(f"{moody.at}/detect", files=dict(image=mood(200)), timeout=.3)
        except httpx.TimeoutException: pass
    until(lambda: "rtdetr_images_in_house 0.0" in httpx.get(f"{moody.at}/metrics").text, "an empty house")
    start = time.perf_counter()
    assert post(moody, mood(0)).status_code == 200
    assert time.perf_counter() - start < 9                                 # not behind twelve pictures of 3 s


def test_alive_before_it_is_ready():
    "While the model warms up, the process answers, and says that it is not ready; a time limit is kept"
    from fastapi.testclient import TestClient
    from rtdetr_kd.deploy.runner import Runner
    from rtdetr_kd.serve.app import create_app
    from rtdetr_kd.serve.batching import Limits
    go = threading.Event()
    about = dict(names=["a", "b"], category_ids=[1, 2], size=16, weights="w", precision="fp32", post="fractions")
    def call(f):
        go.wait()
        n, boxes = len(f["images"]), np.float32([0, 0, 1, 1])
        scores, labels = np.full((n, 1), .9, np.float32), np.ones((n, 1), int)
        return dict(scores=scores, labels=labels, boxes=np.tile(boxes, (n, 1, 1)))
    with TestClient(create_app(Runner(call, about, "test", "fp32"), Limits(seconds=.5))) as c:
        send = lambda: c.post("/detect", files=dict(image=mood(0)))
        assert c.get("/healthz").status_code == 200
        for r in (c.get("/readyz"), send()):
            check_error(r, 503, "not_ready")
            assert r.headers["retry-after"] == "1"
        go.set()
        until(lambda: c.get("/readyz").status_code == 200, "ready")
        assert [d["name"] for d in send().json()["detections"]] == ["b"]   # the model's own names
        go.clear()
        start = time.perf_counter()
        check_error(send(), 504, "timeout")
        assert time.perf_counter() - start < .9                            # half a second in all, not for each part
        go.set()


class Payload:
    def __reduce__(self): return (os.system, ("touch /tmp/rtdetr_kd_payload_ran",))


CANNOT = [("nope.onnx", "no such model file"), ("a.txt", "a model file ends in"), ("{dir}/bad.onnx", "is no"),
          ("{dir}/evil.pth", "."), ("{dir}/evil.safetensors", "."),
          ("{dir}/a.engine", "TensorRT is not installed|GPU|build it again")]


@pytest.mark.parametrize("words, says", CANNOT)
def test_what_cannot_be_served(tmp_path, words, says):
    from rtdetr_kd.serve.main import main
    for name in ("bad.onnx", "a.engine"): (tmp_path / name).write_bytes(b"bad")
    for name in ("evil.pth", "evil.safetensors"): (tmp_path / name).write_bytes(pickle.dumps(Payload()))
    weights = words.format(dir=tmp_path)
    with pytest.raises(SystemExit, match=says) as e: main(["--port", "0", "--threads", "1", "--weights", weights])
    assert str(e.value).startswith("Stopped: ")
    assert not Path("/tmp/rtdetr_kd_payload_ran").exists()


def test_help_keeps_the_token_to_itself(monkeypatch):
    from rtdetr_kd.serve.main import arguments, option_parser
    monkeypatch.setenv("RTDETR_KD_TOKEN", "a-secret-word")
    assert "a-secret-word" not in option_parser().format_help()
    assert arguments([]).token == "a-secret-word"
    assert arguments(["--token", "another"]).token == "another"


@pytest.mark.parametrize("words", [["--copies", "-3"], ["--threads", "-1"], ["--max-scans", "0"]])
def test_options_that_make_no_sense(words, capsys):
    from rtdetr_kd.serve.main import arguments
    with pytest.raises(SystemExit): arguments(words)
    assert words[0] in capsys.readouterr().err


def test_a_port_that_is_taken():
    from rtdetr_kd.serve.main import main
    with socket.create_server(("127.0.0.1", 0)) as s:
        with pytest.raises(SystemExit, match="Stopped: .* another --port"): main(["--port", str(s.getsockname()[1])])


def written_as(kind, folder):
    "The embedded student for another runtime"
    if kind == "xml":
        from rtdetr_kd.deploy.export import write_openvino
        return write_openvino(ONNX, folder / "m.xml")
    from rtdetr_kd.data.dataset import load_data
    from rtdetr_kd.deploy.calibrate import calibrate
    from rtdetr_kd.deploy.quantize import write_int8
    ranges = calibrate(ONNX, load_data("toy")["select"], 32)
    return write_int8(ONNX, folder / f"m.{kind[5:]}", ranges, "openvino" if kind == "int8.xml" else "onnxruntime")


def served_by(path):
    "The precision, and the detections of the scene, by two copies"
    from fastapi.testclient import TestClient
    from rtdetr_kd.serve.app import create_app
    from rtdetr_kd.serve.worker_process import open_served
    with TestClient(create_app(open_served(path, copies=2, threads=1))) as c:
        until(lambda: c.get("/readyz").status_code == 200, "ready")
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: c.post("/detect", files=dict(image=SCENE)), range(8)))
        return c.get("/model").json()["precision"], answers[-1].json()["detections"]


@pytest.mark.parametrize("kind", ["xml", pytest.param("int8.onnx", marks=pytest.mark.slow),
                                  pytest.param("int8.xml", marks=pytest.mark.slow)])
def test_other_runtimes(tmp_path, kind):
    "OpenVINO and eight bits behind the same server find what the embedded student finds"
    pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    from rtdetr_kd.deploy.verify import overlaps
    eight = kind.startswith("int8")
    (_, a), (precision, b) = served_by(ONNX), served_by(written_as(kind, tmp_path))
    assert precision.startswith("int8" if eight else "fp32")
    near = overlaps(np.float32([d["box"] for d in a]), np.float32([d["box"] for d in b]))
    for k, d in enumerate(a):
        if d["score"] <= .5: continue
        assert near[k].max() > (.8 if eight else .99)
        assert d["name"] == b[near[k].argmax()]["name"]


def test_container():
    "What the Dockerfile copies is there, and the command it gives is one; compose is YAML that says the same"
    import shlex, yaml
    from rtdetr_kd.serve.main import EMBEDDED, arguments
    lines = [l.split(maxsplit=1) for l in (ROOT / "Dockerfile").read_text().splitlines() if l and l[0] != "#"]
    copied, keys = [f for k, v in lines if k == "COPY" for f in shlex.split(v)[:-1]], dict(lines)
    steps = [k + " " + v for k, v in lines]
    at = lambda text: next(k for k, l in enumerate(steps) if text in l)
    assert at("COPY requirements-serve.txt") < at("-r requirements-serve.txt") < at("COPY rtdetr_kd")
    assert all((ROOT / f).exists() for f in copied)
    assert str(EMBEDDED.relative_to(ROOT)) in copied
    assert not set(copied) & set((ROOT / ".dockerignore").read_text().split())
    assert arguments(json.loads(keys["CMD"])).host == "0.0.0.0"
    assert keys["USER"] == "serve"
    assert keys["HEALTHCHECK"].endswith('["python", "-m", "rtdetr_kd.serve.main", "health"]')
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["rtdetr_kd"]
    assert service["build"] == "."
    assert service["restart"] == "unless-stopped"
    assert service["read_only"]
    assert service["ports"] == ["127.0.0.1:8000:8000"]


def test_the_images_packages_are_locked():
    "Each to its version, and every package that the server imports is among them"
    lines = [l for l in (ROOT / "requirements-serve.txt").read_text().splitlines() if l[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", l) for l in lines)
    code = ("import sys; from importlib.metadata import packages_distributions as of; import rtdetr_kd.serve.main as m;"
            "m.open_served(m.EMBEDDED, threads=1); found = of();"
            "print(*{d for n in list(sys.modules) if '.' not in n for d in found.get(n, [])})")
    r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    plain = lambda name: name.lower().replace("_", "-")
    needed = {plain(n) for n in r.stdout.split()} - {"rtdetr-kd", "watchfiles", "pip", "setuptools"}
    assert {"fastapi", "uvicorn", "onnxruntime", "msgspec"} <= needed
    missing = needed - {plain(l.split("==")[0]) for l in lines}
    assert not missing, missing


def test_health_of_a_container(server, moody, tmp_path, monkeypatch):
    "At the port in use, whichever that is; a full house is well, nobody is not"
    from rtdetr_kd.serve import main
    first = tmp_path / "cmdline"
    monkeypatch.setattr(main, "FIRST", first)
    def told(port): first.write_bytes(b"\0".join([b"python", b"-m", b"rtdetr_kd.serve", b"--port", b"%d" % port, b""]))
    told(port_of(server))
    assert main.health() is None
    told(port_of(moody))
    with ThreadPoolExecutor(21) as pool:
        for _ in range(21): pool.submit(post, moody, mood(200))
        until(lambda: httpx.get(f"{moody.at}/readyz").status_code == 503, "a full house", 30)
        assert main.health() is None
    told(9)
    with pytest.raises(SystemExit, match="not well"): main.health()


def test_the_page_is_package_data():
    "A wheel has the page, and its policy is that of its script"
    told = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    assert "page.html" in told["tool"]["setuptools"]["package-data"]["rtdetr_kd.serve"]
    assert (ROOT / "rtdetr_kd/serve/page.html").is_file()


SLIM = """
import sys, re
import rtdetr_kd.serve.main
from rtdetr_kd.serve.batching import Limits, prepare_image, Budget
r = rtdetr_kd.serve.main.open_served(sys.argv[1], threads=1)
prepare_image("a", open(sys.argv[2], "rb").read(), Limits(), r.size, Budget(10**9))
heavy = "torch torchvision sklearn pandas matplotlib scipy openvino".split()
heavy = [m for m in heavy if m in sys.modules]
print(heavy, int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


def test_a_server_of_onnx_files_is_slim(server):
    "None of what training needs is imported; less than 300 MB in all"
    run = [sys.executable, "-c", SLIM, str(ONNX), str(ROOT / "figures/scene.jpg")]
    r = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert r.stdout.startswith("[] "), r.stdout + r.stderr
    assert int(r.stdout.split()[1]) < 150
    assert rss(server) < 450                                               # after all that the tests have sent


HANGING = """
"A server whose decoder hangs"
import sys, time
import rtdetr_kd.serve.batching as b
from rtdetr_kd.serve.main import main
b.pixels_of = lambda im, data, **how: time.sleep(600)
main(["--port", sys.argv[1], "--threads", "1", "--max-seconds", "1"])
"""


def test_a_decoder_that_hangs(tmp_path):
    "One 504, then not ready; told to stop, the server stops"
    (tmp_path / "hanging.py").write_text(HANGING)
    with running(script=tmp_path / "hanging.py") as p:
        check_error(post(p), 504, "timeout")
        until(lambda: httpx.get(f"{p.at}/readyz").status_code == 503, "not ready")
        check_error(httpx.get(f"{p.at}/readyz"), 503, "stuck")
        start = time.perf_counter()
        p.terminate()
        p.wait(30)
        assert time.perf_counter() - start < 10


READ_ONLY = """
"A server that may write nowhere, not even to /tmp"
import errno, os, sys, tempfile
def no_writing(event, args):
    if event != "open" or isinstance(args[0], int) or str(args[0]).startswith("/dev/"): return
    if (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): raise OSError(errno.EROFS, "read-only", str(args[0]))
sys.addaudithook(no_writing)
from rtdetr_kd.serve.main import main
main(["--port", sys.argv[1], "--threads", "1"])
"""


def test_a_server_that_may_write_nowhere(tmp_path):
    "It starts, and takes a picture of more than a megabyte, which forms lay on disk elsewhere"
    (tmp_path / "read_only.py").write_text(READ_ONLY)
    noise = packed(Image.effect_noise((1200, 1200), 90))
    with running(script=tmp_path / "read_only.py") as p:
        assert len(noise) > 1_100_000
        assert post(p, noise).status_code == 200
        assert found(p)


CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_by_schema(server, tmp_path):
    "schemathesis makes requests out of the OpenAPI document: nothing it thinks of is answered by 5xx or undocumented"
    pytest.importorskip("schemathesis")
    exe = Path(sys.executable).with_name("schemathesis")
    run = [exe, "run", f"{server.at}/openapi.json", "--max-examples", "25", "--checks", CHECKS,
           "--phases", "examples,coverage,fuzzing", "--seed", "1", "--no-color"]
    r = subprocess.run(run, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert r.returncode == 0, r.stdout[-5000:] + r.stderr[-1000:]
