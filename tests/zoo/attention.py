"""Attention as people write it: heads may be permuted, and so may the units within each head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.entry import Entry, features, numbers


class Framed(nn.Module):
    """A residual block between two linear layers."""

    def __init__(self, width: int, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.block = block
        self.head = nn.Linear(width, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        return self.head(hidden + self.block(hidden))


def split_heads(inputs: Tensor, heads: int) -> Tensor:
    """Reshape `(batch, tokens, heads * units)` to `(batch, heads, tokens, units)`."""
    batch, tokens, width = inputs.shape
    return inputs.view(batch, tokens, heads, width // heads).transpose(1, 2)


def merge_heads(inputs: Tensor) -> Tensor:
    """Reshape `(batch, heads, tokens, units)` to `(batch, tokens, heads * units)`."""
    return inputs.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    return (scores if bias is None else scores + bias).softmax(-1) @ value


class SelfAttention(nn.Module):
    """nn.MultiheadAttention of a sequence to itself."""

    def __init__(self, width: int, heads: int, batch_first: bool = True, extra: bool = False):
        super().__init__()
        self.inner = nn.MultiheadAttention(
            width, heads, batch_first=batch_first, add_bias_kv=extra, add_zero_attn=extra
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden, hidden, hidden, need_weights=False)[0]


class Masked(nn.Module):
    """nn.MultiheadAttention with padded keys and the weights averaged over the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 20)
        self.inner = nn.MultiheadAttention(20, 5, batch_first=True, bias=False)
        self.head = nn.Linear(20, 2)

    def forward(self, inputs: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.stem(inputs))
        found, weights = self.inner(hidden, hidden, hidden, key_padding_mask=padding)
        return self.head(hidden + found), weights


class ShownHeads(nn.Module):
    """Returns the attention maps of all heads, so that the heads are pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 20)
        self.inner = nn.MultiheadAttention(20, 5, batch_first=True)
        self.head = nn.Linear(20, 2)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.stem(inputs)
        found, weights = self.inner(hidden, hidden, hidden, average_attn_weights=False)
        return self.head(hidden + found), weights


class Mixed(nn.Module):
    """Queries, keys and values of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(5, 12)
        self.key = nn.Linear(5, 7)
        self.value = nn.Linear(5, 6)
        self.inner = nn.MultiheadAttention(12, 3, kdim=7, vdim=6, batch_first=True)
        self.head = nn.Linear(12, 2)

    def forward(self, inputs: Tensor, context: Tensor) -> Tensor:
        query, key, value = self.query(inputs), self.key(context), self.value(context)
        return self.head(query + self.inner(query, key, value, need_weights=False)[0])


def encoder_layer(
    heads: int, norm_first: bool = False, activation: str = "relu"
) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        12, heads, 7, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )


class PaddedEncoder(nn.Module):
    """nn.TransformerEncoder with padded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 12)
        layer = encoder_layer(3, norm_first=True, activation="gelu")
        self.inner = nn.TransformerEncoder(layer, 2, nn.LayerNorm(12), enable_nested_tensor=False)
        self.head = nn.Linear(12, 2)

    def forward(self, inputs: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(inputs), src_key_padding_mask=padding))


class Decoder(nn.Module):
    """nn.TransformerDecoder: causal self-attention, and attention to a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 12)
        self.memory = nn.Linear(6, 12)
        layer = nn.TransformerDecoderLayer(12, 3, 7, dropout=0.0, batch_first=True)
        self.inner = nn.TransformerDecoder(layer, 1)
        self.head = nn.Linear(12, 2)

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        tokens = inputs.shape[1]
        mask = torch.full((tokens, tokens), -torch.inf, dtype=inputs.dtype).triu(1)
        return self.head(self.inner(self.stem(inputs), self.memory(memory), tgt_mask=mask))


class Whole(nn.Module):
    """nn.Transformer: encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Linear(5, 12)
        self.target = nn.Linear(6, 12)
        self.inner = nn.Transformer(12, 2, 1, 1, 7, dropout=0.0, batch_first=True)
        self.head = nn.Linear(12, 2)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.inner(self.source(source), self.target(target)))


class Unbound(nn.Module):
    """Fused query, key and value, as in timm's ViT: reshape, permute, unbind."""

    def __init__(self, width: int, heads: int, units: int) -> None:
        super().__init__()
        self.heads, self.units = heads, units
        self.qkv = nn.Linear(width, 3 * heads * units)
        self.proj = nn.Linear(heads * units, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        qkv = self.qkv(hidden).reshape(batch, tokens, 3, self.heads, self.units)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        found = attend(query, key, value)
        return self.proj(found.transpose(1, 2).reshape(batch, tokens, self.heads * self.units))


class Indexed(Unbound):
    """The same by indexing `qkv[0]`, with tokens on the last axis."""

    def forward(self, hidden: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        qkv = self.qkv(hidden).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 4, 1)
        query, key, value = qkv[0], qkv[1], qkv[2]
        weights = (key.transpose(-2, -1) @ query).softmax(-2)
        return self.proj((value @ weights).permute(0, 3, 1, 2).reshape(batch, tokens, -1))


class Chunked(nn.Module):
    """Fused query, key and value, as in nanoGPT: split the last axis; causal."""

    def __init__(self, width: int, heads: int, units: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * heads * units)
        self.c_proj = nn.Linear(heads * units, width)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.c_attn(hidden).chunk(3, dim=-1)
        query, key, value = (split_heads(part, self.heads) for part in parts)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.c_proj(found.transpose(1, 2).contiguous().flatten(2))


class MaskBuffer(nn.Module):
    """A causal mask in a buffer; values wider than queries, all in one linear layer."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.c_attn = nn.Linear(10, 5 * (4 + 4 + 6), bias=False)
        self.c_proj = nn.Linear(5 * 6, 10)
        self.register_buffer("mask", torch.ones(9, 9, dtype=torch.bool).tril())

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.c_attn(hidden).split([20, 20, 30], dim=2)
        query, key, value = (split_heads(part, 5) for part in parts)
        tokens = hidden.shape[1]
        scores = query @ key.transpose(-2, -1) * key.size(-1) ** -0.5
        scores = scores.masked_fill(~self.mask[:tokens, :tokens], -torch.inf)
        return self.c_proj(merge_heads(self.drop(scores.softmax(-1)) @ value))


class MaskGiven(Chunked):
    """A mask in a non-persistent buffer, passed to PyTorch's attention."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__(10, 5, 4)
        mask = torch.ones(9, 9, dtype=torch.bool).tril().view(1, 1, 9, 9)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.c_attn(hidden).split(20, dim=2)
        query, key, value = (split_heads(part, self.heads) for part in (query, key, value))
        tokens = hidden.shape[1]
        found = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask[:, :, :tokens, :tokens], scale=0.3
        )
        return self.c_proj(merge_heads(found))


class Separate(nn.Module):
    """Separate projections; there may be more query heads than `shared` key and value heads."""

    def __init__(
        self,
        width: int = 10,
        heads: int = 3,
        shared: int | None = None,
        units: int = 4,
        value_units: int = 6,
        context: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.shared = heads, heads if shared is None else shared
        source = width if context is None else context
        self.q_proj = nn.Linear(width, heads * units)
        self.k_proj = nn.Linear(source, self.shared * units)
        self.v_proj = nn.Linear(source, self.shared * value_units)
        self.o_proj = nn.Linear(heads * value_units, width)

    def split(self, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            split_heads(self.q_proj(hidden), self.heads),
            split_heads(self.k_proj(context), self.shared),
            split_heads(self.v_proj(context), self.shared),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.o_proj(merge_heads(attend(*self.split(hidden, hidden))))


class Einsum(Separate):
    """The same with einsum, reshaping as einops does."""

    def forward(self, hidden: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        query, key, value = (
            proj(hidden).reshape(batch, tokens, self.heads, -1)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = torch.einsum("bihd,bjhd->bhij", query, key).softmax(-1)
        found = torch.einsum("bhij,bjhd->bihd", weights, value)
        return self.o_proj(found.reshape(batch, tokens, -1))


class Repeated(Separate):
    """Grouped-query attention: keys and values are repeated by `repeat_interleave`."""

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.split(hidden, hidden)
        times = self.heads // self.shared
        key, value = (part.repeat_interleave(times, dim=1) for part in (key, value))
        return self.o_proj(merge_heads(attend(query, key, value)))


class Expanded(Separate):
    """Grouped-query attention: keys and values are expanded, as in Llama."""

    def spread(self, part: Tensor) -> Tensor:
        batch, shared, tokens, units = part.shape
        part = part[:, :, None].expand(batch, shared, self.heads // shared, tokens, units)
        return part.reshape(batch, self.heads, tokens, units)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.split(hidden, hidden)
        return self.o_proj(merge_heads(attend(query, self.spread(key), self.spread(value))))


class BuiltIn(Separate):
    """Grouped-query attention by PyTorch's `enable_gqa`."""

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.split(hidden, hidden)
        found = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return self.o_proj(merge_heads(found))


class MultiQuery(Separate):
    """One key and value for all heads, by broadcasting."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.o_proj(merge_heads(attend(*self.split(hidden, hidden))))


class Rotary(Expanded):
    """Rotary positions in halves, as in Llama, for the first `rotated` units of each head."""

    inv_freq: Tensor

    def __init__(self, rotated: int, heads: int, shared: int, units: int, value_units: int) -> None:
        super().__init__(10, heads, shared, units, value_units)
        self.rotated = rotated
        frequencies = 1 / 100 ** (torch.arange(0, rotated, 2) / rotated)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def rotate(self, part: Tensor) -> Tensor:
        positions = torch.arange(part.shape[2]).to(self.inv_freq)
        angles = torch.outer(positions, self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        part, rest = part[..., : self.rotated], part[..., self.rotated :]
        first, second = part[..., : self.rotated // 2], part[..., self.rotated // 2 :]
        rotated_part = part * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
        return torch.cat((rotated_part, rest), dim=-1) if rest.shape[-1] else rotated_part

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.split(hidden, hidden)
        query, key = self.rotate(query), self.rotate(key)
        return self.o_proj(merge_heads(attend(query, self.spread(key), self.spread(value))))


class ComplexRotary(Separate):
    """Rotary positions by complex numbers, as in the first Llama."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__(units=4, value_units=6)
        self.register_buffer("inv_freq", 1 / 100 ** (torch.arange(2) / 2), persistent=False)

    def rotate(self, part: Tensor) -> Tensor:
        positions = torch.arange(part.shape[2]).to(self.inv_freq)
        angles = torch.outer(positions, self.inv_freq)
        rotations = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(part.reshape(*part.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotations).flatten(3)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.split(hidden, hidden)
        return self.o_proj(merge_heads(attend(self.rotate(query), self.rotate(key), value)))


class LlamaBlock(nn.Module):
    """RMSNorm, rotary grouped-query attention, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 10)
        self.norm1 = nn.RMSNorm(10, eps=1e-6)
        self.attention = Rotary(4, heads=6, shared=2, units=4, value_units=4)
        self.norm2 = nn.RMSNorm(10, eps=1e-6)
        self.gate = nn.Linear(10, 7, bias=False)
        self.up = nn.Linear(10, 7, bias=False)
        self.down = nn.Linear(7, 10, bias=False)
        self.out = nn.Linear(10, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.attention(self.norm1(hidden))
        normed = self.norm2(hidden)
        return self.out(hidden + self.down(F.silu(self.gate(normed)) * self.up(normed)))


class Falcon(nn.Module):
    """Fused grouped queries: for each key head its queries, its key and its value."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(10, 2 * (3 + 2) * 4)
        self.dense = nn.Linear(2 * 3 * 4, 10)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        fused = self.fused(hidden).view(batch, tokens, 2, 5, 4)
        query, key, value = fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]
        key, value = (part.broadcast_to(query.shape) for part in (key, value))
        query, key, value = (x.flatten(2, 3).transpose(1, 2) for x in (query, key, value))
        return self.dense(merge_heads(F.scaled_dot_product_attention(query, key, value)))


class Window(Separate):
    """A table of biases by relative position in a window of 3 x 3, as in Swin."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(25, 3))
        rows, columns = torch.arange(9) // 3, torch.arange(9) % 3
        index = (rows[:, None] - rows + 2) * 5 + columns[:, None] - columns + 2
        self.register_buffer("index", index)

    def forward(self, hidden: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(9, 9, -1).permute(2, 0, 1).contiguous()
        return self.o_proj(merge_heads(attend(*self.split(hidden, hidden), bias[None])))


class Buckets(Separate):
    """Biases looked up by distance in an embedding, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(8, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1])
        buckets = (positions[None, :] - positions[:, None]).abs().clamp(max=7)
        bias = self.bias(buckets).permute(2, 0, 1).unsqueeze(0)
        return self.o_proj(merge_heads(attend(*self.split(hidden, hidden), bias)))


class Alibi(Separate):
    """A constant slope per head: the heads are pinned, because the slopes are."""

    slopes: Tensor

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        slopes = 2.0 ** -torch.arange(1, 4)
        self.register_buffer("slopes", slopes, persistent=persistent)

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1])
        distance = -(positions[None, :] - positions[:, None]).abs()
        bias = self.slopes.view(-1, 1, 1) * distance.to(hidden.dtype)
        return self.o_proj(merge_heads(attend(*self.split(hidden, hidden), bias)))


class Temperature(Separate):
    """Cosine attention with a learned temperature per head, as in Swin v2."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.split(hidden, hidden)
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        scores = scores * self.temperature.clamp(max=4.6).exp()
        return self.o_proj(merge_heads(scores.softmax(-1) @ value))


class TalkingHeads(nn.Module):
    """Heads are mixed before and after the softmax, each time to another number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(10, 3 * 7)
        self.k_proj = nn.Linear(10, 3 * 7)
        self.v_proj = nn.Linear(10, 5 * 6)
        self.before = nn.Linear(3, 4, bias=False)
        self.after = nn.Linear(4, 5)
        self.o_proj = nn.Linear(5 * 6, 10)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key = split_heads(self.q_proj(hidden), 3), split_heads(self.k_proj(hidden), 3)
        scores = torch.einsum("bhid,bhjd->bijh", query, key) / 7**0.5
        weights = self.before(scores).softmax(2)
        weights = self.after(weights).permute(0, 3, 1, 2)
        return self.o_proj(merge_heads(weights @ split_heads(self.v_proj(hidden), 5)))


class NormedQueries(Separate):
    """LayerNorm over the units of queries and keys, the same in all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(4)
        self.k_norm = nn.LayerNorm(4)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.split(hidden, hidden)
        return self.o_proj(merge_heads(attend(self.q_norm(query), self.k_norm(key), value)))


class Cross(nn.Module):
    """Attention to another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 10)
        self.other = nn.Linear(3, 7)
        self.norm = nn.LayerNorm(7)
        self.inner = Separate(10, 3, None, 4, 6, context=7)
        self.head = nn.Linear(10, 2)

    def forward(self, inputs: Tensor, context: Tensor) -> Tensor:
        hidden, context = self.stem(inputs), self.norm(F.gelu(self.other(context)))
        query, key, value = self.inner.split(hidden, context)
        return self.head(hidden + self.inner.o_proj(merge_heads(attend(query, key, value))))


class Stacked(nn.Module):
    """One parameter for all heads of each projection."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(3, 10, 4))
        self.key = nn.Parameter(torch.randn(3, 10, 4))
        self.value = nn.Parameter(torch.randn(3, 10, 6))
        self.query_bias = nn.Parameter(torch.randn(3, 1, 4))
        self.out = nn.Parameter(torch.randn(3, 6, 10))

    def forward(self, hidden: Tensor) -> Tensor:
        query = torch.einsum("bte,hed->bhtd", hidden, self.query) + self.query_bias
        key = torch.einsum("bte,hed->bhtd", hidden, self.key)
        value = torch.einsum("bte,hed->bhtd", hidden, self.value)
        return torch.einsum("bhtd,hde->bte", attend(query, key, value), self.out)


class LinearAttention(Separate):
    """Linear attention: keys and values are summed before they meet the queries."""

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.split(hidden, hidden)
        memory = torch.einsum("bhtd,bhte->bhde", key.softmax(2), value)
        return self.o_proj(merge_heads(torch.einsum("bhtd,bhde->bhte", query.softmax(3), memory)))


class Gpt(nn.Module):
    """A tiny GPT whose embedding is also its output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 10)
        self.places = nn.Embedding(9, 10)
        self.drop = nn.Dropout(0.1)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(10), nn.LayerNorm(10), nn.LayerNorm(10)
        self.attention = Chunked(10, 5, 4)
        self.up, self.down = nn.Linear(10, 7), nn.Linear(7, 10)
        self.out = nn.Linear(10, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.drop(self.embed(tokens) + self.places(torch.arange(tokens.shape[1])))
        hidden = hidden + self.attention(self.norm1(hidden))
        hidden = hidden + self.down(F.gelu(self.up(self.norm2(hidden)), approximate="tanh"))
        return self.out(self.norm3(hidden))


class Perceiver(nn.Module):
    """Averaged latents, which may be permuted, attend to the inputs and to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(8, 10))
        self.cross = Separate(10, 3, None, 4, 6, context=5)
        self.inner = Unbound(10, 2, 7)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        latents = self.latents.expand(inputs.shape[0], -1, -1)
        query, key, value = self.cross.split(latents, inputs)
        latents = latents + self.cross.o_proj(merge_heads(attend(query, key, value)))
        latents = latents + self.inner(self.norm(latents))
        return self.head(latents.mean(1))


class Memory(Separate):
    """Learned keys and values next to those of the tokens; each head may permute its own."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(3, 5, 4))
        self.values = nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.split(hidden, hidden)
        batch = hidden.shape[0]
        key = torch.cat([self.keys.expand(batch, -1, -1, -1), key], dim=2)
        value = torch.cat([self.values.expand(batch, -1, -1, -1), value], dim=2)
        return self.o_proj(merge_heads(attend(query, key, value)))


class Pooled(nn.Module):
    """One learned query per head attends to all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(3, 4))
        self.key = nn.Linear(5, 12)
        self.value = nn.Linear(5, 18)
        self.head = nn.Linear(18, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        key, value = split_heads(self.key(inputs), 3), split_heads(self.value(inputs), 3)
        weights = (key @ self.query[:, :, None]).softmax(2)
        return self.head((weights * value).sum(2).flatten(1))


class Vit(nn.Module):
    """A vision transformer: patches, a class token, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 10, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 10))
        self.places = nn.Parameter(torch.zeros(1, 5, 10))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(10), nn.LayerNorm(10), nn.LayerNorm(10)
        self.attention = Unbound(10, 5, 4)
        self.mlp = nn.Sequential(nn.Linear(10, 7), nn.GELU(), nn.Dropout(0.1), nn.Linear(7, 10))
        self.head = nn.Linear(10, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.patches(images).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.token.expand(hidden.shape[0], -1, -1), hidden], 1) + self.places
        hidden = hidden + self.attention(self.norm1(hidden))
        hidden = hidden + self.mlp(self.norm2(hidden))
        return self.head(self.norm3(hidden)[:, 0])


TOKENS = features(2, 9, 5)
WORDS = numbers(11, 2, 9)


def padded() -> dict[str, Tensor]:
    padding = torch.arange(9) >= torch.tensor([[9], [6]])
    return {"inputs": torch.zeros(2, 9, 5), "padding": padding}


ATTENTION = {
    "mha": Entry(lambda: Framed(20, SelfAttention(20, 5)), TOKENS, (4, 4, 5, 20)),
    "mha-even-heads": Entry(lambda: Framed(12, SelfAttention(12, 2)), TOKENS, (2, 6, 6, 12)),
    "mha-sequence-first-extra-key": Entry(
        lambda: Framed(20, SelfAttention(20, 5, batch_first=False, extra=True)),
        TOKENS,
        (4, 4, 5, 20),
    ),
    "mha-padding-mask": Entry(Masked, padded, (4, 4, 5, 20)),
    "mha-heads-put-out": Entry(ShownHeads, TOKENS, (4, 4, 20)),
    "mha-kdim-vdim": Entry(
        Mixed,
        lambda: {"inputs": torch.zeros(2, 9, 5), "context": torch.zeros(2, 8, 5)},
        (3, 4, 4, 6, 7, 12),
    ),
    "encoder-layer": Entry(lambda: Framed(12, encoder_layer(3)), TOKENS, (3, 4, 4, 7, 12)),
    "encoder-layer-norm-first": Entry(
        lambda: Framed(12, encoder_layer(3, norm_first=True)), TOKENS, (3, 4, 4, 7, 12)
    ),
    "encoder-two-layers": Entry(
        lambda: Framed(12, nn.TransformerEncoder(encoder_layer(2, activation="gelu"), 2)),
        TOKENS,
        (2, 2, 6, 6, 6, 6, 7, 7, 12),
    ),
    "encoder-padding-mask": Entry(PaddedEncoder, padded, (3, 3, 4, 4, 4, 4, 7, 7, 12)),
    "decoder": Entry(
        Decoder,
        lambda: {"inputs": torch.zeros(2, 9, 5), "memory": torch.zeros(2, 8, 6)},
        (3, 3, 4, 4, 4, 4, 7, 12, 12),
    ),
    "transformer": Entry(
        Whole,
        lambda: {"source": torch.zeros(2, 9, 5), "target": torch.zeros(2, 8, 6)},
        (2, 2, 2, 6, 6, 6, 6, 6, 6, 7, 7, 12, 12),
    ),
    "qkv-unbind": Entry(lambda: Framed(10, Unbound(10, 5, 4)), TOKENS, (4, 4, 5, 10)),
    "qkv-indexed": Entry(lambda: Framed(10, Indexed(10, 5, 4)), TOKENS, (4, 4, 5, 10)),
    "qkv-chunk-causal": Entry(lambda: Framed(10, Chunked(10, 5, 4)), TOKENS, (4, 4, 5, 10)),
    "qkv-split-mask-buffer": Entry(lambda: Framed(10, MaskBuffer()), TOKENS, (4, 5, 6, 10)),
    "qkv-split-mask-sdpa": Entry(lambda: Framed(10, MaskGiven()), TOKENS, (4, 4, 5, 10)),
    "attention-separate": Entry(lambda: Framed(10, Separate()), TOKENS, (3, 4, 6, 10)),
    "attention-einsum": Entry(lambda: Framed(10, Einsum()), TOKENS, (3, 4, 6, 10)),
    "grouped-query-repeat": Entry(
        lambda: Framed(10, Repeated(10, 6, 2, 4, 5)), TOKENS, (2, 3, 4, 5, 10)
    ),
    "grouped-query-expand": Entry(
        lambda: Framed(10, Expanded(10, 6, 2, 4, 5)), TOKENS, (2, 3, 4, 5, 10)
    ),
    "grouped-query-built-in": Entry(
        lambda: Framed(10, BuiltIn(10, 6, 2, 4, 4)), TOKENS, (2, 3, 4, 4, 10)
    ),
    "multi-query": Entry(lambda: Framed(10, MultiQuery(10, 5, 1, 4, 6)), TOKENS, (4, 5, 6, 10)),
    "rotary-halves": Entry(lambda: Framed(10, Rotary(4, 3, 3, 4, 6)), TOKENS, (3, 6, 10)),
    "rotary-partial": Entry(lambda: Framed(10, Rotary(4, 3, 3, 9, 6)), TOKENS, (3, 5, 6, 10)),
    "rotary-grouped-query": Entry(lambda: Framed(10, Rotary(4, 6, 2, 4, 5)), TOKENS, (2, 3, 5, 10)),
    "rotary-complex": Entry(lambda: Framed(10, ComplexRotary()), TOKENS, (3, 6, 10)),
    "llama": Entry(LlamaBlock, WORDS, (2, 3, 4, 7, 10)),
    "falcon": Entry(lambda: Framed(10, Falcon()), TOKENS, (2, 3, 4, 4, 10)),
    "swin-bias-table": Entry(lambda: Framed(10, Window()), TOKENS, (3, 4, 6, 10)),
    "t5-bias-embedding": Entry(lambda: Framed(10, Buckets()), TOKENS, (3, 4, 6, 10)),
    "alibi-stored": Entry(
        lambda: Framed(10, Alibi(persistent=True)), TOKENS, (4, 4, 4, 6, 6, 6, 10)
    ),
    "alibi-constant": Entry(
        lambda: Framed(10, Alibi(persistent=False)), TOKENS, (4, 4, 4, 6, 6, 6, 10)
    ),
    "head-temperature": Entry(lambda: Framed(10, Temperature()), TOKENS, (3, 4, 6, 10)),
    "talking-heads": Entry(lambda: Framed(10, TalkingHeads()), TOKENS, (3, 4, 5, 6, 7, 10)),
    "query-key-norm": Entry(lambda: Framed(10, NormedQueries()), TOKENS, (3, 4, 6, 10)),
    "cross-attention": Entry(
        Cross,
        lambda: {"inputs": torch.zeros(2, 9, 5), "context": torch.zeros(2, 8, 3)},
        (3, 4, 6, 7, 10),
    ),
    "stacked-heads": Entry(lambda: Framed(10, Stacked()), TOKENS, (3, 4, 6, 10)),
    "linear-attention": Entry(lambda: Framed(10, LinearAttention()), TOKENS, (3, 4, 6, 10)),
    "gpt-tied": Entry(Gpt, WORDS, (4, 4, 5, 7, 10)),
    "perceiver": Entry(Perceiver, TOKENS, (2, 3, 4, 6, 7, 7, 8, 10)),
    "memory-tokens": Entry(lambda: Framed(10, Memory()), TOKENS, (3, 4, 5, 6, 10)),
    "attention-pooling": Entry(Pooled, TOKENS, (3, 4, 6)),
    "vit": Entry(Vit, lambda: torch.zeros(2, 3, 8, 8), (4, 4, 5, 7, 10)),
}
