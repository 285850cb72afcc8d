"""Throughput and latency of the server under load, beside the bare runtime and plain FastAPI handlers

python bench/serve.py [--weights W] [--clients 16] [--seconds 6] [--rounds 5] [--options '--threads 1']
                      [--soak 10000] [--out bench/serve_toy.json]
python bench/serve.py --cpu 3000 --weights weights/toy_student.onnx --out bench/serve_cpu.json

Rounds alternate, so that whatever else the machine does meets all of them:
  server         ours
  plain, plain_def   what a person writes first: a FastAPI handler, `async def` or `def`, that calls the model
  bare           the runtime in a loop, all cores, no HTTP, no files: the batch size that the server's batches had
  bare_decoding  the same with the file decoded and resized for every image, which a server cannot spare
  bare_copies    as many copies of the model as the server chose, with its threads: what the machine can do
  bare_one       the runtime at one image a call
  alone          ours, one client
The clients run on the same machine and take their share of its cores; the figures include that. What other processes
take does not belong here: a measurement waits until they use less than --others of the machine, and is repeated if
that was not so, for --patience seconds; the least disturbed counts (its `others` is recorded).

--cpu N counts seconds of the processor instead, in the mean over N pictures: what the server takes, what of it the
model and the decoder take alone, what the clients take. That others are busy changes it little.
"""
import argparse, asyncio, json, os, platform, re, socket, statistics, subprocess, sys, threading, time, urllib.request
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PLAIN = '''
import io, sys
import numpy as np, uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image
from rtdetr_kd.deploy.open import open_model
app, runner = FastAPI(), open_model(sys.argv[1])  # with the runtime's own number of threads
@app.get("/readyz")
def ready(): return 1
@app.post("/detect")
ASYNC def detect(image: UploadFile):
    im = Image.open(io.BytesIO(READ)).convert("RGB")
    x = np.asarray(im.resize((runner.size, runner.size)))
    scores, labels, boxes = (v[0] for v in runner(x[None]))
    keep = scores >= .3
    return dict(detections=[dict(name=runner.names[c], score=float(s), box=[float(v) for v in b])
                            for s, c, b in zip(scores[keep], labels[keep], boxes[keep])])
uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
'''


def start(words):
    "A server process that is ready, and its port"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    run = [sys.executable, *[str(port) if w == "PORT" else str(w) for w in words]]
    p = subprocess.Popen(run, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while p.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz")
            return p, port
        except OSError: time.sleep(.2)
    sys.exit(f"Stopped: {words} ended with {p.returncode}")


def request(photo: bytes) -> bytes:
    "A form with one picture, as bytes on the wire"
    part = b'Content-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg'
    body = b"--x\r\n" + part + b"\r\n\r\n" + photo + b"\r\n--x--\r\n"
    head = b"POST /detect HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def client(port, data, until, took, count):
    "One connection, one request after the other"
    r, w = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until and count[0] > 0:
        count[0] -= 1
        t = time.perf_counter()
        w.write(data)
        head = await r.readuntil(b"\r\n\r\n")
        await r.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))
        if b" 200 " not in head[:20]: raise RuntimeError(head)
        took.append(time.perf_counter() - t)
    w.close()


async def load(port, data, clients, seconds, count=10**9) -> dict:
    "Answers a second, and how long they took in ms"
    took, t, left = [], time.perf_counter(), [count]
    await asyncio.gather(*[client(port, data, t + seconds, took, left) for _ in range(clients)])
    ms = sorted(1000 * v for v in took)
    return dict(per_second=len(ms) / (time.perf_counter() - t), p50=ms[len(ms) // 2], p99=ms[int(len(ms) * .99)])


def meter(port, name) -> float:
    "A value of the server's metrics"
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return float(re.search(rf"^{name} (\S+)", text, re.M)[1])


def rss(p) -> float:
    "MB of a process and its children"
    kilobytes = lambda k: int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{k}/status").read_text())[1])
    return sum(map(kilobytes, family(p.pid))) / 1024


def bare(runner, n, seconds, data=None) -> float:
    "The runtime in a loop at `n` images a call; with a file's `data`, every image is decoded first, in the same loop"
    from rtdetr_kd.serve.batching import Limits, decode_image, model_input
    limits, size = Limits(), runner.size
    noise = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)
    def decoded(): return np.stack([model_input(decode_image(data, limits)[0], size) for _ in range(n)])
    done, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        runner(decoded() if data else noise)
        done += n
    return done / (time.perf_counter() - start)


def together(runner, copies, n, seconds) -> float:
    "`bare` of every copy at the same time"
    out = [0] * copies
    def one(k): out[k] = bare(runner, n, seconds)
    threads = [threading.Thread(target=one, args=(k,)) for k in range(copies)]
    for t in threads: t.start()
    for t in threads: t.join()
    return sum(out)


def family(pid) -> list:
    "A process and its children"
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(k for c in children for k in family(int(c)))]


def ticks() -> tuple:
    "CPU time of the whole machine, and of this process and its children, in ticks"
    machine = Path("/proc/stat").read_text().split("\n")[0].split()[1:8]
    busy = sum(int(v) for k, v in enumerate(machine) if k not in (3, 4))
    own = lambda k: sum(map(int, Path(f"/proc/{k}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    return busy, sum(map(own, family(os.getpid())))


def disturbed(f) -> tuple:
    "What `f` returns, and the share of the machine that others took meanwhile"
    (before, own), start = ticks(), time.perf_counter()
    x = f()
    (after, ours), seconds = ticks(), time.perf_counter() - start
    capacity = seconds * os.cpu_count() * os.sysconf("SC_CLK_TCK")
    return x, round(max(after - before - ours + own, 0) / capacity, 3)


def calm(f, others: float, patience: float) -> tuple:
    "The least disturbed of `f`'s measurements within `patience` seconds, and the share that others took"
    best, end = None, time.perf_counter() + patience
    while not best or (best[1] > others and time.perf_counter() < end):
        while time.perf_counter() < end and disturbed(lambda: time.sleep(.5))[1] > others: pass
        new = disturbed(f)
        if not best or new[1] < best[1]: best = new
    return best


def with_batch(port, go) -> dict:
    "A load, and the mean size of the server's batches in it"
    read = lambda: [meter(port, f"rtdetr_batch_size_{k}") for k in ("sum", "count")]
    images, calls = read()
    x = go()
    more, again = read()
    return x | dict(batch=(more - images) / (again - calls))


def quantities(a, port, plains, runner, served, copies, data) -> dict:
    "One round"
    photo, row, others = Path(a.photo).read_bytes(), {}, {}
    def go(port, clients=a.clients): return asyncio.run(load(port, data, clients, a.seconds))
    def take(k, f): row[k], others[k] = calm(f, a.others, a.patience)
    take("server", lambda: with_batch(port, lambda: go(port)))
    n = max(1, round(row["server"]["batch"]))
    take("bare", lambda: bare(runner, n, a.seconds))
    take("plain", lambda: go(plains["plain"][1]))
    take("bare_decoding", lambda: bare(runner, n, a.seconds, photo))
    take("plain_def", lambda: go(plains["plain_def"][1]))
    take("bare_copies", lambda: together(served, copies, n, a.seconds))
    take("bare_one", lambda: bare(runner, 1, a.seconds))
    take("alone", lambda: go(port, 1))
    return row | dict(others=others)


def summary(rows) -> dict:
    "Medians of each round's ratios"
    mid = lambda f: round(statistics.median(map(f, rows)), 3)
    speed = lambda v: v if isinstance(v, float) else v["per_second"]
    to = lambda k: mid(lambda r: r["server"]["per_second"] / speed(r[k]))
    ratios = {f"server_to_{k}": to(k) for k in ("bare", "bare_decoding", "bare_copies", "plain", "plain_def")}
    return dict(per_second=mid(lambda r: r["server"]["per_second"]), batch=mid(lambda r: r["server"]["batch"]),
                **ratios,
                batch_to_one=mid(lambda r: r["bare"] / r["bare_one"]),
                p99_to_p50=mid(lambda r: r["server"]["p99"] / r["server"]["p50"]),
                alone_p50_ms=mid(lambda r: r["alone"]["p50"]))


def cpu_seconds(pid) -> float:
    "Of a process and its children, since they began"
    fields = [Path(f"/proc/{k}/stat").read_text().rsplit(")", 1)[1].split()[11:13] for k in family(pid)]
    return sum(int(v) for f in fields for v in f) / os.sysconf("SC_CLK_TCK")


def cpu_of(f, n) -> float:
    "Milliseconds of the processor that `f` takes, in the mean of `n` calls; the best of three"
    def once():
        start = time.process_time()
        for _ in range(n): f()
        return 1000 * (time.process_time() - start) / n
    return round(min(once() for _ in range(3)), 3)


def cpu(a, data) -> dict:
    "Where the processor's time goes, in ms a picture; the best of three loads"
    from rtdetr_kd.deploy.open import open_model
    from rtdetr_kd.serve.batching import Budget, Limits, prepare_image
    runner, photo, limits = open_model(a.weights, threads=1), Path(a.photo).read_bytes(), Limits()
    ours, port = start(["-m", "rtdetr_kd.serve", "--weights", a.weights, "--port", "PORT", *a.options.split()])
    seen = []
    try:
        asyncio.run(load(port, data, a.clients, 1e9, a.cpu // 10))
        for _ in range(3):
            before, mine = cpu_seconds(ours.pid), time.process_time()
            batch = with_batch(port, lambda: asyncio.run(load(port, data, a.clients, 1e9, a.cpu)))["batch"]
            server, clients = cpu_seconds(ours.pid) - before, time.process_time() - mine
            seen.append([round(1000 * v / a.cpu, 3) for v in (server, clients)] + [round(batch, 1)])
    finally:
        ours.terminate()
        ours.wait()
    server, clients, batch = min(seen)
    x = np.zeros((round(batch), runner.size, runner.size, 3), np.uint8)
    model = round(cpu_of(lambda: runner(x), 100) / len(x), 3)
    decode = cpu_of(lambda: prepare_image("a", photo, limits, runner.size, Budget(10**9)), 300)
    return dict(weights=Path(a.weights).name, pictures=a.cpu, clients_at_a_time=a.clients, batch=batch,
                cores=len(os.sched_getaffinity(0)), machine=processor(), unit="ms of the processor a picture",
                server=server, model_alone=model, decoder_alone=decode, clients=clients)


def options():
    "Of this command"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", default=ROOT / "weights/toy_student.safetensors")
    p.add_argument("--clients", type=int, default=16)
    p.add_argument("--seconds", type=float, default=4)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--options", default="", help="of the server")
    p.add_argument("--photo", default=ROOT / "figures/scene.jpg")
    p.add_argument("--others", type=float, default=.1)
    p.add_argument("--patience", type=float, default=20)
    p.add_argument("--soak", type=int, default=0)
    p.add_argument("--cpu", type=int, default=0)
    p.add_argument("--out")
    return p.parse_args()


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((l.split(":")[1].strip() for l in lines if l.startswith("model name")), platform.processor())


def main():
    a = options()
    sys.path.insert(0, str(ROOT))
    from rtdetr_kd.deploy.open import open_model
    from rtdetr_kd.serve.worker_process import open_served
    cores, data = len(os.sched_getaffinity(0)), request(Path(a.photo).read_bytes())
    if a.cpu:
        text = json.dumps(cpu(a, data), indent=1)
        if a.out: Path(a.out).write_text(text + "\n")
        return print(text)
    runner = open_model(a.weights, threads=cores)
    ours, port = start(["-m", "rtdetr_kd.serve", "--weights", a.weights, "--port", "PORT", *a.options.split()])
    how = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/model").read())["options"]
    copies, served = how.get("copies", 1), open_served(a.weights, **how)
    plains = {k: start(["-c", PLAIN.replace("ASYNC ", w).replace("READ", read), a.weights, "PORT"])
              for k, w, read in (("plain", "async ", "await image.read()"), ("plain_def", "", "image.file.read()"))}
    try:
        for k in (port, *(q for _, q in plains.values())): asyncio.run(load(k, data, a.clients, 2))
        for n in range(1, 9):
            runner(np.zeros((n, runner.size, runner.size, 3), np.uint8))
            together(served, copies, n, .01)
        rows = []
        for _ in range(a.rounds):
            rows.append(quantities(a, port, plains, runner, served, copies, data))
            print(json.dumps(rows[-1]), flush=True)
        others = round(statistics.mean(v for r in rows for v in r["others"].values()), 3)
        out = dict(weights=Path(a.weights).name, backend=runner.backend, size=runner.size, served=how,
                   clients=a.clients, cores=cores, others=others, machine=processor(), **summary(rows), rounds=rows)
        if a.soak:
            asyncio.run(load(port, data, a.clients, 1e9, a.soak // 10))
            first = rss(ours)
            asyncio.run(load(port, data, a.clients, 1e9, a.soak))
            out |= dict(soak=a.soak, rss_before=first, rss_after=rss(ours))
    finally:
        for q in (ours, *(q for q, _ in plains.values())):
            q.terminate()
            q.wait()
    print(json.dumps({k: v for k, v in out.items() if k != "rounds"}, indent=1))
    if a.out: Path(a.out).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__": main()
