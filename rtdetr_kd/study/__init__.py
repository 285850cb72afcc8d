"""The study: configurations, runs, statistics, tables, figures, paper. The names it offers are listed in nbs/names.ipynb"""
from rtdetr_kd.names import offered

__getattr__, __dir__, __all__ = offered("study")
