"""`python -m rtdetr_kd.serve`"""
from rtdetr_kd.serve.main import main

main()
