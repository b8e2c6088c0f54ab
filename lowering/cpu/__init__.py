"""The CPU target: which regions it takes, what they become, and what surrounds kernels in Inductor's C++."""
