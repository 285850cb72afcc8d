"""Short name of `rtdetr_kd.train.memory`: see nbs/names.ipynb"""
from rtdetr_kd.names import stand_for

stand_for(__name__, "memory")
