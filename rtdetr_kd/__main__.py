"""`python -m rtdetr_kd`"""
from rtdetr_kd.command import main

main()
