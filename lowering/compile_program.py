"""A program compiled without Dynamo: a captured graph needs no tracing, and a call of it few guards.

In: a program (`bf.quantize(.., scope="program")`, or `bf.load(path)`). Out: a function of the same arguments,
for inference, compiled when it is first called with tensors of some sizes.

    fast = bf.compile(program);  y = fast(x)

`torch.compile(program, backend="bitfold")` gives the same numbers: it traces the program's Python, which
takes seconds for thirty layers, and looks at guards in each call, which a small model feels. Here sizes,
strides, dtypes and devices of the arguments are compared, and the program's tensors read where it holds them.
What a program writes to may share memory with nothing else that it is given or holds: what is compiled keeps
no order between the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from ..formats import BitfoldError
from ..passes.fuse import inline
from ..passes.shared_memory import memory, written
from ..passes.stages import find_attribute
from .backend import bitfold
from .program import Program
from .target import Compiled

MOST = 64
"""Of compiled functions of one program, each for sizes of its own."""


def compile_program(program: GraphModule, **options: Any) -> CompiledProgram:
    """Compile a program for inference. options: those of the backend "bitfold" (`Options`), but no recipe.

    Raises BitfoldError for what is no program of bitfold's.
    """
    if not isinstance(program, Program):
        raise BitfoldError(
            "bf.compile takes a program (of bf.quantize(model, .., scope='program'), or bf.load(path)), not "
            f"a {type(program).__name__}; for a model: torch.compile(model, backend='bitfold')"
        )
    if "recipe" in options or "pipeline" in options:
        raise BitfoldError("a program is quantized already; bf.compile takes neither recipe nor pipeline")
    return CompiledProgram(program, options)


class CompiledProgram:
    """What `bf.compile` returns; `program` is what it runs."""

    def __init__(self, program: GraphModule, options: Mapping[str, Any]) -> None:
        self.program, self.options = program, {"recipe": "none", **options}
        self._known: dict[Any, Callable[..., Any]] = {}
        info = getattr(program.graph._codegen, "pytree_info", None)
        self._spec = None if info is None else info.in_spec
        self._out = None if info is None else info.out_spec
        leaf = pytree.tree_structure(0)
        # All arguments are tensors in order, and the result is one.
        self._flat = self._spec is None or (
            all(one == leaf for one in self._spec.child(0).children()) and not self._spec.child(1).children()
        )
        self._one = self._out == leaf

    def __getstate__(self) -> dict[str, Any]:
        """A copy is compiled anew: what was compiled reads the tensors of this one's program."""
        return {**self.__dict__, "_known": {}}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(*args, **kwargs)
        flat = args if self._flat and not kwargs else self._flattened(args, kwargs)
        key = _key(flat)
        run = self._known.get(key)
        if run is None:
            run = self._compiled(key, args, kwargs, flat)
        found = run(*flat)
        if self._one:
            return found[0]
        return found if self._out is None else pytree.tree_unflatten(list(found), self._out)

    def _flattened(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if self._spec is None:
            raise BitfoldError("this program takes its arguments in order")
        order = self._spec.child(1).context or []
        if set(order) != set(kwargs):
            raise BitfoldError(f"this program takes the keyword arguments {order}, not {list(kwargs)}")
        flat, spec = pytree.tree_flatten((args, {name: kwargs[name] for name in order}))
        if spec != self._spec:
            raise BitfoldError("the arguments are not nested as those that this program was captured with")
        return tuple(flat)

    def _compiled(
        self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], flat: tuple[Any, ...]
    ) -> Callable[..., Any]:
        if self._spec is not None:
            self._flattened(args, kwargs)  # a sentence, if they are wrong
        if len(self._known) >= MOST:
            raise BitfoldError(
                f"this program was compiled for {MOST} kinds of arguments already; give it fewer sizes, or "
                "call the program itself"
            )
        self._known[key] = made = _compile(self.program, flat, self.options)
        return made


def _key(flat: tuple[Any, ...]) -> Any:
    """All that a compiled function is for, in this process: its inputs, and what changes what is compiled."""
    kinds = [
        (one.shape, one.stride(), one.dtype, one.device, type(one)) if isinstance(one, Tensor) else one
        for one in flat
    ]
    return (*kinds, torch.is_inference_mode_enabled(), torch.get_num_threads())


def _compile(program: GraphModule, flat: tuple[Any, ...], options: Mapping[str, Any]) -> Callable[..., Any]:
    """For inputs like these."""
    _check(program, flat)
    graph, held = _lifted(program)
    places = [(_owner(program, name), name.rpartition(".")[2]) for name in held]
    given = [*flat, *(table[name] for table, name in places)]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(one, static_shapes=True) if isinstance(one, Tensor) else one for one in given]
    for i, (node, fake) in enumerate(zip(graph.graph.find_nodes(op="placeholder"), fakes, strict=True)):
        node.meta["example_value"] = fake
        if i >= len(flat):
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    changed = _changed(graph)
    _refuse_shared(program, given, changed)
    inner: Compiled = bitfold(graph, given, options)

    def run(*inputs: Any) -> Any:
        return inner(*inputs, *[table[name] for table, name in places])

    def run_apart(*inputs: Any) -> Any:
        values = [*inputs, *[table[name] for table, name in places]]
        _refuse_shared(program, values, changed)
        return inner(*values)

    return run_apart if changed else run


def _changed(graph: GraphModule) -> list[int]:
    """Numbers of the inputs that the graph writes to."""
    inputs = graph.graph.find_nodes(op="placeholder")
    found = set(written(graph.graph.nodes, inputs, memory(graph.graph)))
    return [i for i, node in enumerate(inputs) if node in found]


def _refuse_shared(program: GraphModule, values: Sequence[Tensor], changed: Sequence[int]) -> None:
    """One sentence if what is written to lies where another of the values does."""
    if not changed:
        return
    places = [value.untyped_storage()._cdata for value in values]
    count = Counter(places)
    if any(count[places[i]] > 1 and values[i].numel() for i in changed):
        raise BitfoldError(
            "this program writes to a tensor that shares memory with another of its arguments, or with what "
            "it holds; give it a clone(), or call the program itself"
        )


def _check(program: GraphModule, flat: tuple[Any, ...]) -> None:
    """One sentence about inputs that the program was not captured for."""
    wanted = program.graph.find_nodes(op="placeholder")
    if len(flat) != len(wanted):
        raise BitfoldError(f"this program takes {len(wanted)} inputs, not {len(flat)}")
    known: dict[Any, tuple[str, int]] = {}
    for node, given in zip(wanted, flat, strict=True):
        value = node.meta.get("val")
        if not isinstance(given, Tensor) or not isinstance(value, Tensor):
            raise BitfoldError(
                f"bf.compile takes tensors, and the input {node.name} of this program is {_kind(given)}; "
                "call the program itself, or capture it without"
            )
        same = value.dtype == given.dtype and value.ndim == given.ndim and value.device == given.device
        fixed = zip(value.shape, given.shape, strict=False)
        if not same or any(isinstance(size, int) and size != other for size, other in fixed):
            raise BitfoldError(
                f"the input {node.name} of this program is {_kind(value)}, not {_kind(given)}; capture it "
                "anew, with dynamic= for sizes that vary"
            )
        _check_varying(node.name, value, given, known)


def _check_varying(name: str, value: Tensor, given: Tensor, known: dict[Any, tuple[str, int]]) -> None:
    """One sentence about a size outside of its range, or other than one that was captured as the same."""
    for i, size in enumerate(value.shape):
        if isinstance(size, int) or not size.node.expr.is_Symbol:
            continue
        length, symbol = given.shape[i], size.node.expr
        where = f"size {i} of the input {name}"
        bounds = size.node.shape_env.var_to_range.get(symbol)
        # Torch captures what varies for 2 and more; one row is no other graph.
        if bounds is not None and not (bounds.lower <= max(length, 2) and length <= bounds.upper):
            raise BitfoldError(f"{where} is {length}; it was captured for {bounds.lower} to {bounds.upper}")
        other, before = known.setdefault(symbol, (where, length))
        if before != length:
            raise BitfoldError(
                f"{where} is {length} and {other} {before}; this program was captured for one size"
            )


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} of sizes {list(value.shape)} on {value.device}"


def _owner(program: GraphModule, name: str) -> Mapping[str, Tensor]:
    """Where the module that has a tensor holds it, now and after it is moved or replaced."""
    owner, _, leaf = name.rpartition(".")
    module: Any = program.get_submodule(owner)
    for table in (module._parameters, module._buffers, module.__dict__):
        if leaf in table:
            return table  # type: ignore[no-any-return]
    raise BitfoldError(f"this program lacks its tensor {name}")


def _lifted(program: GraphModule) -> tuple[GraphModule, list[str]]:
    """A copy of the graph whose tensors are inputs behind the others, and their names."""
    graph = GraphModule(program, torch.fx.Graph())
    copies: dict[Node, Node] = {}
    returned = graph.graph.graph_copy(program.graph, copies)
    graph.graph.output(_listed(returned))
    inline(graph)
    last = (graph.graph.find_nodes(op="placeholder") or [None])[-1]
    held: dict[str, Node] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in held:
            if not isinstance(find_attribute(program, name), Tensor):
                raise BitfoldError(f"this program holds {name}, which is no tensor; use torch.compile")
            before = graph.graph.inserting_after(last) if last else graph.graph.inserting_before(None)
            with before:
                held[name] = last = graph.graph.placeholder(f"held_{name.replace('.', '_')}")
            last.meta.update(node.meta)
        node.replace_all_uses_with(held[name])
        graph.graph.erase_node(node)
    graph.recompile()
    return graph, list(held)


def _listed(returned: Any) -> Any:
    """Dynamo's graphs return a tuple of tensors; an exported one a list, or what its codegen nests anew."""
    return tuple(returned) if isinstance(returned, list | tuple) else (returned,)
