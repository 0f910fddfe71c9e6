"""Graph nets: hidden units of nodes are free; nodes and edges are looked up by index."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.entry import Entry

EDGES = torch.tensor(
    [[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 2, 5, 7], [1, 2, 3, 4, 5, 6, 7, 8, 0, 4, 6, 1, 3]]
)
NODES = 9


def graph() -> dict[str, Tensor]:
    return {"nodes": torch.zeros(NODES, 3), "edges": EDGES.clone()}


class IndexAdd(nn.Module):
    """Sums messages at the target nodes, scaled by the degrees of both nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.second = nn.Linear(7, 5)
        self.head = nn.Linear(5, 2)

    def spread(self, hidden: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        degree = torch.zeros(len(hidden), dtype=hidden.dtype)
        degree = degree.index_add(0, target, torch.ones(len(target), dtype=hidden.dtype))
        scale = degree.clamp(min=1).rsqrt()
        messages = hidden[source] * (scale[source] * scale[target])[:, None]
        return torch.zeros_like(hidden).index_add(0, target, messages)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        hidden = torch.relu(self.spread(self.first(nodes), edges))
        return self.head(torch.relu(self.spread(self.second(hidden), edges)))


class InPlace(IndexAdd):
    """The same with in-place operators and `index_select`."""

    def spread(self, hidden: Tensor, edges: Tensor) -> Tensor:
        found = hidden.new_zeros(hidden.shape)
        found.index_add_(0, edges[1], hidden.index_select(0, edges[0]))
        return found


class ScatterAdd(IndexAdd):
    """Sums messages with an index expanded along the units."""

    def spread(self, hidden: Tensor, edges: Tensor) -> Tensor:
        index = edges[1].unsqueeze(-1).expand(-1, hidden.shape[1])
        return hidden.new_zeros(hidden.shape).scatter_add(0, index, hidden[edges[0]])


class ScatterMax(IndexAdd):
    """The largest message, unit by unit."""

    def spread(self, hidden: Tensor, edges: Tensor) -> Tensor:
        index = edges[1].unsqueeze(-1).expand(-1, hidden.shape[1])
        start = hidden.new_zeros(hidden.shape)
        return start.scatter_reduce(0, index, hidden[edges[0]], "amax", include_self=False)


class Coordinates(IndexAdd):
    """A sparse COO matrix times the hidden units."""

    def spread(self, hidden: Tensor, edges: Tensor) -> Tensor:
        values = torch.ones(edges.shape[1], dtype=hidden.dtype) / 2
        size = (len(hidden), len(hidden))
        matrix = torch.sparse_coo_tensor(edges.flip(0), values, size, check_invariants=False)
        return torch.sparse.mm(matrix, hidden)


class Rows(IndexAdd):
    """A sparse CSR matrix times the hidden units."""

    def spread(self, hidden: Tensor, edges: Tensor) -> Tensor:
        order = torch.argsort(edges[1], stable=True)
        counts = torch.bincount(edges[1], minlength=len(hidden))
        pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        values = torch.ones(edges.shape[1], dtype=hidden.dtype) / 2
        size = (len(hidden), len(hidden))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            matrix = torch.sparse_csr_tensor(
                pointers, edges[0][order], values, size, check_invariants=False
            )
        return matrix @ hidden


class Adjacent(nn.Module):
    """Dense adjacency matrices, one per graph of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.norm = nn.BatchNorm1d(7)
        self.second = nn.Linear(7, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        hidden = torch.bmm(adjacency, self.first(nodes))
        hidden = F.elu(self.norm(hidden.flatten(0, 1)).view(hidden.shape))
        return self.head((adjacency @ self.second(hidden)).amax(1))


class MeanConcat(nn.Module):
    """GraphSAGE: a node concatenated with the mean of its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(NODES, 5)
        self.first = nn.Linear(10, 7)
        self.head = nn.Linear(14, 2)

    def mean(self, hidden: Tensor, edges: Tensor) -> Tensor:
        source, target = edges[0], edges[1]
        total = torch.zeros_like(hidden).index_add(0, target, hidden[source])
        degree = torch.bincount(target, minlength=len(hidden)).clamp(min=1)
        return total / degree.unsqueeze(1).to(hidden.dtype)

    def forward(self, edges: Tensor) -> Tensor:
        hidden = self.embed.weight
        hidden = torch.relu(self.first(torch.cat([hidden, self.mean(hidden, edges)], 1)))
        return self.head(torch.cat([hidden, self.mean(hidden, edges)], 1))


class Attending(nn.Module):
    """Graph attention: several heads, and a softmax over the edges into each node."""

    def __init__(self, average: bool) -> None:
        super().__init__()
        self.average = average
        self.linear = nn.Linear(3, 15, bias=False)
        self.source = nn.Parameter(torch.randn(1, 3, 5))
        self.target = nn.Parameter(torch.randn(1, 3, 5))
        self.head = nn.Linear(5 if average else 15, 2)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        hidden = self.linear(nodes).view(-1, 3, 5)
        score = (hidden * self.source).sum(-1)[source] + (hidden * self.target).sum(-1)[target]
        weight = F.leaky_relu(score, 0.2).exp()
        norm = torch.zeros(len(nodes), 3, dtype=nodes.dtype).index_add(0, target, weight)
        weight = weight / norm[target]
        found = torch.zeros_like(hidden).index_add(0, target, hidden[source] * weight[..., None])
        return self.head(F.elu(found.mean(1) if self.average else found.flatten(1)))


class Pairs(nn.Module):
    """Scores edges by the nodes at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = nn.Linear(3, 6)
        self.pair = nn.Linear(6 + 6 + 4, 7)
        self.score = nn.Linear(7, 1)

    def forward(self, nodes: Tensor, edges: Tensor, kinds: Tensor) -> Tensor:
        hidden = torch.relu(self.nodes(nodes))
        index = edges[0].unsqueeze(1).expand(-1, 6)
        pair = torch.cat([hidden.gather(0, index), hidden[edges[1]], kinds], dim=-1)
        return self.score(torch.relu(self.pair(pair)))


class Convolved(nn.Module):
    """Messages by a matrix that is a function of each edge."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.edge = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 6 * 5))
        self.own = nn.Linear(6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, nodes: Tensor, edges: Tensor, kinds: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(nodes))
        matrices = self.edge(kinds).view(-1, 6, 5)
        messages = torch.bmm(hidden[edges[0]].unsqueeze(1), matrices).squeeze(1)
        found = self.own(hidden).index_add(0, edges[1], messages)
        return self.head(torch.relu(found))


class Gated(nn.Module):
    """Messages drive a recurrent cell in three rounds; nodes are summed by graph index."""

    batch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 7)
        self.message = nn.Linear(7, 5)
        self.cell = nn.GRUCell(5, 7)
        self.head = nn.Linear(7, 2)
        batch = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
        self.register_buffer("batch", batch, persistent=False)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        hidden = torch.tanh(self.stem(nodes))
        for _ in range(3):
            messages = self.message(hidden)[edges[0]]
            total = messages.new_zeros(len(nodes), 5).index_add(0, edges[1], messages)
            hidden = self.cell(total, hidden)
        return self.head(hidden.new_zeros(2, 7).index_add_(0, self.batch, hidden))


class Isomorphism(nn.Module):
    """GIN: a sum with a learned weight for the node itself; edges are constants of the model."""

    source: Tensor
    target: Tensor

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(
            nn.Linear(3, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU()
        )
        self.head = nn.Linear(5, 2)
        self.register_buffer("source", EDGES[0].clone(), persistent=persistent)
        self.register_buffer("target", EDGES[1].clone(), persistent=persistent)

    def forward(self, nodes: Tensor) -> Tensor:
        total = torch.zeros_like(nodes).index_add(0, self.target, nodes[self.source])
        hidden = self.mlp((1 + self.share) * nodes + total)
        return self.head(hidden.sum(0, keepdim=True))


class Relations(nn.Module):
    """The matrix of each edge type is a mixture of common basis matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.basis = nn.Parameter(torch.randn(4, 6, 7) / 3)
        self.mix = nn.Parameter(torch.randn(3, 4))
        self.own = nn.Linear(6, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, nodes: Tensor, edges: Tensor, kinds: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(nodes))
        matrices = torch.einsum("rb,bio->rio", self.mix, self.basis)
        messages = torch.einsum("ei,eio->eo", hidden[edges[0]], matrices[kinds])
        return self.head(torch.relu(self.own(hidden).index_add(0, edges[1], messages)))


def labelled() -> dict[str, Tensor]:
    return {**graph(), "kinds": torch.zeros(EDGES.shape[1], 4)}


GRAPHS = {
    "graph-index-add": Entry(IndexAdd, graph, (5, 7)),
    "graph-index-add-in-place": Entry(InPlace, graph, (5, 7)),
    "graph-scatter-add": Entry(ScatterAdd, graph, (5, 7)),
    "graph-scatter-max": Entry(ScatterMax, graph, (5, 7)),
    "graph-sparse-coordinates": Entry(Coordinates, graph, (5, 7)),
    "graph-sparse-rows": Entry(Rows, graph, (5, 7)),
    "graph-dense": Entry(
        Adjacent,
        lambda: {"nodes": torch.zeros(2, NODES, 3), "adjacency": torch.zeros(2, NODES, NODES)},
        (5, 7),
    ),
    "graph-mean-concat": Entry(MeanConcat, lambda: {"edges": EDGES.clone()}, (5, 7)),
    "graph-attention": Entry(lambda: Attending(average=False), graph, (3, 5)),
    "graph-attention-average": Entry(lambda: Attending(average=True), graph, (3, 5)),
    "graph-edge-scores": Entry(Pairs, labelled, (6, 7)),
    "graph-edge-matrices": Entry(Convolved, labelled, (5, 6, 7)),
    "graph-gated": Entry(Gated, graph, (5, 7)),
    "graph-edges-constant": Entry(
        lambda: Isomorphism(persistent=False), lambda: torch.zeros(NODES, 3), (5, 7)
    ),
    "graph-edges-stored": Entry(
        lambda: Isomorphism(persistent=True), lambda: torch.zeros(NODES, 3), (5, 7)
    ),
    "graph-relations": Entry(
        Relations, lambda: {**graph(), "kinds": torch.arange(EDGES.shape[1]) % 3}, (4, 6, 7)
    ),
}
