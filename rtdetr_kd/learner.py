"""Short name of `rtdetr_kd.train.run`: see nbs/names.ipynb"""
from rtdetr_kd.names import stand_for

stand_for(__name__, "learner")
