"""Kernel specification and schedule to source: the layer that will hold the Triton and C++ emitters.

Nothing is emitted here yet: the CPU target hands its decode to Inductor's own C++ (`lowering/cpu.py`).
"""
