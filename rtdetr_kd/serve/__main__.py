"""`python -m rtdetr_kd.serve`"""
import runpy

runpy.run_module("rtdetr_kd.serve.app", run_name="__main__", alter_sys=True)
