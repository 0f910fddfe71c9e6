"""Other nets: reparametrisations, experts, tabular nets, unusual uses of parameters."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from zoo.entry import Entry, features, numbers


def weight_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(3, 6, 3)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.ConvTranspose1d(6, 5, 3), dim=1),
        nn.ReLU(),
        nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(5 * 8, 7)),
        nn.Tanh(),
        nn.Linear(7, 2),
    )


def spectrally_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv1d(3, 6, 3)),
        nn.ReLU(),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(6 * 6, 7)),
        nn.ReLU(),
        nn.Linear(7, 2),
    )


def old_weight_normed() -> nn.Module:
    """Use the deprecated function, without gradients, so that the model can be copied."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(
            weight_norm(nn.Linear(4, 7)),
            nn.ReLU(),
            weight_norm(nn.Linear(7, 5), dim=None),
            nn.ReLU(),
            nn.Linear(5, 2),
        )


class Experts(nn.Module):
    """Stacked experts with soft gates; if `best` is given, only that many."""

    def __init__(self, best: int | None = None) -> None:
        super().__init__()
        self.best = best
        self.stem = nn.Linear(4, 6)
        self.gate = nn.Linear(6, 5, bias=False)
        self.up = nn.Parameter(torch.randn(5, 6, 8) / 2)
        self.bias = nn.Parameter(torch.zeros(5, 1, 8))
        self.down = nn.Parameter(torch.randn(5, 8, 7) / 2)
        self.head = nn.Linear(7, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.stem(inputs))
        scores = self.gate(hidden)
        if self.best is not None:
            least = scores.topk(self.best, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        inside = F.gelu(torch.bmm(hidden.expand(5, -1, -1), self.up) + self.bias)
        found = torch.bmm(inside, self.down)
        return self.head(torch.tanh((scores.softmax(-1).t()[:, :, None] * found).sum(0)))


class Routed(nn.Module):
    """A few experts for each row, selected by index."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 5)
        self.up = nn.Parameter(torch.randn(5, 4, 8))
        self.down = nn.Parameter(torch.randn(5, 8, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        weights, chosen = self.gate(inputs).softmax(-1).topk(2, dim=-1)
        inside = torch.einsum("bi,bkih->bkh", inputs, self.up[chosen])
        found = torch.einsum("bkh,bkho->bko", torch.relu(inside), self.down[chosen])
        return (found * weights[:, :, None]).sum(1)


class ModuleExperts(nn.Module):
    """Experts in separate modules: they are pinned, but their hidden units are free."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 8))
            for width in (5, 6, 7)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        weights = self.gate(inputs).softmax(-1)
        found = torch.stack([expert(inputs) for expert in self.experts], dim=1)
        return self.head(torch.relu((weights[:, :, None] * found).sum(1)))


class Hyper(nn.Module):
    """A net that computes the weights of another net."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Sequential(nn.Linear(3, 7), nn.Tanh())
        self.weight = nn.Linear(7, 6 * 4)
        self.bias = nn.Linear(7, 6)
        self.out = nn.Linear(7, 2 * 6)

    def forward(self, inputs: Tensor, condition: Tensor) -> Tensor:
        code = self.condition(condition)
        weight, out = self.weight(code).view(-1, 6, 4), self.out(code).view(-1, 2, 6)
        hidden = torch.bmm(weight, inputs.unsqueeze(-1)).squeeze(-1) + self.bias(code)
        return torch.bmm(out, torch.relu(hidden).unsqueeze(-1)).squeeze(-1)


class Bare(nn.Module):
    """Parameters without modules, used by matmul, broadcasting and powers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Parameter(torch.randn(4, 7))
        self.shift = nn.Parameter(torch.zeros(7))
        self.slope = nn.Parameter(torch.ones(1, 7))
        self.inside = nn.ParameterList([nn.Parameter(torch.randn(7, 5)), torch.zeros(5)])
        self.leave = nn.Parameter(torch.randn(2, 5))
        self.level = nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = (inputs @ self.enter - self.shift) * self.slope
        hidden = torch.where(hidden > 0, hidden, self.level * hidden)
        hidden = torch.addmm(self.inside[1], hidden, self.inside[0]).relu_()
        return torch.matmul(self.leave, hidden.t()).T ** 2


class Thrice(nn.Module):
    """A submodule called three times on one input, and once on another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(3, 6)
        self.block = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.LayerNorm(6))
        self.head = nn.Linear(6, 2)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        hidden = self.first(first)
        for _ in range(3):
            hidden = torch.tanh(self.block(hidden))
        return self.head(hidden) + self.head(self.block(self.second(second)))


class Choosing(nn.Module):
    """Control flow on shapes, on a flag and on an optional argument."""

    def __init__(self, deep: bool = True) -> None:
        super().__init__()
        self.deep = deep
        self.first, self.second = nn.Linear(4, 7), nn.Linear(7, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, inputs: Tensor, flag: bool, mask: Tensor | None = None) -> Tensor:
        if inputs.ndim == 3:
            inputs = inputs.mean(1)
        hidden = self.first(inputs)
        hidden = torch.relu(hidden) if flag else torch.tanh(hidden)
        if self.deep:
            hidden = torch.sin(self.second(hidden))
        if mask is not None:
            hidden = hidden * mask
        return self.head(hidden)


class Nested(nn.Module):
    """Nested outputs, one of which is a layer of hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.shown, self.hidden = nn.Linear(4, 6), nn.Linear(6, 7)
        self.heads = nn.ModuleDict({"mean": nn.Linear(7, 2), "spread": nn.Linear(7, 2)})

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        shown = torch.relu(self.shown(inputs))
        hidden = torch.relu(self.hidden(shown))
        mean, spread = self.heads["mean"](hidden), self.heads["spread"](hidden)
        return {"normal": (mean, [F.softplus(spread)]), "extra": {"shown": shown, "none": None}}


class NestedInputs(nn.Module):
    """A dict and a tuple among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, *, pair: tuple[Tensor, Tensor], options: dict[str, Tensor]) -> Tensor:
        hidden = self.left(pair[0]) + self.right(pair[1])
        return self.head(torch.relu(hidden)) * options["scale"]


class Maxout(nn.Module):
    """Maxout: each unit is the largest of several pieces, which may be permuted."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6 * 3)
        self.second = nn.Linear(6, 5 * 7)
        self.head = nn.Linear(7, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).view(-1, 6, 3).max(dim=-1).values
        return self.head(self.second(hidden).view(-1, 5, 7).amax(1))


class Highway(nn.Module):
    """Highway layers: a gate between the old and the new hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.new = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.gate = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        for new, gate in zip(self.new, self.gate, strict=True):
            hidden = torch.lerp(hidden, torch.relu(new(hidden)), torch.sigmoid(gate(hidden)))
        return self.head(hidden)


class Siamese(nn.Module):
    """One net for two inputs; the outputs are an angle and a distance."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        one, other = self.net(left), self.net(right)
        return F.cosine_similarity(one, other), F.pairwise_distance(one, other)


class Contrastive(nn.Module):
    """CLIP: all dot products of the normalised outputs of two nets."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5))
        self.right = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        one, other = F.normalize(self.left(left), dim=-1), F.normalize(self.right(right), dim=-1)
        return self.scale.exp() * one @ other.t()


class Mixture(nn.Module):
    """A mixture of softmaxes, whose components may be permuted."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 7)
        self.prior = nn.Linear(7, 3)
        self.logits = nn.Linear(7, 3 * 5)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(inputs))
        prior = self.prior(hidden).log_softmax(-1)
        logits = self.logits(hidden).view(-1, 3, 5).log_softmax(-1)
        return torch.logsumexp(prior.unsqueeze(-1) + logits, dim=1)


class Bag(nn.Module):
    """Bags of embeddings, by the mean and by a weighted sum."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.EmbeddingBag(11, 5, mode="mean")
        self.sum = nn.EmbeddingBag(11, 6, mode="sum")
        self.head = nn.Linear(11, 2)

    def forward(self, tokens: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        mean = self.mean(tokens, offsets)
        total = self.sum(tokens, offsets, per_sample_weights=weights)
        return self.head(torch.relu(torch.cat([mean, total], dim=1)))


class Factors(nn.Module):
    """A factorisation machine: products of all pairs of embeddings."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.first = nn.Embedding(12, 1)
        self.embed = nn.Embedding(12, 5)
        self.deep = nn.Sequential(nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 1)) if deep else None

    def forward(self, fields: Tensor) -> Tensor:
        embedded = self.embed(fields)
        pairs = embedded.sum(1).square() - embedded.square().sum(1)
        score = self.first(fields).sum(1) + 0.5 * pairs.sum(1, keepdim=True)
        if self.deep is not None:
            score = score + self.deep(embedded.flatten(1))
        return torch.sigmoid(score)


class WideDeep(nn.Module):
    """Wide and deep: embeddings and numbers in a deep net, and a linear path."""

    def __init__(self) -> None:
        super().__init__()
        self.embeds = nn.ModuleList([nn.Embedding(11, 5), nn.Embedding(7, 6)])
        self.norm = nn.BatchNorm1d(14)
        self.deep = nn.Sequential(nn.Linear(14, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.wide = nn.Linear(3, 1)

    def forward(self, kinds: Tensor, values: Tensor) -> Tensor:
        columns = [embed(kinds[:, place]) for place, embed in enumerate(self.embeds)]
        return self.deep(self.norm(torch.cat([*columns, values], dim=1))) + self.wide(values)


class Crossing(nn.Module):
    """Deep & cross: each layer multiplies by the first layer's units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.cross = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.low = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        start = hidden = torch.tanh(self.stem(inputs))
        for layer in self.cross:
            hidden = torch.addcmul(hidden, start, layer(hidden))
        return self.head(start * self.low(hidden) + hidden)


class RadialKan(nn.Module):
    """A sum of learned functions of each input, in a learned basis, which may be permuted."""

    def __init__(self, enter: int, leave: int, basis: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.linspace(-1, 1, basis))
        self.weight = nn.Parameter(torch.randn(leave, enter, basis) / enter)
        self.base = nn.Parameter(torch.randn(leave, enter) / enter)

    def forward(self, inputs: Tensor) -> Tensor:
        basis = torch.exp(-((inputs.unsqueeze(-1) - self.centres) ** 2))
        found = torch.einsum("big,oig->bo", basis, self.weight)
        return found + F.linear(F.silu(inputs), self.base)


class Sine(nn.Module):
    """SIREN: sines of random Fourier features, whose frequencies are in a buffer."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(3, 4), persistent=False)
        self.first, self.second = nn.Linear(8, 7), nn.Linear(7, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, places: Tensor) -> Tensor:
        angles = 2 * math.pi * places @ self.frequencies
        hidden = torch.cat([angles.sin(), angles.cos()], dim=-1)
        hidden = torch.sin(3 * self.first(hidden))
        return self.head(torch.sin(3 * self.second(hidden)))


class ResidualMlp(nn.Module):
    """Residual blocks with the given norms."""

    def __init__(self, *norms: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.norms = nn.ModuleList(norms)
        self.up = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 9)])
        self.down = nn.ModuleList([nn.Linear(8, 6), nn.Linear(9, 6)])
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            hidden = hidden + down(F.gelu(up(norm(hidden))))
        return self.head(hidden)


class RootMean(nn.Module):
    """RMSNorm by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        mean = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(mean + 1e-6))


class HandNorm(nn.Module):
    """LayerNorm by hand, from the mean and the variance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        mean = hidden.mean(-1, keepdim=True)
        variance = hidden.var(-1, keepdim=True, unbiased=False)
        return (hidden - mean) / torch.sqrt(variance + 1e-6) * self.scale + self.shift


class SwiGlu(nn.Module):
    """A gate and a value, in one layer or in two."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.stem = nn.Linear(4, 6)
        self.up = nn.Linear(6, 14) if fused else nn.Linear(6, 7)
        self.gate = None if fused else nn.Linear(6, 7)
        self.down = nn.Linear(7, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        if self.gate is None:
            value, gate = self.up(hidden).tensor_split(2, dim=-1)
        else:
            value, gate = self.up(hidden), self.gate(hidden)
        return self.head(hidden + self.down(F.silu(gate) * value))


class Placed(nn.Module):
    """Learned positions are added to tokens, and a convolution mixes the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.places = nn.Parameter(torch.zeros(1, 12, 6))
        self.mix = nn.Conv1d(6, 7, 3, padding=1)
        self.head = nn.Linear(7, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) + self.places[:, : tokens.shape[1]]
        return self.head(torch.relu(self.mix(hidden.mT)).mT)


class TwoUses(nn.Module):
    """One parameter used as a bias, as a scale and as a row of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.randn(6))
        self.first = nn.Parameter(torch.randn(6, 4))
        self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 5, bias=False)
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(inputs, self.first, self.shared))
        hidden = torch.relu(self.second(hidden)) * self.shared
        weight = torch.cat([self.third.weight, self.shared[None]], dim=0)
        return self.head(torch.sigmoid(hidden @ weight.t()))


class Rejoined(nn.Module):
    """Hidden units are cut into unequal parts and concatenated in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 15)
        self.head = nn.Linear(15, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        first, second, third = hidden[:, :4], hidden.narrow(1, 4, 5), hidden[..., -6:]
        joined = torch.cat([torch.tanh(third), torch.relu(first), torch.sigmoid(second)], dim=-1)
        return self.head(joined)


class Pairing(nn.Module):
    """A bilinear layer between two nets."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(3, 7)
        self.pair = nn.Bilinear(6, 7, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = torch.relu(self.left(left)), torch.tanh(self.right(right))
        return self.head(torch.relu(self.pair(left, right)))


class Outer(nn.Module):
    """Bilinear pooling: the flattened outer product of two nets."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(3, 6)
        self.head = nn.Linear(30, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = torch.relu(self.left(left)), torch.tanh(self.right(right))
        return self.head(torch.einsum("bi,bj->bij", left, right).flatten(1))


class Capsules(nn.Module):
    """Capsules with a common norm; capsules may be permuted, and so may the units in each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 5 * 6)
        self.head = nn.Linear(5 * 6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs).view(-1, 5, 6)
        norm = hidden.norm(dim=-1, keepdim=True)
        return self.head((hidden * norm / (1 + norm**2)).flatten(1))


class Codebook(nn.Module):
    """Distances to learned centres, and a soft choice of a centre."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 6)
        self.centres = nn.Parameter(torch.randn(8, 6))
        self.decode = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        code = torch.tanh(self.encode(inputs))
        distance = (code[:, None] - self.centres).square().sum(-1)
        return self.decode(torch.relu((-distance).softmax(1) @ self.centres))


class Crowd(nn.Module):
    """Deep sets, and a variational code without its noise."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(3, 7), nn.Softplus(), nn.Linear(7, 5))
        self.mean, self.spread = nn.Linear(10, 6), nn.Linear(10, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, items: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.each(items)
        weight = present.to(hidden.dtype)[..., None]
        mean = (hidden * weight).sum(1) / weight.sum(1)
        most = hidden.masked_fill(~present[..., None], -torch.inf).max(dim=1)[0]
        pooled = torch.cat([mean, most], dim=-1)
        mean, spread = self.mean(pooled), self.spread(pooled)
        loss = -0.5 * (1 + spread - mean**2 - spread.exp()).sum(1)
        return self.head(torch.sin(mean) * torch.exp(0.5 * spread)), loss


class Ensemble(nn.Module):
    """Averaged nets, stacked in one parameter; they may be permuted."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(5, 4, 7))
        self.shift = nn.Parameter(torch.randn(5, 1, 7))
        self.second = nn.Parameter(torch.randn(5, 7, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(torch.baddbmm(self.shift, inputs.expand(5, -1, -1), self.first))
        return torch.bmm(hidden, self.second).softmax(-1).mean(0)


ROWS = features(3, 4)


def two(left: int = 4, right: int = 3) -> dict[str, Tensor]:
    return {"left": torch.zeros(3, left), "right": torch.zeros(3, right)}


MISC = {
    "weight-norm": Entry(weight_normed, features(2, 3, 8), (5, 6, 7)),
    "weight-norm-old": Entry(old_weight_normed, ROWS, (5, 7)),
    "spectral-norm": Entry(spectrally_normed, features(2, 3, 8), (6, 7)),
    "experts-soft": Entry(Experts, ROWS, (5, 6, 7, 8)),
    "experts-best": Entry(lambda: Experts(best=2), ROWS, (5, 6, 7, 8)),
    "experts-routed": Entry(Routed, ROWS, (8,)),
    "experts-modules": Entry(ModuleExperts, ROWS, (5, 6, 7, 8)),
    "hypernetwork": Entry(
        Hyper, lambda: {"inputs": torch.zeros(3, 4), "condition": torch.zeros(3, 3)}, (6, 7)
    ),
    "bare-parameters": Entry(Bare, ROWS, (5, 7)),
    "shared-thrice": Entry(
        Thrice, lambda: {"first": torch.zeros(3, 4), "second": torch.zeros(3, 3)}, (6, 8)
    ),
    "control-flow": Entry(Choosing, lambda: {"inputs": torch.zeros(3, 5, 4), "flag": True}, (5, 7)),
    "control-flow-shallow-mask": Entry(
        Choosing,
        lambda: {"inputs": torch.zeros(3, 4), "flag": False, "mask": torch.zeros(3, 1)},
        (5, 7),
    ),
    "nested-outputs": Entry(Nested, ROWS, (7,)),
    "nested-inputs": Entry(
        NestedInputs,
        lambda: {
            "pair": (torch.zeros(3, 4), torch.zeros(3, 3)),
            "options": {"scale": torch.zeros(3, 1)},
        },
        (6,),
    ),
    "maxout": Entry(Maxout, ROWS, (3, 5, 6, 7)),
    "highway": Entry(Highway, ROWS, (6,)),
    "siamese": Entry(Siamese, lambda: two(4, 4), (5, 7)),
    "contrastive": Entry(Contrastive, two, (5, 7, 8)),
    "mixture-of-softmaxes": Entry(Mixture, ROWS, (3, 7)),
    "embedding-bag": Entry(
        Bag,
        lambda: {
            "tokens": numbers(11, 8)(),
            "offsets": torch.tensor([0, 3]),
            "weights": torch.zeros(8),
        },
        (5, 6),
    ),
    "factorisation-machine": Entry(lambda: Factors(deep=False), numbers(12, 3, 4), (5,)),
    "deep-fm": Entry(lambda: Factors(deep=True), numbers(12, 3, 4), (5, 7)),
    "wide-and-deep": Entry(
        WideDeep,
        lambda: {"kinds": numbers(7, 3, 2)(), "values": torch.zeros(3, 3)},
        (5, 6, 8),
    ),
    "deep-and-cross": Entry(Crossing, ROWS, (3, 6)),
    "tabular-batchnorm": Entry(
        lambda: nn.Sequential(
            nn.BatchNorm1d(4),
            nn.Linear(4, 7),
            nn.BatchNorm1d(7),
            nn.SELU(),
            nn.AlphaDropout(0.0),
            nn.Linear(7, 5),
            nn.BatchNorm1d(5, affine=False),
            nn.CELU(),
            nn.Linear(5, 2),
        ),
        ROWS,
        (5, 7),
    ),
    "kan": Entry(lambda: nn.Sequential(RadialKan(4, 6, 5), RadialKan(6, 2, 7)), ROWS, (5, 6, 7)),
    "siren": Entry(Sine, features(5, 3), (5, 7)),
    "layer-norm-without-affine": Entry(
        lambda: ResidualMlp(*(nn.LayerNorm(6, elementwise_affine=False) for _ in range(2))),
        ROWS,
        (6, 8, 9),
    ),
    "rms-norm": Entry(lambda: ResidualMlp(nn.RMSNorm(6), nn.RMSNorm(6)), ROWS, (6, 8, 9)),
    "norms-by-hand": Entry(lambda: ResidualMlp(RootMean(6), HandNorm(6)), ROWS, (6, 8, 9)),
    "swiglu": Entry(lambda: SwiGlu(fused=False), ROWS, (6, 7)),
    "swiglu-fused": Entry(lambda: SwiGlu(fused=True), ROWS, (6, 7)),
    "learned-positions": Entry(Placed, numbers(11, 2, 9), (6, 7)),
    "two-uses": Entry(TwoUses, ROWS, (5, 6)),
    "split-unequal-rejoined": Entry(Rejoined, ROWS, (4, 5, 6)),
    "bilinear": Entry(Pairing, two, (5, 6, 7)),
    "outer-product": Entry(Outer, two, (5, 6)),
    "capsules": Entry(Capsules, ROWS, (5, 6)),
    "codebook": Entry(Codebook, ROWS, (6, 8)),
    "deep-sets": Entry(
        Crowd,
        lambda: {
            "items": torch.zeros(2, 9, 3),
            "present": torch.arange(9) < torch.tensor([[9], [6]]),
        },
        (5, 6, 7),
    ),
    "ensemble": Entry(Ensemble, ROWS, (5, 7)),
}
