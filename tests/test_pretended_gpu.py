"""The Learner on a GPU that is only pretended: no mix of devices, few waits, few kernels, the memory that was predicted

CUDA tensors are fakes, the CUDA runtime is a stub that is compiled here (`tests/pretended`). So nothing is computed,
and yet every operation of a step goes by, with its device and its size. What this cannot show is speed and numbers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests/pretended"
SITE = Path(__import__("torch").__file__).resolve().parents[1]

MOST_WAITS = 4  # of the host in a step; 45 before anybody counted
MOST_KERNELS = 3000  # of a step of R18 from R50 by query; 4,950 before
SMALL = dict(size="toy", teacher="random:toy_teacher", image_size=64, batch=4, kd_points=10, queries=30)
METHODS = ("none", "logit", "feature", "cwd", "mgd", "query", "stage")
VARIANTS = dict(plain={}, accumulate=dict(accumulate=2), checkpoint=dict(checkpoint="all"), cache=dict(cache="disk"),
                by_name=dict(teacher_classes="by_name", teacher_names=[f"class {k}" for k in range(90, 20, -1)]),
                multi_scale=dict(multi_scale=True), no_boxes=dict(boxes=0))
OF_THE_PRECISION = dict(float16=1, bfloat16=0)  # waits: whether gradients overflow is asked in half precision alone


def why_not():
    "What is missing here; nothing if all is there"
    import torch
    if not torch.version.cuda: return "torch is built without CUDA: its CUDA wheel is needed"
    if not shutil.which("gcc"): return "no C compiler (gcc)"
    if not headers(): return "no headers of the CUDA runtime beside torch"


def headers():
    "Folders with cuda_runtime_api.h, and with what that includes"
    found = [*SITE.glob("nvidia/*/include/cuda_runtime_api.h")]
    folders = ("nvidia/*", "triton/backends/nvidia")
    inner = [f for folder in folders for f in SITE.glob(f"{folder}/include/crt/host_defines.h")]
    return [found[0].parent, inner[0].parents[1]] if found and inner else []


pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    "A CUDA runtime and a driver that compute nothing"
    folder = tmp_path_factory.mktemp("stub")
    include = [f"-I{f}" for f in headers()]
    for source, name, more in (("runtime", "runtime.so", include), ("driver", "libcuda.so.1", [])):
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", *more, f"-Wl,-soname,{name}", "-o", folder / name,
                        HERE / f"{source}.c"], check=True)
    return folder


def pretend(stub, *cases, seconds=1500):
    "What `card.py` saw in each case"
    env = os.environ | dict(LD_LIBRARY_PATH=str(stub), LD_PRELOAD=str(stub / "runtime.so"), PYTHONPATH=str(ROOT),
                            OMP_NUM_THREADS="1", MPLBACKEND="agg")
    out = subprocess.run([sys.executable, HERE / "card.py", repr([*cases])], env=env, text=True, capture_output=True,
                         timeout=seconds, cwd=ROOT)
    found = [json.loads(line[5:]) for line in out.stdout.splitlines() if line.startswith("CASE ")]
    assert len(found) == len(cases), out.stderr[-3000:]
    return found


def in_order(r, precision, waits=MOST_WAITS, kernels=MOST_KERNELS):
    assert "error" not in r, r["trace"]
    assert not r["elsewhere"] and r["terms"] >= 9
    assert r["waits"] <= waits, r["waited"]
    assert r["ops"] <= kernels


def few():
    "Every method once, every variant once, each precision as often as the other"
    cases = [SMALL | dict(method=m) for m in METHODS] + [SMALL | VARIANTS[v] | dict(method="query") for v in VARIANTS]
    cases += [SMALL | dict(method=m) for m in ("query+cwd", "query+logit")]
    cases += [SMALL | dict(method="query", alignment="hungarian"), SMALL | dict(method="query", query_points="both")]
    return [c | dict(precision=("float16", "bfloat16")[k % 2]) for k, c in enumerate(cases)]


def of_parts(case):
    "Waits that a part of a batch has, and a batch has as often as parts; two methods that pair queries wait twice"
    twice = case["method"] == "stage" or "logit" in case["method"].split("+")[1:]
    return MOST_WAITS + (case.get("accumulate", 1) - 1) * 2 + twice


@pytest.fixture(scope="session")
def seen(stub):
    return [*zip(few(), pretend(stub, *few()))]


@pytest.mark.parametrize("k", range(len(few())), ids=lambda k: " ".join(
    str(v) for n, v in few()[k].items() if n not in (*SMALL, "teacher_names")))
def test_every_method_and_every_variant(seen, k):
    case, r = seen[k]
    in_order(r, case["precision"], of_parts(case), 1.8 * MOST_KERNELS)  # a small R18 has as many; parts, twice


@pytest.mark.slow
@pytest.mark.parametrize("precision", OF_THE_PRECISION)
@pytest.mark.parametrize("method", METHODS)
def test_the_whole_product(stub, method, precision):
    "Methods × precisions × variants"
    cases = [SMALL | v | dict(method=method, precision=precision) for k, v in VARIANTS.items()
             if method != "none" or k not in ("cache", "by_name")]
    for case, r in zip(cases, pretend(stub, *cases)): in_order(r, precision, of_parts(case), 1.7 * MOST_KERNELS)


CANONICAL = dict(method="query", batch=16, image_size=640)


@pytest.fixture(scope="session")
def canonical(stub):
    "R18 from R50 at 640 pixels: a step's kernels, and what is held with few and with many boxes"
    peaks = dict(method="query", image_size=640, batch=4, peaks=True, measure=True)
    return pretend(stub, CANONICAL, peaks | dict(boxes=7), peaks | dict(boxes=100))


def test_kernels_and_waits_of_the_canonical_step(canonical):
    in_order(canonical[0], "float16")


@pytest.mark.parametrize("k, boxes", [(1, 7), (2, 100)])
def test_memory_is_as_predicted(canonical, k, boxes):
    "Step and λ, within 3 %; and measuring λ takes less than a step"
    r = canonical[k]
    assert "error" not in r, r["trace"]
    assert abs(r["step"] / r["predicted"]["step"] - 1) < 0.03, (r["step"] / 2**20, r["predicted"]["step"] / 2**20)
    assert abs(r["measure"] / r["predicted"]["λ"] - 1) < 0.03, (r["measure"] / 2**20, r["predicted"]["λ"] / 2**20)
    assert r["measure"] < r["step"]


def test_faults_are_found(stub):
    "A host tensor among the weights, and a number that is asked for again and again: both are put there on purpose"
    mixed, slow = pretend(stub, SMALL | dict(spoil="cpu"), SMALL | dict(spoil="wait"))
    assert "device" in mixed["error"] and "cpu" in mixed["error"]
    assert slow["waits"] > MOST_WAITS
