"Ray Serve by the documented command: two copies answer, and it ends politely (minutes; skipped without ray)"
import os, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("ray.serve"); httpx = pytest.importorskip("httpx")
from test_serve import ROOT, SCENE, check_error, post


@pytest.mark.slow
def test_two_copies(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "90", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "90"}  # a busy machine
    log = open(tmp_path / "log", "w+")
    p = subprocess.Popen([Path(sys.executable).with_name("serve"), "run", "rtdetr_kd.serve.ray:build", "copies=2", "cores=1"], cwd=tmp_path, env=env, stdout=log, stderr=subprocess.STDOUT)
    p.at = "http://127.0.0.1:8000"
    try:
        for _ in range(600):
            assert p.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                if httpx.get(f"{p.at}/readyz", timeout=5).status_code == 200: break
            except httpx.TransportError: pass
            time.sleep(.5)
        assert httpx.get(f"{p.at}/model").json()["names"][2] == "two"
        with ThreadPoolExecutor(8) as pool: rs = list(pool.map(lambda _: post(p), range(60)))
        assert {r.status_code for r in rs} == {200} and len({str(r.json()["detections"]) for r in rs}) == 1
        check_error(post(p, b"text"), 415, "not_an_image")
        calls = [httpx.get(f"{p.at}/metrics").text for _ in range(20)]                                # each copy has meters of its own
        assert len({next(l for l in t.splitlines() if l.startswith("rtdetr_images_total")) for t in calls}) == 2
    finally:
        p.send_signal(signal.SIGINT); p.wait(120)
