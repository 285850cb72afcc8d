"""Distillation: what a teacher can say, and how to ask it. The names it offers are listed in nbs/names.ipynb"""
from rtdetr_kd.names import offered

__getattr__, __dir__, __all__ = offered("distill")
