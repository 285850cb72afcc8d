"""Fake CUDA tensors, where no card is: the Learner's own code, each operation looked at

`python tests/pretended/card.py '<list of dicts of settings, as Python>'` prints a line of JSON for each. It must be
started by `tests/test_pretended_gpu.py`, which puts a CUDA runtime in place that computes nothing."""

import collections, json, os, sys, traceback, weakref
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD = torch.device("cuda", 0)
ATEN = torch.ops.aten
HOST_FREE = {"aten.detach.default", "aten.empty_like.default", "aten.empty.memory_format", "aten.new_empty.default",
             "aten._unsafe_view.default", "aten.alias.default", "aten.empty_strided.default", "prim.device.default"}


def where(depth: int = 3) -> str:
    "The innermost frames in rtdetr_kd"
    f, out = sys._getframe(2), []
    while f and len(out) < depth:
        if "/rtdetr_kd/" in f.f_code.co_filename:
            out.append(f"{os.path.basename(f.f_code.co_filename)}:{f.f_lineno}")
        f = f.f_back
    return " < ".join(out) or "?"


class Watch(TorchDispatchMode):
    "Answers what only data could answer; counts kernels, and what makes the host wait for the card"

    def __init__(self):
        super().__init__()
        self.waits, self.ops, self.at = (collections.Counter() for _ in range(3))
        self.on = False

    def wait(self, what):
        if self.on: self.waits[f"{what} {where()}"] += 1

    def moved(self, source, to, free, pinned):
        "A copy between host and card: the host waits, unless it is told not to and the memory is pinned"
        if source == to: return
        up = to == "cuda"
        if free and (pinned or not up): return  # down without waiting is wrong for other reasons
        self.wait("to the card" if up else "to the host")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, x = kwargs or {}, args[0] if args else None
        card = isinstance(x, Tensor) and x.device.type == "cuda"
        if func is ATEN._local_scalar_dense.default:
            if card: self.wait("a number")
            return True if x.dtype == torch.bool else 1 if not x.is_floating_point() else 1.0
        if func is ATEN.nonzero.default:
            if card: self.wait("nonzero")
            return x.new_zeros(x.numel() // 2, x.dim(), dtype=torch.long)
        if func is ATEN._to_copy.default and kwargs.get("device") is not None:
            to = torch.device(kwargs["device"]).type
            self.moved(x.device.type, to, kwargs.get("non_blocking"), getattr(x, "pinned_here", False))
        if func is ATEN.copy_.default:
            free = (len(args) > 2 and args[2]) or kwargs.get("non_blocking")
            self.moved(args[1].device.type, x.device.type, free, getattr(args[1], "pinned_here", False))
        if func in (ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default):
            for i in args[1]:
                if isinstance(i, Tensor) and card and i.dtype in (torch.bool, torch.uint8): self.wait("a mask as index")
                if isinstance(i, Tensor) and card and i.device.type == "cpu": self.wait("an index to the card")
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, FakeTensor) and t.constant is not None: t.constant = None  # there is no card to hold one
        if self.on: self.count(func, args, kwargs, out)
        return out

    def count(self, func, args, kwargs, out):
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if any(t.device.type == "cuda" for t in tensors) and not func.is_view and str(func) not in HOST_FREE:
            self.ops[str(func)] += 1
            self.at[f"{func.__name__.split('.')[0]} {where(1)}"] += 1


class Held(TorchDispatchMode):
    "Bytes that are alive on the card, as its allocator counts them"

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak, self.at = {}, 0, 0, ""

    def reset(self):
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not (isinstance(t, Tensor) and t.device.type == "cuda"): continue
            s = t.untyped_storage()
            if s._cdata in self.known: continue
            self.known[s._cdata] = -(-s.nbytes() // 512) * 512
            self.now += self.known[s._cdata]
            weakref.finalize(s, self.gone, s._cdata)
            if self.now > self.peak: self.peak, self.at = self.now, where()
        return out

    def gone(self, key):
        self.now -= self.known.pop(key)


def pairs_of(logits, boxes, targets):
    "`match`, without scipy: its work on the card, and as many pairs"
    from rtdetr_kd.model import losses
    solve = lambda C, ns: torch.zeros(4, len(logits) * sum(ns), dtype=torch.long)
    return losses.match(logits, boxes, targets, solve=solve)


def partners_of(s_logits, s_boxes, t_logits, t_boxes):
    "`match_queries`, without scipy"
    from rtdetr_kd.distill import logits
    solve = lambda C: torch.zeros(3, len(C) * min(C.shape[1:]), dtype=torch.long)
    return logits.match_queries(s_logits, s_boxes, t_logits, t_boxes, solve=solve)


class OneCard:
    "What the Learner asks of Accelerate, for one card"

    device, num_processes, process_index = CARD, 1, 0
    distributed_type, scaler = "NO", None

    def __init__(self, scaled):
        self.scaler = Scaler() if scaled else None

    def prepare(self, *a):
        return a

    def no_sync(self, m):
        return nullcontext()

    def backward(self, loss):
        torch.autograd.backward(loss * self.scaler.scale if self.scaler else loss)

    def clip_grad_norm_(self, p, n):
        return nn.utils.clip_grad_norm_(p, n, foreach=True)  # what torch takes by itself, for tensors that are no fakes

    def log(self, *a):
        pass

    def wait_for_everyone(self):
        pass


class Scaler:
    "A gradient scaler's one tensor"

    def __init__(self):
        self.scale = torch.tensor(65536.0, device=CARD)

    def state_dict(self):
        return {}


def modules_moved(self, fn, recurse=True):
    "nn.Module._apply, for tensors whose data cannot be exchanged"
    if recurse:
        for m in self.children(): m._apply(fn)
    for k, p in list(self._parameters.items()):
        if p is not None: self._parameters[k] = nn.Parameter(fn(p.detach()), p.requires_grad)
    for k, b in list(self._buffers.items()):
        if b is not None: self._buffers[k] = fn(b)
    return self


def marked(t):
    "A copy of a host tensor in memory that a card can read by itself"
    if t.device.type == "cuda": raise RuntimeError("memory of a card cannot be pinned")
    out = t.clone()
    out.pinned_here = True
    return out


def splits_of(classes):
    from rtdetr_kd.data.dataset import load_data
    names = [f"class {k}" for k in range(classes)]
    return {k: replace(s, names=names, category_ids=list(range(classes))) for k, s in load_data("toy").items()}


@contextmanager
def pretended(c, dtype, *modes, teacher_names=None):
    "Everything that cannot be done without data or a card, replaced"
    import rtdetr_kd.train.parallel as parallel
    import rtdetr_kd.train.recipe as recipe
    import rtdetr_kd.train.step as step
    toy = splits_of(80)["train"]
    copied = lambda m: recipe.build_model(replace(c, init="", pretrained=False), toy.names, toy.category_ids).to(
        CARD, memory_format=torch.channels_last)
    teacher = recipe.teacher_model
    named = lambda source, names: teacher(source, teacher_names or names)
    with ExitStack() as s:
        into = lambda *a, **k: s.enter_context(mock.patch.object(*a, **k))
        for name, v in dict(is_available=True, current_device=0, device_count=1, is_initialized=True,
                            synchronize=None, manual_seed_all=None, is_bf16_supported=True).items():
            into(torch.cuda, name, lambda *a, v=v, **k: v)
        into(nn.Module, "_apply", modules_moved)
        into(Tensor, "pin_memory", marked)
        into(step, "accelerator", lambda c, folder: (OneCard(dtype == torch.float16), dtype))
        into(recipe, "check_teacher", lambda *a, **k: None)
        into(recipe, "weights_mark", lambda m: "a mark")
        into(recipe.copy, "deepcopy", copied)
        into(recipe, "teacher_model", named)
        into(step.Learner, "agreed", lambda self, x: x)
        s.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        for m in modes: s.enter_context(m)
        torch._C._set_only_lift_cpu_tensors(True)
        try: yield
        finally: torch._C._set_only_lift_cpu_tensors(False)


def without_scipy(learner):
    "The matchers of a learner do their work on the card, and no pairing"
    learner.trained.match = pairs_of
    for m in learner.trained.modules():
        if hasattr(m, "match") and m is not learner.trained: m.match = partners_of
        if isinstance(getattr(m, "pair", None), partial): m.pair = partial(m.pair.func, match=partners_of)


def drawn(c, boxes, k=0):
    "A batch of noise on the host"
    from rtdetr_kd.data.dataset import sides_around
    n, side = c.batch, sides_around(c.image_size)[-k] if c.multi_scale else c.image_size
    targets = [dict(labels=torch.randint(0, 80, (boxes,)), boxes=torch.rand(boxes, 4), image_id=0, row=k,
                    size=(640, 640)) for k in range(n)]
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    images.pinned_here = True
    return images, targets


def in_parts(c, images, targets):
    from rtdetr_kd.train.parallel import piece
    parts = [(piece(images, k, c.accumulate), piece(targets, k, c.accumulate)) for k in range(c.accumulate)]
    for x, _ in parts: x.pinned_here = True
    return parts


def answers_kept(learner, images):
    "As with cache='disk': the teacher's answers come from the host"
    from rtdetr_kd.distill.cache import answer, arrays
    from rtdetr_kd.distill.distillation import as_fractions
    d = learner.distillation
    live = d.live(as_fractions(images, CARD))
    down = lambda v: torch.empty(v.shape, dtype=torch.float32 if v.is_floating_point() else v.dtype)
    kept, shapes = {k: down(v) for k, v in arrays(live, d.method).items()}, live.signals.shapes
    d.answers = lambda rows, epoch: answer({k: v[: len(rows)] for k, v in kept.items()}, shapes)
    d.answers.views = 1


def look(boxes=7, steps=2, measure=False, teacher_names=None, spoil="", peaks=False, **kw):
    "A run of two steps: what it waited for, what it launched, what it held"
    from rtdetr_kd.train import step
    from rtdetr_kd.train.config import configure
    from rtdetr_kd.train import pilot  # adds `pulls`
    base = dict(data="coco", size="r18", teacher="random:r50", method="query", batch=4, lam="1", tracker="none",
                precision="float16", teacher_min_ap=0)
    cached = kw.pop("cache", "none") == "disk"
    c = configure(**base | kw)
    watch, held, found = Watch(), Held(), {}
    dtype = getattr(torch, c.precision)
    with pretended(c, dtype, *([held] if peaks else []), watch, teacher_names=teacher_names):
        learner = step.Learner(c, splits_of(80))
        without_scipy(learner)
        if cached: answers_kept(learner, drawn(c, boxes)[0])
        if spoil: spoiled(learner, spoil)
        for k in range(steps):
            parts = in_parts(c, *drawn(c, boxes, k))
            watch.on = k == steps - 1
            held.reset()
            terms = learner.one_step(parts)
            watch.on = False
        found |= dict(terms=len(terms), elsewhere=[k for k, v in terms.items() if v.device.type != "cuda"],
                      ops=sum(watch.ops.values()), waits=sum(watch.waits.values()),
                      waited=watch.waits.most_common(40), step=held.peak, step_at=held.at)
        found |= dict(most=watch.ops.most_common(25), at=watch.at.most_common(2000)) if os.environ.get("TELL") else {}
        if measure:
            batch = drawn(c, boxes)
            del terms
            held.reset()
            learner.pulls([batch])
            found |= dict(measure=held.peak, measure_at=held.at)
    if peaks: found["predicted"] = predicted(c, boxes)
    return found


def predicted(c, boxes):
    "What `memory` says about the same run: bytes at the peak of each phase"
    from rtdetr_kd.train.memory import rehearsal
    with rehearsal(replace(c, lam="auto"), 80, boxes) as phases: found = phases(-(-c.batch // c.accumulate))
    return {k: sum(v.values()) for k, v in found.items()}


def spoiled(learner, how):
    "A fault put in on purpose"
    if how == "cpu": learner.model.decoder.enc_score_head.bias = nn.Parameter(torch.zeros(80))
    if how == "wait":
        before = learner.trained.look
        def waits(*a, **k):
            out = before(*a, **k)
            for v in range(9): out[0].logits.sum().item()
            return out
        learner.trained.look = waits


def answered(kw):
    try: return look(**kw)
    except Exception as e:
        return dict(error=f"{type(e).__name__}: {str(e)[:300]}", trace=traceback.format_exc(limit=-6))


if __name__ == "__main__":
    for case in eval(sys.argv[1]): print("CASE", json.dumps(answered(case)), flush=True)
