"""KV caches in codes: found in a graph, quantized as they are written, read by attention over codes."""
