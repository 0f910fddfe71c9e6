"""Small models, each with an operator between two layers, for the tests of the rules.

`KEPT`: the hidden units are on an axis that the operator keeps, so they may move.
`HELD`: they are on an axis whose order matters to the operator, so they are pinned.
`SPLIT`: the operator would split a group of them, so they are pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn

Body = Callable[[Tensor], Tensor]


class Rows(nn.Module):
    """Six hidden units at five positions, an operator, and a layer with `last` inputs."""

    inputs = torch.zeros(2, 5, 4)

    def __init__(self, body: Body, last: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.body = body
        self.last = nn.Linear(last, 3) if last else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.body(self.first(inputs)))


class Image(nn.Module):
    """Hidden channels of an image, an operator, and a convolution with `last` input channels."""

    inputs = torch.zeros(2, 3, 8, 8)

    def __init__(self, body: Body, last: int = 6, channels: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.body = body
        self.last = nn.Conv2d(last, 2, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.body(self.first(inputs)))


class Bags(nn.Module):
    """Combined rows of a table."""

    inputs = torch.tensor([[0, 3, 3], [6, 1, 2]])

    def __init__(self, mode: str, weighted: bool = False) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(7, 6, mode=mode)
        self.weights = nn.Parameter(torch.ones(2, 3)) if weighted else None
        self.last = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.table(inputs, per_sample_weights=self.weights))


class Largest(nn.Module):
    """The largest rows of a table, and their indices."""

    inputs = torch.tensor([0, 3, 3, 6, 1, 2])

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found = torch.embedding_bag(self.table, inputs, torch.tensor([0, 2]), mode=2)
        return self.last(found[0] * found[3])


class Lookup(nn.Module):
    """A learned step function: hidden units index a table."""

    inputs = torch.zeros(2, 5, 4)

    def __init__(self, body: Callable[[Tensor, Tensor, Tensor], Tensor], last: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.table = nn.Parameter(torch.arange(4.0) ** 2)
        self.body = body
        self.last = nn.Linear(last, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return self.last(self.body(self.table, codes(hidden), hidden))


class Pairs(nn.Module):
    """A bilinear layer of two hidden layers."""

    inputs = torch.zeros(2, 5, 4)

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 5)
        self.both = nn.Bilinear(6, 5, 7)
        self.last = nn.Linear(7, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.both(self.left(inputs), self.right(inputs)))


class Attention(nn.Module):
    """A graph attention layer: a softmax over the edges into a node."""

    inputs = (torch.zeros(5, 4), torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 0]]))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.score, self.last = nn.Linear(4, 6), nn.Linear(6, 1), nn.Linear(6, 3)

    def forward(self, inputs: Tensor, edges: Tensor) -> Tensor:
        hidden = torch.relu(self.first(inputs))
        source, target = edges
        score = F.leaky_relu(self.score(hidden[source]) + self.score(hidden[target])).squeeze(-1)
        top = score.new_zeros(5).scatter_reduce(0, target, score, "amax", include_self=False)
        score = (score - top[target]).exp()
        total = score.new_zeros(5).scatter_add(0, target, score)
        message = hidden.index_select(0, source) * (score / total[target]).unsqueeze(-1)
        wide = target.unsqueeze(-1).expand_as(message)
        return self.last(torch.zeros_like(hidden).scatter_add_(0, wide, message))


class Normed(nn.Module):
    """Weight normalisation along some axis of the weights."""

    inputs = torch.zeros(2, 3, 8, 8)

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        norm = parametrizations.weight_norm
        self.first = norm(nn.Conv2d(3, 6, 1), dim=dim)
        self.second = norm(nn.Conv2d(6, 5, 3), dim=dim)
        self.last = norm(nn.Linear(5, 3), dim=dim)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.second(torch.relu(self.first(inputs))).mean((2, 3)))


class Renormed(nn.Module):
    """An embedding whose rows have a maximum norm."""

    inputs = torch.tensor([[0, 3, 3], [6, 1, 2]])

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(7, 6, max_norm=0.5), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.table(inputs))


def codes(hidden: Tensor) -> Tensor:
    """An integer from 0 to 3 for each hidden value."""
    return (hidden * 2).round().long() % 4


def written(hidden: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    """A copy of the hidden values with something written into it."""
    copied = hidden.clone()
    write(copied)
    return copied


def bins(hidden: Tensor, *shape: int) -> Tensor:
    return hidden.new_zeros(shape)


PLACES = torch.tensor([3, 0, 2])
MASK = torch.tensor([True, False, True, True, False])
UNITS = torch.tensor([4, 1, 2])
CORNERS = (torch.tensor([1, 0, 1]), torch.tensor([4, 2, 2]))


def at(hidden: Tensor, places: int = 3) -> Tensor:
    """An index with an axis for each axis of the hidden tensor, expanded along the units."""
    return PLACES[:places, None].expand(2, places, hidden.shape[-1])


def both(hidden: Tensor) -> Tensor:
    """Complex hidden values."""
    return torch.view_as_complex(torch.stack([hidden, hidden.flip(1) + 1], -1))


def graph(hidden: Tensor, size: int = 5) -> Tensor:
    """A constant sparse matrix."""
    numbers = torch.tensor([[0, 1, 1, 4, 4], [1, 0, 3, 2, 2]])
    values = torch.arange(1, 6).to(hidden.dtype)
    return torch.sparse_coo_tensor(numbers, values, (size, size), check_invariants=False)


def filled(image: Tensor) -> Tensor:
    return torch.cat([image, torch.ones_like(image[:, :2])], 1)


def ramp(hidden: Tensor, size: int = 5) -> Tensor:
    return torch.arange(size).to(hidden.dtype)


def packed(hidden: Tensor, ordered: bool) -> Tensor:
    lengths = torch.tensor([5, 3] if ordered else [3, 5])
    pack = rnn.pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=ordered)
    return rnn.pad_packed_sequence(pack, batch_first=True)[0]


def sampled(image: Tensor, mode: str) -> Tensor:
    grid = torch.linspace(-1, 1, 24).reshape(1, 3, 4, 2).expand(len(image), 3, 4, 2)
    return F.grid_sample(image, grid.to(image.dtype), mode, align_corners=False)


def sampled_by_units(hidden: Tensor) -> Tensor:
    """Hidden units are coordinates at which an image is sampled."""
    image = ramp(hidden, 40).reshape(1, 1, 5, 8).expand(2, 1, 5, 8)
    grid = torch.stack([hidden.sin(), hidden.cos()], -1)
    return F.grid_sample(image, grid, align_corners=False)[:, 0]


def sampled_by_pairs(hidden: Tensor) -> Tensor:
    """Pairs of hidden units are coordinates at which an image is sampled."""
    image = ramp(hidden, 40).reshape(1, 1, 5, 8).expand(2, 1, 5, 8)
    return F.grid_sample(image, hidden.view(2, 5, 3, 2).sin(), align_corners=False)[:, 0]


def sampled_volume(image: Tensor) -> Tensor:
    grid = torch.linspace(-1, 1, 48).reshape(1, 2, 2, 4, 3).expand(len(image), 2, 2, 4, 3)
    volume = torch.stack([image, image * 2], 2)
    return F.grid_sample(volume, grid.to(image.dtype), align_corners=False).mean(2)


def of_one_value(value: Tensor) -> Tensor:
    """Many operators on a tensor without axes."""
    first = torch.tensor(0)
    results = [
        value.sort()[0],
        value.topk(1)[0],
        value.cumsum(0),
        value.max(0)[0],
        value.max(),
        value.argmax(),
        value.aminmax(dim=0)[1],
        value.kthvalue(1)[0],
        value.norm(),
        value.var(correction=0),
        torch.var_mean(value, correction=0)[1],
        value.flip(()),
        value.index_select(0, first),
        value.gather(0, first),
        value.take(first),
        value.scatter(0, first, value),
        value.index_add(0, first, value),
        value.index_fill(0, first, 2.0),
        value.repeat(1),
        value.unfold(0, 1, 1),
        F.hardswish(value),
        torch.dist(value, value),
    ]
    return sum(results[1:], start=results[0])


@dataclass(frozen=True)
class Case:
    """A model, the operators that it must run, and the sizes of the groups that it must have."""

    build: Callable[[], nn.Module]
    operators: str
    groups: tuple[int, ...] = (6,)


def rows(operators: str, body: Body, last: int = 6, groups: tuple[int, ...] = (6,)) -> Case:
    return Case(lambda: Rows(body, last), operators, groups)


def image(operators: str, body: Body, last: int = 6, channels: int = 6, **groups: Any) -> Case:
    return Case(lambda: Image(body, last, channels), operators, **groups)


KEPT = {
    "index": rows("index", lambda h: h[:, PLACES]),
    "index-two-axes": rows("index", lambda h: h[CORNERS]),
    "index-grid": rows("index", lambda h: h[torch.tensor([[0], [1]]), PLACES]),
    "index-not-adjacent": rows("index", lambda h: h[:, None][CORNERS[0], :, CORNERS[1]]),
    "index-not-adjacent-in-front": image(
        "index", lambda x: x[CORNERS[0], :, CORNERS[1]].unsqueeze(-1)
    ),
    "index-mask": rows("index", lambda h: h[:, MASK]),
    "index-mask-two-axes": rows("index", lambda h: h[torch.stack([MASK, ~MASK])]),
    "index-mask-and-number": rows("index", lambda h: h[torch.tensor([True, True]), CORNERS[1][:2]]),
    "index-by-units": Case(lambda: Lookup(lambda table, code, h: table[code]), "index"),
    "index-by-units-and-places": Case(
        lambda: Lookup(lambda table, code, h: table.outer(table)[code, CORNERS[1][0] % 4]), "index"
    ),
    "index_put_": rows(
        "index_put_", lambda h: written(h, lambda y: y.__setitem__((slice(None), PLACES), h[:, :3]))
    ),
    "index_put_-broadcast": rows(
        "index_put_", lambda h: written(h, lambda y: y.__setitem__((slice(None), PLACES), h[:1, 0]))
    ),
    "index_put_-mask": rows(
        "index_put_", lambda h: written(h, lambda y: y.__setitem__((slice(None), MASK), h[:, :3]))
    ),
    "index_put": rows("index_put", lambda h: h.index_put(CORNERS, h[0, :3], accumulate=True)),
    "index_put-add-units": rows(
        "index_put", lambda h: bins(h, 4).index_put((codes(h),), h, accumulate=True), 4
    ),
    "index_select": rows("index_select", lambda h: h.index_select(1, PLACES)),
    "index_select-by-units": Case(
        lambda: Lookup(lambda t, code, h: t.outer(t).index_select(-1, code[0, 0])), "index_select"
    ),
    "index_add": rows("index_add", lambda h: h.index_add(1, PLACES, h[:, 2:])),
    "index_add_": rows(
        "index_add_", lambda h: bins(h, 2, 9, 6).index_add_(-2, PLACES, h[:, 2:], alpha=2)
    ),
    "index_add-units": rows(
        "index_add", lambda h: bins(h, 2, 5, 4).index_add(2, codes(h)[0, 0], h), 4
    ),
    "index_copy": rows("index_copy", lambda h: h.index_copy(1, PLACES, h[:, 2:])),
    "index_copy_": rows("index_copy_", lambda h: bins(h, 2, 9, 6).index_copy_(1, PLACES, h[:, 2:])),
    "index_reduce": rows("index_reduce", lambda h: h.index_reduce(1, PLACES, h[:, 2:], "amax")),
    "index_reduce_": rows(
        "index_reduce_", lambda h: bins(h, 2, 9, 6).index_reduce_(1, PLACES, h[:, 2:], "mean")
    ),
    "index_fill": rows("index_fill", lambda h: h.index_fill(1, PLACES, 2.0)),
    "index_fill_": rows(
        "index_fill_", lambda h: written(h, lambda y: y.index_fill_(1, PLACES, 2.0))
    ),
    "gather": rows("gather", lambda h: h.gather(1, at(h))),
    "gather-by-units": rows("gather", lambda h: h.gather(1, codes(h))),
    "gather-in-a-table": Case(
        lambda: Lookup(lambda t, code, h: t.expand(2, 5, 4).gather(-1, code)), "gather"
    ),
    "take_along_dim": rows("gather", lambda h: torch.take_along_dim(h, PLACES[None, :, None], 1)),
    "scatter": rows("scatter", lambda h: h.scatter(1, at(h), h[:, 2:])),
    "scatter-value": rows("scatter", lambda h: h.scatter(1, at(h), 2.0)),
    "scatter-multiply": rows("scatter", lambda h: h.scatter(1, at(h), h[:, 2:], reduce="multiply")),
    "scatter_": rows("scatter_", lambda h: bins(h, 2, 9, 6).scatter_(1, at(h), h[:, 2:])),
    "scatter-units-marked": rows(
        "scatter_", lambda h: h.norm() * bins(h, 2, 5, 4).scatter_(-1, codes(h), 1.0), 4
    ),
    "one_hot": Case(
        lambda: Lookup(lambda t, c, h: (F.one_hot(c, 4).to(h) * t).sum(-1)), "scatter_ aminmax"
    ),
    "scatter_add": rows("scatter_add", lambda h: h.scatter_add(1, at(h), h[:, 2:])),
    "scatter_add_": rows(
        "scatter_add_", lambda h: bins(h, 2, 9, 6).scatter_add_(1, at(h), h[:, 2:])
    ),
    "scatter_add-units": rows(
        "scatter_add", lambda h: bins(h, 2, 5, 4).scatter_add(-1, codes(h), h), 4
    ),
    "scatter_reduce": rows(
        "scatter_reduce", lambda h: h.scatter_reduce(1, at(h), h[:, 2:], "amax")
    ),
    "scatter_reduce_": rows(
        "scatter_reduce_",
        lambda h: bins(h, 2, 9, 6).scatter_reduce_(1, at(h), h[:, 2:], "mean", include_self=False),
    ),
    "graph-attention": Case(Attention, "index index_select scatter_reduce scatter_add_"),
    "take": Case(lambda: Lookup(lambda table, code, h: table.take(code)), "take"),
    "bag-sum": Case(lambda: Bags("sum"), "_embedding_bag"),
    "bag-sum-of-rows": rows(
        "_embedding_bag_forward_only",
        lambda h: F.embedding_bag(torch.stack(CORNERS), h[0], mode="sum"),
    ),
    "bag-mean": Case(lambda: Bags("mean"), "_embedding_bag"),
    "bag-mean-of-rows": rows(
        "_embedding_bag_forward_only",
        lambda h: F.embedding_bag(torch.stack(CORNERS), h[0], mode="mean"),
    ),
    "bag-max": Case(lambda: Bags("max"), "_embedding_bag"),
    "bag-max-of-rows": rows(
        "_embedding_bag_forward_only",
        lambda h: F.embedding_bag(torch.stack(CORNERS), h[0], mode="max"),
    ),
    "bag-weighted": Case(lambda: Bags("sum", weighted=True), "_embedding_bag"),
    "bag-which": Case(Largest, "_embedding_bag"),
    "embedding-max-norm": Case(Renormed, "embedding embedding_renorm_"),
    "packed": rows("_pack_padded_sequence", lambda h: packed(h, ordered=True)),
    "packed-data": rows(
        "_pack_padded_sequence",
        lambda h: rnn.pack_padded_sequence(h, torch.tensor([5, 3]), batch_first=True).data,
    ),
    "packed-sorted": rows("_pack_padded_sequence sort", lambda h: packed(h, ordered=False)),
    "flip": rows("flip", lambda h: h.flip(0, -2)),
    "roll": rows("roll", lambda h: h.roll((1, 2), (0, -2))),
    "rot90": image("rot90", lambda x: x.rot90(1, (2, 3))),
    "rot90-leading": rows("rot90", lambda h: h.rot90()),
    "tril": image("tril", lambda x: x.tril(1)),
    "triu": image("triu", lambda x: x.triu()),
    "tril_": image("tril_", lambda x: x.tril_()),
    "triu_": image("triu_", lambda x: x.triu_(-1)),
    "diagonal": image("diagonal", lambda x: x.diagonal(1, -2, -1).unsqueeze(-1)),
    "diagonal-of-units": rows("diagonal", lambda h: (h.mT @ h).diagonal(0, 1, 2)),
    "diag": rows("diagonal_copy", lambda h: (h[0].T @ h[1]).diag()),
    "diag_embed": rows("diag_embed", lambda h: h.mT.diag_embed(1).sum((2, 3))),
    "diag_embed-of-units": rows("diag_embed", lambda h: h.diag_embed().cumsum(1).sum(2)),
    "diag_embed-of-units-not-adjacent": rows("diag_embed", lambda h: h.diag_embed(0, 1, 3).sum(1)),
    "repeat": rows("repeat", lambda h: h.repeat(3, 1, 2, 1)),
    "repeat-units": rows("repeat", lambda h: h.repeat(1, 1, 2), 12, (2, 6)),
    "tile": rows("repeat", lambda h: h.tile(2, 1)),
    "repeat_interleave": rows(
        "index_select", lambda h: h.repeat_interleave(torch.tensor([1, 0, 2, 1, 3]), 1)
    ),
    "as_strided": rows("as_strided", lambda h: h.as_strided(h.shape, h.stride())),
    "unfold": rows("unfold", lambda h: h.unfold(1, 2, 1).prod(-1)),
    "unfold-flat": rows("unfold", lambda h: h.unfold(1, 2, 1).flatten(-2), 12),
    "im2col": image("im2col", lambda x: F.unfold(x, 2).unsqueeze(-1), last=24),
    "col2im": image("im2col col2im", lambda x: F.fold(F.unfold(x, 3) ** 2, 8, 3)),
    "pixel_shuffle": image("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), 3, 12, groups=(3,)),
    "pixel_unshuffle": image("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), 24),
    "channel_shuffle": image("channel_shuffle", lambda x: F.channel_shuffle(x, 2), groups=(2, 3)),
    "native_channel_shuffle": image(
        "native_channel_shuffle", lambda x: torch.native_channel_shuffle(x, 3), groups=(2, 3)
    ),
    "grid_sample": image("grid_sampler_2d", lambda x: sampled(x, "bilinear")),
    "grid_sample-cubic": image("grid_sampler_2d", lambda x: sampled(x, "bicubic")),
    "grid_sample-volume": image("grid_sampler_3d", sampled_volume),
    "grid_sample-by-pairs": rows("grid_sampler_2d", sampled_by_pairs, 3, (3,)),
    "grid_sample-by-units": rows("grid_sampler_2d", sampled_by_units),
    "adaptive_avg_pool-channels-last": image(
        "as_strided_",
        lambda x: x * F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1),
    ),
    "sort": rows("sort", lambda h: h.sort(1)[0]),
    "sort-stable": rows("sort", lambda h: h.sort(dim=-2, stable=True)[1].to(h)),
    "argsort": rows("sort", lambda h: h.argsort(0).to(h)),
    "topk": rows("topk", lambda h: h.topk(2, 1)[0]),
    "cumsum": rows("cumsum", lambda h: h.cumsum(1)),
    "cumsum_": rows("cumsum_", lambda h: h.cumsum_(1)),
    "cumprod": rows("cumprod", lambda h: h.cumprod(-2)),
    "cumprod_": rows("cumprod_", lambda h: h.cumprod_(1)),
    "cummax": rows("cummax", lambda h: torch.stack([h.cummax(1)[0], h.cummax(1)[1].to(h)])),
    "cummin": rows("cummin", lambda h: h.cummin(1)[0]),
    "logcumsumexp": rows("logcumsumexp", lambda h: h.logcumsumexp(1)),
    "argmax": rows("argmax", lambda h: h.argmax(1).to(h)),
    "argmin": rows("argmin", lambda h: h.argmin(1, keepdim=True).to(h)),
    "max": rows("max", lambda h: h * h.max()),
    "max-dim": rows("max", lambda h: h.max(1)[0] + h.max(1, keepdim=True)[1]),
    "min": rows("min", lambda h: h * h.min()),
    "median": rows("median", lambda h: h * h.median()),
    "median-dim": rows("median", lambda h: h.median(-2)[0]),
    "nanmedian": rows("nanmedian", lambda h: h.nanmedian(1)[0] + h.nanmedian()),
    "kthvalue": rows("kthvalue", lambda h: h.kthvalue(2, 1)[0]),
    "mode": rows("mode", lambda h: h.round().mode(1)[0]),
    "aminmax": rows("aminmax", lambda h: h * (h.aminmax()[0] + h.aminmax(dim=-1, keepdim=True)[1])),
    "scalar": rows(
        "sort cumsum max argmax aminmax var linalg_vector_norm", lambda h: h * of_one_value(h.sum())
    ),
    "mv": rows("mv", lambda h: h[0].T.mv(ramp(h))),
    "mv-of-units": rows("mv", lambda h: h[0].mv(h[1, 0]), 5),
    "addmv": rows("addmv", lambda h: torch.addmv(h[1, 0], h[0].T, ramp(h))),
    "addmv-broadcast": rows("addmv", lambda h: torch.addmv(h.sum().view(1), h[0].T, ramp(h))),
    "addr": rows("addr", lambda h: torch.addr(h[0], ramp(h), h[1, 2])),
    "dot": rows("dot", lambda h: h * h[0, 0].dot(h[1, 1])),
    "vdot": rows("vdot", lambda h: h * torch.vdot(h[0, 0], h[1, 1])),
    "dist": rows("dist", lambda h: h * torch.dist(h, h.flip(1))),
    "bilinear": Case(Pairs, "_trilinear", (5, 6, 7)),
    "var": rows("var", lambda h: h / h.var(-1, keepdim=True)),
    "var-places": rows("var", lambda h: h.var(1, correction=0)),
    "std": rows("std", lambda h: h / h.std()),
    "var_mean": rows("var_mean", lambda h: h - torch.var_mean(h, -1, keepdim=True)[1]),
    "std_mean": rows("std_mean", lambda h: torch.std_mean(h, (0, 1))[0]),
    "norm": rows(
        "linalg_vector_norm", lambda h: F.normalize(h, dim=-1) * h.norm(p=1, dim=1, keepdim=True)
    ),
    "norm-of-all": rows("linalg_vector_norm", lambda h: h / h.norm()),
    "pairwise_distance": rows(
        "norm", lambda h: F.pairwise_distance(h, h.flip(1), keepdim=True) * h
    ),
    "renorm": rows("renorm", lambda h: h.renorm(2, 1, 0.5) + h.renorm(2, -1, 0.5)),
    "weight_norm": Case(lambda: Normed(0), "_weight_norm_interface", (5, 6)),
    "weight_norm-inputs": Case(lambda: Normed(1), "_weight_norm_interface norm", (5, 6)),
    "weight_norm-whole": Case(lambda: Normed(None), "norm", (5, 6)),
    "cdist": rows("_cdist_forward", lambda h: torch.cdist(h, h[:1]), 5),
    "cdist-many": rows("_euclidean_dist", lambda h: torch.cdist(h.repeat(1, 6, 1), 2 * h + 1), 5),
    "cdist-between-units": rows("_cdist_forward", lambda h: torch.cdist(h.mT, h.mT, p=1).sum(1)),
    "cdist-broadcast": rows("_cdist_forward", lambda h: torch.cdist(h, 2 * h[0, :1] + 1), 1),
    "glu": rows("glu", F.glu, 3, (3,)),
    "glu-places": rows("glu", lambda h: F.glu(h[:, :4], 1)),
    "prelu": image("_prelu_kernel", nn.PReLU(6)),
    "prelu-one": rows("_prelu_kernel", nn.PReLU()),
    "hardswish": rows("hardswish", F.hardswish),
    "hardswish_": rows("hardswish_", lambda h: F.hardswish(h, inplace=True)),
    "logsigmoid": rows("log_sigmoid_forward", F.logsigmoid),
    "masked_fill_": rows("masked_fill_", lambda h: h.masked_fill_(MASK[:, None], 0.5)),
    "masked_fill_-by-units": rows("masked_fill_", lambda h: h.masked_fill_(h[0, 0] > 0, 0.5)),
    "abs_": rows("abs_", lambda h: h.abs_()),
    "mish_": rows("mish_", lambda h: F.mish(h, inplace=True)),
    "threshold_": rows("threshold_", lambda h: F.threshold(h, 0.1, 0.2, inplace=True)),
    "gelu_": rows("gelu_", lambda h: torch.ops.aten.gelu_(h)),
    "sparse-mm": rows("_sparse_addmm", lambda h: torch.sparse.mm(graph(h), h[0])),
    "sparse-addmm": rows("_sparse_addmm", lambda h: torch.sparse.addmm(h[1], graph(h), h[0])),
    "sparse-matmul": rows("mm _coalesce", lambda h: graph(h).coalesce() @ h[0]),
    "sparse-row-major": rows(
        "_to_sparse_csr mm", lambda h: torch.eye(5).to(h).to_sparse_csr() @ h[0]
    ),
    "sparse-mean": rows(
        "_sparse_mm_reduce_impl", lambda h: torch.sparse.mm(graph(h).to_sparse_csr(), h[0], "mean")
    ),
    "sparse-max": rows(
        "_sparse_mm_reduce_impl", lambda h: torch.sparse.mm(graph(h).to_sparse_csr(), h[0], "amax")
    ),
    "to_dense": rows("_to_dense _to_sparse", lambda h: h.relu().to_sparse().to_dense()),
    "complex": rows("complex view_as_real", lambda h: torch.complex(h, h.flip(1)).real),
    "complex-parts": rows("view_as_complex view_as_real", lambda h: (both(h) ** 2).imag),
    "complex-pairs": rows(
        "view_as_complex", lambda h: (torch.view_as_complex(h.view(2, 5, 3, 2)) ** 2).real, 3, (3,)
    ),
    "complex-flat": rows(
        "view_as_real", lambda h: torch.view_as_real(torch.complex(h, h.flip(1))).flatten(-2), 12
    ),
    "complex-conjugate": rows("_conj _neg_view", lambda h: both(h).conj().imag * both(h).abs()),
    "complex-polar": rows("polar", lambda h: torch.polar(h.abs(), h).real),
    "fourier": rows(
        "_fft_r2c _fft_c2r", lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=1), dim=1, n=4)
    ),
    "fourier-complex": rows("_fft_c2c", lambda h: torch.fft.ifft2(both(h), dim=(0, 1)).real),
}

HELD = {
    name: rows(operators, body, last, ())
    for name, (operators, body, last) in {
        "index": ("index", lambda h: h[..., UNITS], 3),
        "index-with-places": ("index", lambda h: h[:, PLACES, UNITS], 3),
        "index-not-adjacent": ("index", lambda h: h[CORNERS[0], :, UNITS], 5),
        "index-mask": ("index", lambda h: h[..., torch.tensor([True, False] * 3)], 3),
        "index-mask-of-a-constant": (
            "index",
            lambda h: ramp(h, 6)[h[0, 0] > h[0, 0].median()],
            3,
        ),
        "index-mask-by-units": ("index", lambda h: h[h > -99], 60),
        "index_put_": (
            "index_put_",
            lambda h: written(h, lambda y: y.__setitem__((..., UNITS), h[..., :3])),
            6,
        ),
        "index_put_-constant": (
            "index_put_",
            lambda h: written(h, lambda y: y.__setitem__((slice(None), PLACES), ramp(h, 6))),
            6,
        ),
        "index_put-last-wins": ("index_put", lambda h: bins(h, 4).index_put((codes(h),), h), 4),
        "index_put-mask": ("index_put", lambda h: h.index_put((h > -99,), ramp(h, 60)), 6),
        "index_select": ("index_select", lambda h: h.index_select(-1, UNITS), 3),
        "index_add": ("index_add", lambda h: h.index_add(2, UNITS, h[..., 3:]), 6),
        "index_add_": (
            "index_add_",
            lambda h: bins(h, 2, 5, 9).index_add_(2, torch.tensor([8, 0, 3, 3, 1, 5]), h),
            9,
        ),
        "index_copy": ("index_copy", lambda h: h.index_copy(2, UNITS, h[..., 3:]), 6),
        "index_copy-last-wins": (
            "index_copy_",
            lambda h: bins(h, 2, 5, 4).index_copy_(2, codes(h)[0, 0], h),
            4,
        ),
        "index_reduce": ("index_reduce", lambda h: h.index_reduce(2, UNITS, h[..., 3:], "amin"), 6),
        "index_fill": ("index_fill", lambda h: h.index_fill(2, UNITS, 2.0), 6),
        "index_fill_": ("index_fill_", lambda h: h.index_fill_(2, UNITS, 2.0), 6),
        "gather": ("gather", lambda h: h.gather(2, UNITS.expand(2, 5, 3)), 3),
        "gather-part-of-a-table": (
            "gather",
            lambda h: ramp(h, 36).view(4, 9).gather(0, codes(h)[0]),
            6,
        ),
        "gather-part": ("gather", lambda h: h.gather(1, at(h)[..., :4]), 4),
        "scatter": ("scatter", lambda h: h.scatter(2, UNITS.expand(2, 5, 3), h[..., 3:]), 6),
        "scatter-part": ("scatter", lambda h: h.scatter(1, at(h)[..., :4], h[:, 2:]), 6),
        "scatter-part-of-values": (
            "scatter_add",
            lambda h: bins(h, 2, 5, 6).scatter_add(2, UNITS.expand(2, 5, 3), h),
            6,
        ),
        "scatter_add-by-constant": (
            "scatter_add",
            lambda h: bins(h, 2, 5, 4).scatter_add(2, codes(ramp(h, 6)).expand(2, 5, 6), h),
            4,
        ),
        "scatter_add-part-of-a-constant": (
            "scatter_add",
            lambda h: bins(h, 2, 5, 4).scatter_add(2, codes(h), ramp(h, 9).expand(2, 5, 9)),
            4,
        ),
        "scatter-last-wins": ("scatter", lambda h: bins(h, 2, 5, 4).scatter(2, codes(h), h), 4),
        "scatter-value": ("scatter", lambda h: h.scatter(2, UNITS.expand(2, 5, 3), 2.0), 6),
        "scatter_add": (
            "scatter_add",
            lambda h: h.scatter_add(2, UNITS.expand(2, 5, 3), h[..., 3:]),
            6,
        ),
        "take": ("take", lambda h: h.take(UNITS), 3),
        "packed": ("_pack_padded_sequence", lambda h: packed(h.mT[:, :5], ordered=True), 5),
        "flip": ("flip", lambda h: h.flip(-1), 6),
        "roll": ("roll", lambda h: h.roll(1, -1), 6),
        "roll-as-one": ("roll", lambda h: h.roll(1), 6),
        "rot90": ("rot90", lambda h: h.rot90(1, (1, 2)), 5),
        "rot90-twice": ("rot90", lambda h: h.rot90(2, (1, 2)), 6),
        "tril": ("tril", lambda h: h.tril(), 6),
        "triu_": ("triu_", lambda h: h.triu_(), 6),
        "diagonal": ("diagonal", lambda h: h.diagonal(0, 1, 2), 5),
        "diagonal-of-rows": ("diagonal", lambda h: h.mT.diagonal(0, 1, 2), 5),
        "diagonal-of-unlike": (
            "diagonal",
            lambda h: (h.mT @ ramp(h, 30).view(5, 6)).diagonal(0, 1, 2),
            6,
        ),
        "diagonal-off-main": ("diagonal", lambda h: (h.mT @ h).diagonal(1, 1, 2), 5),
        "diag_embed": ("diag_embed", lambda h: h.diag_embed(1).sum(2), 7),
        "as_strided": ("as_strided", lambda h: h.as_strided((2, 5, 3), (30, 6, 2)), 3),
        "unfold": ("unfold", lambda h: h.unfold(2, 2, 2).prod(-1), 3),
        "im2col": ("im2col", lambda h: F.unfold(h.unsqueeze(1), 2), 20),
        "col2im": ("col2im", lambda h: F.fold(h.mT, (3, 5), (3, 1))[:, 0], 5),
        "pixel_unshuffle": ("pixel_unshuffle", lambda h: F.pixel_unshuffle(h[:, None, :4], 2), 3),
        "grid_sample": ("grid_sampler_2d", lambda h: sampled(h[:, None], "bilinear"), 4),
        "grid_sample-batch": (
            "grid_sampler_2d",
            lambda h: F.grid_sample(
                h.permute(2, 0, 1).unsqueeze(1),
                ramp(h, 144).view(6, 3, 4, 2) / 144,
                align_corners=False,
            ).sum((1, 2, 3)),
            6,
        ),
        "sort": ("sort", lambda h: h.sort()[1].to(h), 6),
        "topk": ("topk", lambda h: h.topk(3, sorted=False)[1].to(h), 3),
        "cumsum": ("cumsum", lambda h: h.cumsum(-1), 6),
        "cumprod_": ("cumprod_", lambda h: h.cumprod_(2), 6),
        "cummax": ("cummax", lambda h: h.cummax(2)[1].to(h), 6),
        "logcumsumexp": ("logcumsumexp", lambda h: h.logcumsumexp(2), 6),
        "argmax": ("argmax", lambda h: h.argmax(-1).to(h), 5),
        "argmin-of-all": ("argmin", lambda h: h.argmin().to(h).view(1), 1),
        "max": ("max", lambda h: h.max(-1)[1].to(h), 5),
        "median": ("median", lambda h: h.median(2)[1].to(h), 5),
        "kthvalue": ("kthvalue", lambda h: h.kthvalue(2)[1].to(h), 5),
        "mode": ("mode", lambda h: h.round().mode()[1].to(h), 5),
        "mv": ("mv", lambda h: h[0].mv(ramp(h, 6)), 5),
        "addmv": ("addmv", lambda h: torch.addmv(ramp(h, 6), h[0].T, ramp(h)), 6),
        "addr": ("addr", lambda h: torch.addr(ramp(h, 6), ramp(h), h[1, 2]), 6),
        "dot": ("dot", lambda h: h[0, 0].dot(ramp(h, 6)).view(1), 1),
        "dist": ("dist", lambda h: torch.dist(h, ramp(h, 6)).view(1), 1),
        "cdist": ("_cdist_forward", lambda h: torch.cdist(h, ramp(h, 12).view(1, 2, 6)), 2),
        "cdist-batch": (
            "_cdist_forward",
            lambda h: torch.cdist(h.mT.unsqueeze(-1), ramp(h, 6).view(6, 1, 1), p=1).sum((-2, -1)),
            6,
        ),
        "glu-split": ("glu", lambda h: F.glu(h.flatten(1)), 15),
        "glu": ("glu", lambda h: F.glu(torch.cat([h, h], -1).roll(1, -1)), 6),
        "prelu": ("_prelu_kernel", lambda h: F.prelu(h.view(10, 6), ramp(h, 6)), 6),
        "masked_fill_": ("masked_fill_", lambda h: h.masked_fill_(ramp(h, 6) > 2, 0.5), 6),
        "sparse-mm": ("_sparse_addmm", lambda h: torch.sparse.mm(graph(h, 6), h[0].T), 5),
        "sparse-addmm": (
            "_sparse_addmm",
            lambda h: torch.sparse.addmm(ramp(h, 6), graph(h), h[0]),
            6,
        ),
        "sparse-mean": (
            "_sparse_mm_reduce_impl",
            lambda h: torch.sparse.mm(graph(h, 6).to_sparse_csr(), h[0].T, "mean"),
            5,
        ),
        "fourier": ("_fft_r2c", lambda h: torch.fft.rfft(h).real, 4),
        "fourier-back": ("_fft_c2r", lambda h: torch.fft.irfft(both(h)), 10),
        "fourier-complex": ("_fft_c2c", lambda h: torch.fft.fft(both(h)).real, 6),
    }.items()
}
# Six hidden channels and two constant ones: blocks of four split the hidden channels.
SPLIT = {
    "pixel_shuffle": image(
        "pixel_shuffle", lambda x: F.pixel_shuffle(filled(x), 2), last=2, groups=()
    ),
    "col2im": image(
        "col2im", lambda x: F.fold(filled(x).flatten(2), 16, 2, stride=2), last=2, groups=()
    ),
}
TABLES = {"kept": KEPT, "held": HELD, "split": SPLIT}
CASES = {f"{kind}-{name}": case for kind, table in TABLES.items() for name, case in table.items()}
