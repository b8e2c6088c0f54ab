"""The residual stream of a decoder, found on its graph, with a proof that it may be rotated.

In: the captured graph of a whole model. Out: a `Stream`: which parameters write into the stream and which
read it, or a `Miss` with the first operator that would notice a rotation.

    x = embedding(E); y = rms_norm(x, g); x = x + linear(attention(linear(y, Wq), ..), Wo)
    ->  Stream(256, embeddings=[E], readers={Wq: g, ..}, writers=[Wo])

With x R in place of x, for any orthogonal R: sums of streams are rotated likewise; the mean of a token's
squares is the same number, so a norm without its vector g is rotated likewise; and linear(x R, W diag(g) R)
is linear(x g, W). So g moves into the weights that read it, E becomes E R and Wo becomes R^T Wo. Every other
operator that is given the stream (a layer norm, which takes off a mean of channels; a slice of channels; the
model's own result) ends the proof. Norms may be one operator or spelled out (pow, mean, rsqrt, mul). Ashkboos
et al., "SliceGPT", arXiv 2401.15024, section 3, and "QuaRot", arXiv 2404.00456.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from ..core import Miss
from .balance import parameter_path

aten = torch.ops.aten

_SAME = frozenset(
    {
        *(aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default),
        *(aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default),
    }
)
_TOKENS = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int),
        *(aten.unsqueeze.default, aten.squeeze.dim, aten._unsafe_view.default),
    }
)
"""These keep the channels where the last dimension keeps its size."""
_BY_DIM = frozenset({aten.slice.Tensor, aten.select.int, aten.transpose.int})
_ADDS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor})
_IGNORED = frozenset({aten._assert_tensor_metadata.default, aten.sym_size.int})


@dataclass
class Stream:
    """width: channels; embeddings: tables; readers: weights of linears, with the norm's vector before each
    (None: there is none); writers: weights of linears, with their biases. All are parameters' paths."""

    width: int
    embeddings: list[str] = field(default_factory=list)
    readers: dict[str, str | None] = field(default_factory=dict)
    writers: dict[str, str | None] = field(default_factory=dict)

    @property
    def norms(self) -> list[str]:
        """The vectors that move into readers."""
        return sorted({vector for vector in self.readers.values() if vector is not None})


class _Found(Exception):
    """What would notice a rotation."""


def residual(gm: GraphModule) -> Stream | Miss:
    """The stream of a captured model."""
    tables = [node for node in gm.graph.nodes if node.target is aten.embedding.default]
    if not tables:
        return Miss("it has no embedding, where a residual stream begins")
    width = int(max(tables, key=lambda node: node.args[0].meta["val"].numel()).meta["val"].shape[-1])
    proof = _Proof(gm, Stream(width))
    try:
        for node in gm.graph.nodes:
            proof.visit(node)
    except _Found as found:
        return Miss(str(found))
    stream = proof.stream
    planned = {*stream.embeddings, *stream.readers, *stream.writers, *stream.norms}
    for node in gm.graph.nodes:
        if node in proof.accounted or node.target in _SAME or node.op == "output":
            continue
        shared = [parameter_path(gm, one) for one in node.all_input_nodes if one.op != "placeholder"]
        again = next((path for path in shared if path in planned), None)
        if again is not None:
            return Miss(f"{again} is used in more than one place, {node.name} being one")
    if not proof.stream.readers or not proof.stream.writers:
        return Miss("no linear reads and writes what its embedding makes")
    return proof.stream


class _Proof:
    """`streams`: nodes that a rotation turns likewise, with the vector that their channels were multiplied
    by; `squares`: their squares."""

    def __init__(self, gm: GraphModule, stream: Stream) -> None:
        self.gm, self.stream = gm, stream
        self.streams: dict[Node, str | None] = {}
        self.squares: set[Node] = set()
        self.accounted: set[Node] = set()  # whose parameters are accounted for

    def visit(self, node: Node) -> None:
        given = [one for one in node.all_input_nodes if one in self.streams or one in self.squares]
        if node.target is aten.embedding.default and self._channels(node) == self.stream.width:
            self._embedding(node)
        elif given and node.target not in _IGNORED:
            self._follow(node, given)

    def _embedding(self, node: Node) -> None:
        path = parameter_path(self.gm, node.args[0])
        if path is None:
            raise _Found(f"the table of {node.name} is no parameter")
        self.stream.embeddings += [] if path in self.stream.embeddings else [path]
        self.streams[node] = None
        self.accounted.add(node)

    def _follow(self, node: Node, given: list[Node]) -> None:
        first = node.args[0] if node.args else None
        if any(one in self.squares for one in given):
            if not self._mean(node):
                raise self._seen(node)
        elif self._alike(node):
            self.streams[node] = self.streams[given[0]]
        elif node.target in _ADDS and not node.kwargs:
            self._sum(node)
        elif self._squared(node):
            self.squares.add(node)
        elif node.target in (aten.mul.Tensor, aten.div.Tensor):
            self._product(node, given)
        elif node.target is aten.rms_norm.default and self._plain(first):
            self._norm(node)
        elif node.target is aten.linear.default and given == [first]:
            self._reader(node)
        else:
            raise self._seen(node)

    def _alike(self, node: Node) -> bool:
        """Whether it gives its operand's channels on, as they are."""
        idle = node.target is aten.dropout.default and not node.args[2]
        return node.target in _SAME or idle or self._keeps_channels(node)

    def _squared(self, node: Node) -> bool:
        first, second = (*node.args, None, None)[:2]
        power = node.target is aten.pow.Tensor_Scalar and second == 2
        itself = node.target is aten.mul.Tensor and second is first
        return (power or itself) and self._plain(first)

    def _plain(self, node: object) -> bool:
        """A stream whose channels were not multiplied by anything."""
        return isinstance(node, Node) and node in self.streams and self.streams[node] is None

    def _channels(self, node: Node) -> int:
        value = node.meta.get("val")
        return int(value.shape[-1]) if isinstance(value, torch.Tensor) and value.ndim else 0

    def _keeps_channels(self, node: Node) -> bool:
        before = node.args[0] if node.args else None
        if self._channels(node) != self.stream.width or not isinstance(before, Node):
            return False
        ndim = before.meta["val"].ndim
        if node.target is aten.index.Tensor:  # tokens picked out, by indices of leading dimensions
            indices = node.args[1]
            return isinstance(indices, list | tuple) and len(indices) < ndim
        dims = node.args[1 : 3 if node.target is aten.transpose.int else 2]
        by_dim = node.target in _BY_DIM and all(isinstance(d, int) and d % ndim != ndim - 1 for d in dims)
        return node.target in _TOKENS or by_dim

    def _mean(self, node: Node) -> bool:
        """A sum over all channels of squares, which no rotation changes; casts of squares on the way."""
        if node.target in _SAME:
            self.squares.add(node)
            return True
        dims = node.args[1] if len(node.args) > 1 else None
        ndim = node.args[0].meta["val"].ndim  # type: ignore[union-attr]
        return node.target in (aten.mean.dim, aten.sum.dim_IntList) and (dims in ([-1], [ndim - 1]))

    def _sum(self, node: Node) -> None:
        for one in node.args[:2]:
            if isinstance(one, Node) and one not in self.streams:
                self._write(one)
            elif not self._plain(one):
                raise self._seen(node)
        self.streams[node] = None

    def _write(self, node: Node) -> None:
        """What is added to the stream has to be rotated where it is made: by the rows of a linear."""
        users = [user for user in node.users if user.target not in _IGNORED]
        if len(users) == 1 and node.target is aten.linear.default:
            paths = [parameter_path(self.gm, one) for one in node.args[1:] if one is not None]
            if paths and None not in paths and paths[0] not in self.stream.writers:
                self.stream.writers[str(paths[0])] = paths[1] if len(paths) > 1 else None
                self.streams[node] = None
                self.accounted.add(node)
                return
        if len(users) == 1 and self._alike(node) and isinstance(node.args[0], Node):
            self._write(node.args[0])
            self.streams[node] = None
            return
        raise _Found(f"{node.name} is added to the residual stream, and is no linear's own result")

    def _product(self, node: Node, given: list[Node]) -> None:
        """By a number for each token (a norm's), or by a vector of channels, once."""
        other = [one for one in node.args[:2] if one is not given[0]]
        if len(given) > 1 or len(other) != 1 or (node.target is aten.div.Tensor and other[0] is node.args[0]):
            raise self._seen(node)
        by = other[0]
        if not isinstance(by, Node) or self._channels(by) == 1:
            self.streams[node] = self.streams[given[0]]
            return
        path = parameter_path(self.gm, by)
        if path is None or by.meta["val"].ndim != 1 or not self._plain(given[0]):
            raise self._seen(node)
        if node.target is not aten.mul.Tensor:
            raise self._seen(node)
        self.streams[node] = path
        self.accounted.add(node)

    def _norm(self, node: Node) -> None:
        vector = node.args[2] if len(node.args) > 2 else None
        path = None if vector is None else parameter_path(self.gm, vector)
        if list(node.args[1]) != [self.stream.width] or (path is None) != (vector is None):  # type: ignore[arg-type]
            raise self._seen(node)
        self.streams[node] = path
        self.accounted.add(node)

    def _reader(self, node: Node) -> None:
        path = parameter_path(self.gm, node.args[1])
        vector = self.streams[node.args[0]]  # type: ignore[index]
        if path is None or self.stream.readers.get(path, vector) != vector:
            raise self._seen(node)
        self.stream.readers[path] = vector
        self.accounted.add(node)

    def _seen(self, node: Node) -> _Found:
        return _Found(f"{node.name} ({node.target}) would notice a rotation of the residual stream")
