"Ray Serve by the documented command: two copies answer, and it ends politely (minutes; skipped without ray)"
import os, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("ray.serve")
httpx = pytest.importorskip("httpx")
from test_serve import ROOT, check_error, post

BUSY_MACHINE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "90", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "90"}


def until_ready(p, log):
    for _ in range(600):
        assert p.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{p.at}/readyz", timeout=5).status_code == 200: return
        except httpx.TransportError: pass
        time.sleep(.5)
    pytest.fail(f"never ready: {log.read_text()[-3000:]}")


@pytest.mark.slow
def test_two_copies(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", **BUSY_MACHINE}
    log, serve = tmp_path / "log", Path(sys.executable).with_name("serve")
    run = [serve, "run", "rtdetr_kd.serve.ray:build", "copies=2", "cores=1"]
    with log.open("w") as out: p = subprocess.Popen(run, cwd=tmp_path, env=env, stdout=out, stderr=subprocess.STDOUT)
    p.at = "http://127.0.0.1:8000"
    try:
        until_ready(p, log)
        assert httpx.get(f"{p.at}/model").json()["names"][2] == "two"
        with ThreadPoolExecutor(8) as pool: answers = list(pool.map(lambda _: post(p), range(60)))
        assert {r.status_code for r in answers} == {200}
        assert len({str(r.json()["detections"]) for r in answers}) == 1
        check_error(post(p, b"text"), 415, "not_an_image")
        metrics = [httpx.get(f"{p.at}/metrics").text for _ in range(20)]   # each copy has its own
        count = lambda text: next(l for l in text.splitlines() if l.startswith("rtdetr_images_total"))
        assert len(set(map(count, metrics))) == 2
    finally:
        p.send_signal(signal.SIGINT)
        p.wait(120)
