"""The CUDA target: which regions it takes, and how Inductor's launches around its kernels overlap."""
