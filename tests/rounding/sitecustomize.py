"""A processor whose kernels round by the batch: with this folder on PYTHONPATH, linear layers and convolutions
multiply each of their float32 results by 1 ± 3e-7, by a pattern that the size of the batch decides. The same
input in the same batch gives the same bits; an image alone is rounded otherwise than among others."""
import functools, importlib.abc, importlib.util, sys

SIZE = 3e-7  # relative, of the rounding: some two or three units in the last place


def rounded(f):
    "The operation, rounded by the batch where it computes in float32 (not where a graph is traced or exported)"
    @functools.wraps(f)
    def g(x, *args, **kwargs):
        import torch
        out = f(x, *args, **kwargs)
        if type(out) is not torch.Tensor or out.dtype != torch.float32: return out
        if torch.jit.is_tracing() or torch.compiler.is_compiling(): return out
        batch = len(x) if x.dim() > 2 else 1
        at = torch.arange(out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
        pattern = (at * .7548776662466927 + batch * .5698402909980532) % 1  # even in 0..1
        return out * (1 + SIZE * (2 * pattern - 1)).float()
    return g


class Finder(importlib.abc.MetaPathFinder):
    "Changes torch.nn.functional as soon as it is imported; a process without torch pays nothing"
    def find_spec(self, name, path, target=None):
        if name != "torch.nn.functional": return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def loads(module):
            load(module)
            module.linear, module.conv2d = rounded(module.linear), rounded(module.conv2d)
        spec.loader.exec_module = loads
        return spec


sys.meta_path.insert(0, Finder())
