"""The table of models that the laws are tried on: small nets, one for each kind of structure."""

from zoo.attention import ATTENTION
from zoo.basics import BASICS
from zoo.entry import Entry
from zoo.graphs import GRAPHS
from zoo.misc import MISC
from zoo.recurrent import RECURRENT
from zoo.vision import VISION

FAMILIES = (BASICS, ATTENTION, RECURRENT, GRAPHS, VISION, MISC)
ZOO: dict[str, Entry] = {name: entry for family in FAMILIES for name, entry in family.items()}

assert len(ZOO) == sum(map(len, FAMILIES)), "a name is taken twice"

__all__ = ["ZOO", "Entry"]
