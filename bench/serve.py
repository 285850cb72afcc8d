"""Throughput and latency of the server under load, beside the bare runtime and a plain FastAPI handler

python bench/serve.py [--weights W] [--clients 16] [--seconds 8] [--rounds 3] [--threads 1] [--soak 10000] [--out bench/serve_toy.json]

Rounds alternate: server, plain handler, bare runtime at the batch size that the server's batches had in the mean, the same with the file decoded
and resized for every image (what a server cannot spare), and the bare runtime at one image a call. The plain handler is what a person writes first:
`async def`, the model called in it, with the runtime's own number of threads.
The clients run on the same machine and take their share of its cores; the figures include that.
"""
import argparse, asyncio, json, os, platform, re, socket, statistics, subprocess, sys, time, urllib.request
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PLAIN = '''
import io, sys
import numpy as np, uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image
from rtdetr_kd.export import open_model
app, runner = FastAPI(), open_model(sys.argv[1])  # with the runtime's own number of threads
@app.get("/readyz")
def ready(): return 1
@app.post("/detect")
async def detect(image: UploadFile):
    im = Image.open(io.BytesIO(await image.read())).convert("RGB")
    x = np.asarray(im.resize((runner.size, runner.size)))
    scores, labels, boxes = (v[0] for v in runner(x[None]))
    keep = scores >= .3
    return dict(detections=[dict(name=runner.names[c], score=float(s), box=[float(v) for v in b])
                            for s, c, b in zip(scores[keep], labels[keep], boxes[keep])])
uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
'''


def start(words):
    "A server process that is ready, and its port"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    p = subprocess.Popen([sys.executable, *[str(port) if w == "PORT" else str(w) for w in words]], cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while p.poll() is None:
        try: urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz"); return p, port
        except OSError: time.sleep(.2)
    sys.exit(f"Stopped: {words} ended with {p.returncode}")


def request(photo: bytes) -> bytes:
    body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n' + photo + b"\r\n--x--\r\n"
    return b"POST /detect HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


async def client(port, data, until, took, count):
    "One connection, one request after the other"
    r, w = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until and count[0] > 0:
        count[0] -= 1
        t = time.perf_counter()
        w.write(data); head = await r.readuntil(b"\r\n\r\n")
        await r.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))
        if b" 200 " not in head[:20]: raise RuntimeError(head)
        took.append(time.perf_counter() - t)
    w.close()


async def load(port, data, clients, seconds, count=10**9) -> dict:
    took, t, left = [], time.perf_counter(), [count]
    await asyncio.gather(*[client(port, data, t + seconds, took, left) for _ in range(clients)])
    ms = sorted(1000 * v for v in took)
    return dict(per_second=len(ms) / (time.perf_counter() - t), p50=ms[len(ms) // 2], p99=ms[int(len(ms) * .99)])


def meter(port, name): return float(re.search(rf"^{name} (\S+)", urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode(), re.M)[1])


def rss(p) -> float:
    "MB of a process and its children"
    all_ = [p.pid, *map(int, Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split())]
    return sum(int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{k}/status").read_text())[1]) for k in all_) / 1024


def bare(runner, n, seconds, data=None) -> float:
    "The runtime in a loop at `n` images a call; with a file's `data`, every image is decoded first, in the same loop"
    from rtdetr_kd.batching import Limits, decode, square
    x, k, L, t = np.random.default_rng(0).integers(0, 256, (n, runner.size, runner.size, 3), np.uint8), 0, Limits(), time.perf_counter()
    while time.perf_counter() < t + seconds:
        runner(np.stack([square(decode(data, L)[0], runner.size) for _ in range(n)]) if data else x); k += n
    return k / (time.perf_counter() - t)



def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", default=ROOT / "weights/toy_student.safetensors"); p.add_argument("--clients", type=int, default=16)
    p.add_argument("--seconds", type=float, default=8); p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=0, help="of the server's inference; 0: it chooses")
    p.add_argument("--photo", default=ROOT / "figures/scene.jpg")
    p.add_argument("--soak", type=int, default=0); p.add_argument("--out")
    a = p.parse_args()
    sys.path.insert(0, str(ROOT))
    from rtdetr_kd.export import open_model
    cores, data = len(os.sched_getaffinity(0)), request(Path(a.photo).read_bytes())
    runner = open_model(a.weights, threads=cores)
    ours, port = start(["-m", "rtdetr_kd.serve", "--weights", a.weights, "--port", "PORT", *(["--threads", a.threads] if a.threads else [])])
    plain, other = start(["-c", PLAIN, a.weights, "PORT"])
    rows = []
    try:
        for k in (port, other): asyncio.run(load(k, data, a.clients, 2))
        for n in range(1, 9): runner(np.zeros((n, runner.size, runner.size, 3), np.uint8))
        for _ in range(a.rounds):
            before = [meter(port, f"rtdetr_batch_size_{k}") for k in ("sum", "count")]
            server = asyncio.run(load(port, data, a.clients, a.seconds))
            images, calls = (meter(port, f"rtdetr_batch_size_{k}") - b for k, b in zip(("sum", "count"), before))
            rows.append(dict(server=server, plain=asyncio.run(load(other, data, a.clients, a.seconds)), batch=images / calls,
                             bare=bare(runner, max(1, round(images / calls)), a.seconds),
                             bare_decoding=bare(runner, max(1, round(images / calls)), a.seconds, Path(a.photo).read_bytes()), bare_one=bare(runner, 1, a.seconds / 2), alone=asyncio.run(load(port, data, 1, 2))))
            print(json.dumps(rows[-1]), flush=True)
        plain.terminate()
        mid = lambda f: round(statistics.median(map(f, rows)), 3)
        out = dict(weights=Path(a.weights).name, backend=runner.backend, size=runner.size, clients=a.clients, cores=cores, load_before=os.getloadavg()[0],
                   machine=next((l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name")), platform.processor()),
                   server_to_bare=mid(lambda r: r["server"]["per_second"] / r["bare"]), server_to_bare_decoding=mid(lambda r: r["server"]["per_second"] / r["bare_decoding"]), batch_to_one=mid(lambda r: r["bare"] / r["bare_one"]),
                   server_to_plain=mid(lambda r: r["server"]["per_second"] / r["plain"]["per_second"]),
                   p99_to_p50=mid(lambda r: r["server"]["p99"] / r["server"]["p50"]), rounds=rows)
        if a.soak:
            asyncio.run(load(port, data, a.clients, 1e9, a.soak // 10)); first = rss(ours)
            asyncio.run(load(port, data, a.clients, 1e9, a.soak)); out |= dict(soak=a.soak, rss_before=first, rss_after=rss(ours))
    finally:
        for q in (ours, plain): q.terminate(); q.wait()
    print(json.dumps({k: v for k, v in out.items() if k != "rounds"}, indent=1))
    if a.out: Path(a.out).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__": main()
