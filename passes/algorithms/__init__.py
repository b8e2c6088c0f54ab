"""Algorithms that decide more than rounding to the nearest does: codes, scales, balanced channels.

Balancers (`awq`, `smooth`, `equalize`) change a graph before it is rounded; solvers (`clip`, `gptq`, `refit`,
`hqq`, `descend`) work on the `Draft` of one weight; `learn` is told what a block gives.
"""
