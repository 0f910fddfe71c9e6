"""The zoo: small models of every kind of structure, on which the laws are tested."""

import pytest

from zoo.attention import ATTENTION
from zoo.basics import BASICS
from zoo.entry import Entry
from zoo.graphs import GRAPHS
from zoo.misc import MISC
from zoo.recurrent import RECURRENT
from zoo.vision import VISION

FAMILIES = (BASICS, ATTENTION, RECURRENT, GRAPHS, VISION, MISC)
ZOO: dict[str, Entry] = {name: entry for family in FAMILIES for name, entry in family.items()}

assert len(ZOO) == sum(map(len, FAMILIES)), "two models have the same name"

REPRESENTATIVE = frozenset(
    [
        "mlp",
        "conv-batchnorm-flatten",
        "group-and-layer-norm",
        "residual-batchnorm",
        "dense-concat",
        "depthwise-grouped-transposed",
        "tied-shared",
        "chunk-keywords",
        "mha",
        "encoder-two-layers",
        "transformer",
        "qkv-chunk-causal",
        "grouped-query-expand",
        "rotary-halves",
        "swin-bias-table",
        "talking-heads",
        "gpt-tied",
        "vit",
        "lstm-two-layers-bidirectional",
        "gru",
        "lstm-cells",
        "rnn-relu-two-layers",
        "graph-scatter-add",
        "graph-attention",
        "group-norm-crossed",
        "channel-shuffle",
        "unet",
        "inverted-residual",
        "split-passed-by",
        "weight-norm",
        "experts-routed",
        "nested-outputs",
        "swiglu-fused",
        "outer-product",
        "kan",
    ]
)
"""One or two models of each structure, for the fast tests; slow tests cover all the others."""

assert ZOO.keys() >= REPRESENTATIVE

each_model = pytest.mark.parametrize(
    "name",
    [
        name if name in REPRESENTATIVE else pytest.param(name, marks=pytest.mark.slow)
        for name in ZOO
    ],
)
"""Runs a test on every model of the zoo."""

__all__ = ["ZOO", "Entry", "each_model"]
