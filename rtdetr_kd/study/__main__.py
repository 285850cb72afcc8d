"""`python -m rtdetr_kd.study`"""
import runpy

runpy.run_module("rtdetr_kd.study.figures", run_name="__main__", alter_sys=True)
