"""A GGUF file written: a folded model as llama.cpp's blocks.

In: a model of transformers' classes (llama, qwen2, qwen3) after quantization to q4_0, q4_1, q8_0,
int5[g32,f16], uint5[g32,f16,zero:min] or mxfp4. Out: the file. `like` is a GGUF file of the same model whose
metadata (tokenizer, names) are taken over; without it there is the configuration alone, which runs on token
numbers.

    q_proj: FoldedLinear q8_0  ->  blk.0.attn_q.weight Q8_0, rows of heads reordered
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...formats import BitfoldError, Quantized
from ..files.paths import FileError, place_of
from ..files.save import join
from ..folded import Folded
from .gguf_blocks import write_blocks
from .gguf_fields import check_config, check_tensors, computed_tensors, write_fields
from .gguf_read import GGUF, ROTATED_IN_PAIRS, Names, gguf_package, in_their_order, open_gguf
from .layers import folded_layer


def write_gguf(model: nn.Module, path: object, *, like: object = None) -> None:
    """Raises BitfoldError, with nothing written, for a layer or an architecture that cannot be said."""
    gguf = gguf_package()
    place = place_of(path)
    config: Any = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    if kind not in ROTATED_IN_PAIRS:
        raise BitfoldError(
            f"GGUF is written for {', '.join(ROTATED_IN_PAIRS)}, not for a {type(model).__name__}"
        )
    source = None if like is None else open_gguf(Path(str(like)))
    if source is not None and source.architecture != kind:
        raise BitfoldError(f"{source.path} holds a model of architecture {source.architecture}, not {kind}")
    check_config(config, kind, source)
    tensors = _tensors(model, Names.of(kind, int(config.num_hidden_layers)), kind, config)
    check_tensors(tensors, kind)
    beside = place.with_name(f"{place.name[:40]}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(str(beside), kind)
    try:
        _metadata(writer, source, kind, config)
        for name, (type_name, data) in tensors.items():
            raw = getattr(gguf.GGMLQuantizationType, type_name)
            writer.add_tensor(name, data.contiguous().numpy(), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(beside, place)
    except OSError as error:
        raise FileError(f"{place} cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _tensors(model: nn.Module, names: Names, kind: str, config: Any) -> dict[str, tuple[str, Tensor]]:
    """By the file's name: the type's name and the rows. A tied head is not there, as llama.cpp has it."""
    found = {name: ("F32", tensor) for name, tensor in computed_tensors(config).items()}
    tied = bool(getattr(config, "tie_word_embeddings", False))
    folded = {path: module for path, module in model.named_modules() if isinstance(module, Folded)}
    held: dict[str, Tensor | Quantized] = {}
    for path, module in folded.items():
        try:
            layer = folded_layer(module)
        except BitfoldError as error:
            raise BitfoldError(f"layer {path}: {error}") from error
        if layer.input:
            raise BitfoldError(f"layer {path} quantizes its input, of which a GGUF file says nothing")
        held[join(path, "weight")] = layer.weight
    parts = {join(path, part) for path, module in folded.items() for part in module.parts}
    held |= {path: tensor for path, tensor in model.named_parameters() if path not in parts}
    for path, value in held.items():
        name = names.of_parameter(path)
        if name is None:
            raise BitfoldError(f"GGUF has no name for {path!r}")
        if name == "output.weight" and tied:
            continue
        heads = _heads(name, config) if ROTATED_IN_PAIRS[kind] else None
        value = in_their_order(value, heads)
        if isinstance(value, Quantized):
            try:
                found[name] = write_blocks(value)
            except BitfoldError as error:
                raise BitfoldError(f"layer {path.rpartition('.')[0]}: {error}") from error
        else:
            found[name] = ("F32", value.detach().cpu().float())
    return found


def _heads(name: str, config: Any) -> int | None:
    stem = name.rpartition(".")[0]
    if stem.endswith(".attn_q"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if stem.endswith(".attn_k") else None


def _metadata(writer: Any, source: GGUF | None, kind: str, config: Any) -> None:
    """The fields of `source` as they are, or the configuration's."""
    if source is None:
        write_fields(writer, config, kind)
        return
    for name, field in source.reader.fields.items():
        # The writer says these by itself, and the type of most tensors is another now.
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        lists = len(field.types) > 1
        writer.add_key_value(
            name, field.contents(), field.types[0], sub_type=field.types[-1] if lists else None
        )
