"COCO's download, from a server on this machine that drops connections, and the subsets drawn from it"

import http.server, io, json, re, threading, zipfile

import pytest
from PIL import Image

from rtdetr_kd.data.dataset import load_data
from rtdetr_kd.data.download import coco, coco_part


def archive(files: dict) -> bytes:
    buf = io.BytesIO()
    with zipfile.ZipFile(buf, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
    return buf.getvalue()


def jpeg(split: str, k: int) -> bytes:
    "A picture of its own"
    buf = io.BytesIO()
    Image.new("RGB", (64, 48), (4 * k, 90, 40 * len(split))).save(buf, "JPEG")
    return buf.getvalue()


def annotations(split: str, n: int) -> str:
    return json.dumps(
        dict(
            images=[dict(id=k, file_name=f"{k:012}.jpg", width=64, height=48) for k in range(n)],
            categories=[dict(id=1, name="person"), dict(id=90, name="toothbrush")],
            annotations=[
                dict(id=k, image_id=k, category_id=(1, 90)[k % 2], bbox=[4, 4, 20, 20], area=400, iscrowd=0)
                for k in range(n)
            ],
        )
    )


@pytest.fixture
def server():
    "Serves the three archives, cutting every answer after 3 kB and refusing every fifth request"
    files = {
        "/zips/train2017.zip": archive({f"train2017/{k:012}.jpg": jpeg("train", k) for k in range(60)}),
        "/zips/val2017.zip": archive({f"val2017/{k:012}.jpg": jpeg("val", k) for k in range(6)}),
        "/annotations/annotations_trainval2017.zip": archive(
            {f"annotations/instances_{s}2017.json": annotations(s, n) for s, n in (("train", 60), ("val", 6))}
        ),
    }
    files |= {f"/{s}2017/{k:012}.jpg": jpeg(s, k) for s, n in (("train", 60), ("val", 6)) for k in range(n)}
    seen = [0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *a):
            pass

        def do_GET(self):
            seen[0] += 1
            if seen[0] % 5 == 0:
                return self.send_error(503)
            body, start = files[self.path], int(re.search(r"=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start : start + 3000])

    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{s.server_port}", seen
    s.shutdown()


def test_coco_comes_whole_over_a_bad_network(server, tmp_path, monkeypatch):
    import rtdetr_kd.data.download as d

    base, seen = server
    monkeypatch.setattr(d.time, "sleep", lambda s: None)
    folder = coco(tmp_path / "coco", base)
    assert seen[0] > 5 and not list(folder.rglob("*.part")) and not list(folder.rglob("*.zip"))
    n = seen[0]
    coco(tmp_path / "coco", base)
    assert seen[0] == n  # nothing is asked for again
    monkeypatch.setenv("RTDETR_KD_COCO", str(folder))
    whole, some, fewer = (load_data("coco", k) for k in (0, 20, 10))
    assert [len(s) for s in whole.values()] == [40, 20, 6] and whole["val"].category_ids == [1, 90]
    assert (
        whole["select"].files == some["select"].files == fewer["select"].files
    )  # a subset leaves the select split alone
    assert set(fewer["train"].files) < set(some["train"].files) < set(whole["train"].files)
    assert not set(whole["train"].files) & set(whole["select"].files)


def test_a_part_of_coco_is_what_a_subset_of_all_is(server, tmp_path, monkeypatch):
    import rtdetr_kd.data.download as d

    base, seen = server
    monkeypatch.setattr(d.time, "sleep", lambda s: None)
    ids = {}
    for name, folder in dict(
        whole=coco(tmp_path / "coco", base), part=coco_part(20, tmp_path / "some", base, threads=4)
    ).items():
        monkeypatch.setenv("RTDETR_KD_COCO", str(folder))
        ids[name] = {
            k: (s.ids.tolist(), s.boxes.tolist(), s.category_ids) for k, s in load_data("coco", 20).items()
        }
    assert ids["whole"] == ids["part"] and len(ids["part"]["train"][0]) == 20
    assert len(list((tmp_path / "some").rglob("*.jpg"))) == 20 + 20 + 6  # train, select, val, and nothing else
    n = seen[0]
    assert (
        coco_part(20, tmp_path / "some", base) == tmp_path / "some/part" and seen[0] == n
    )  # nothing is asked for again


def test_no_coco_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RTDETR_KD_COCO", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="python -m rtdetr_kd.download coco"):
        load_data("coco")


def test_a_hub_name_without_a_network(monkeypatch):
    import huggingface_hub.constants
    from rtdetr_kd.model.weights import read_weights

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="could not be fetched from the Hugging Face Hub"):
        read_weights("PekingU/rtdetr_r18vd")
