"""Algorithms over a whole model: calibration data, one block at a time, results that survive an interruption.

The passes that decide are in `passes/algorithms`; here is what feeds them.
"""
