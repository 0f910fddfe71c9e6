"""Print the permutation spec of a model: `python -m fl_rebasin.describe torchvision:resnet18`."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fl_rebasin.derive import derive_spec
from fl_rebasin.spec import SpecError
from fl_rebasin.stored import spec_to_json

DEFAULT_INPUT = (1, 3, 224, 224)


class UsageError(ValueError):
    """What the user has to change, in one line."""


def parse_input(text: str) -> Tensor:
    """Return an example input for `SHAPE` or `SHAPE:DTYPE`, such as `1,3,32,32` or `2,16:int64`.

    Raises:
        UsageError: the text is neither.
    """
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or not isinstance(dtype, torch.dtype):
        raise UsageError(f"--input {text!r}: give sizes and a dtype, as in 1,3,32,32 or 2,16:int64")
    return torch.zeros(sizes, dtype=dtype)


def build(name: str) -> Any:
    """Return what `torchvision:MODEL` or `MODULE:CALLABLE` makes.

    Raises:
        UsageError: there is no such model, module or callable, or it needs arguments.
    """
    source, colon, member = name.partition(":")
    if not colon or not source or not member:
        raise UsageError(f"{name!r}: give torchvision:MODEL or MODULE:CALLABLE")
    if source == "torchvision":
        from torchvision import models

        try:
            builder = models.get_model_builder(member)
        except ValueError:
            raise UsageError(f"torchvision has no model {member!r}") from None
        with warnings.catch_warnings():
            # GoogLeNet and Inception announce that their initial weights will change.
            warnings.simplefilter("ignore", FutureWarning)
            return builder()
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(source)
        for part in member.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{name!r} cannot be imported: {error}") from error
    if isinstance(found, nn.Module):
        return found
    try:
        return found()
    except TypeError as error:
        raise UsageError(f"{name!r} cannot be called without arguments: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fl_rebasin.describe",
        description="Show which units of a model may be permuted, and what is pinned and why.",
    )
    parser.add_argument(
        "model",
        help="torchvision:MODEL, or MODULE:CALLABLE, which returns a module, or a module and its "
        "example inputs",
    )
    parser.add_argument(
        "--input",
        action="append",
        metavar="SHAPE[:DTYPE]",
        help="an example input, once for each positional argument of forward; "
        f"default {','.join(map(str, DEFAULT_INPUT))}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the spec as JSON, too")
    options = parser.parse_args(arguments)
    try:
        model, inputs = build(options.model), None
        if isinstance(model, tuple) and len(model) == 2:
            model, inputs = model
        if not isinstance(model, nn.Module):
            raise UsageError(f"{options.model!r} gives a {type(model).__name__}, not a module")
        if options.input:
            inputs = tuple(map(parse_input, options.input))
        elif inputs is None:
            inputs = torch.zeros(DEFAULT_INPUT)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            spec = derive_spec(model, inputs)
        for warning in caught:
            print(f"warning: {warning.message}", file=sys.stderr)
        if options.json is not None:
            try:
                options.json.write_text(spec_to_json(spec) + "\n")
            except OSError as error:
                raise UsageError(f"--json {options.json}: {error.strerror}") from error
    except (UsageError, SpecError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(spec)
    return 0


if __name__ == "__main__":
    sys.exit(main())
