"""`python -m rtdetr_kd.study`"""
import runpy

runpy.run_module("rtdetr_kd.study.tables", run_name="__main__", alter_sys=True)
