"""The detector: RT-DETR, its weights, losses and evaluation. The names it offers are listed in nbs/names.ipynb"""
from rtdetr_kd.names import offered

__getattr__, __dir__, __all__ = offered("model")
