"""Models in files: a graph as data, tensors in safetensors; saved and loaded without what made them."""
