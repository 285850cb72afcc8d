"""Short name of `rtdetr_kd.deploy.accept`: see nbs/names.ipynb"""
from rtdetr_kd.names import stand_for

stand_for(__name__, "accept")
