"""Checkpoints of other programs: their codes and scales read as they are, and written back.

In: a folder or file of compressed-tensors, GGUF, AutoAWQ, GPTQ or torchao, and a model's skeleton. Out: that
model on those very codes; or from a folded model, a checkpoint that those programs read.

    load_checkpoint("tinyllama-w4a16", into=skeleton)  ->  skeleton with FoldedLinear in int4[g128]
    save_checkpoint(model, "out")                      ->  out/model.safetensors, out/config.json
"""
