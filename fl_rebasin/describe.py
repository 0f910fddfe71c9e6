"""Print the permutation spec of a model: `python -m fl_rebasin.describe torchvision:resnet18`."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fl_rebasin.symmetry.derive import derive_spec
from fl_rebasin.symmetry.messages import describe_error, in_one_line
from fl_rebasin.symmetry.serialization import spec_to_json
from fl_rebasin.symmetry.spec import PermutationSpec, SpecError

DEFAULT_INPUT = (1, 3, 224, 224)


class UsageError(ValueError):
    """The command line is wrong; the message says in one line what to change."""


def parse_input(text: str) -> Tensor:
    """Return an example input for `SHAPE` or `SHAPE:DTYPE`: `1,3,32,32` or `2,16:int64`.

    Raises:
        UsageError: the text has neither form.
    """
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or not isinstance(dtype, torch.dtype):
        raise UsageError(f"--input {text!r}: give sizes and a dtype, as in 1,3,32,32 or 2,16:int64")
    try:
        return torch.zeros(sizes, dtype=dtype)
    except (RuntimeError, TypeError, OverflowError) as error:
        # Too large, or the dtype of a quantised tensor.
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--input {text!r}: cannot create this tensor: {reason}") from error


def build(name: str) -> Any:
    """Return what `torchvision:MODEL` or `MODULE:CALLABLE` builds.

    Raises:
        UsageError: there is no such model, module or callable, or it fails, for example because it
            needs arguments.
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
        # By default, models for segmentation and detection download a pretrained backbone.
        named = inspect.signature(builder).parameters
        bare = {"weights_backbone": None} if "weights_backbone" in named else {}
        with warnings.catch_warnings():
            # GoogLeNet and Inception warn that their initial weights will change.
            warnings.simplefilter("ignore", FutureWarning)
            return builder(**bare)
    if "" not in sys.path:
        sys.path.insert(0, "")
    # Report whatever the user's code raises in one line.
    try:
        found: Any = importlib.import_module(source)
        for part in member.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise UsageError(f"{name!r} cannot be imported: {describe_error(error)}") from error
    if isinstance(found, nn.Module):
        return found
    try:
        return found()
    except Exception as error:
        raise UsageError(
            f"{name!r} cannot be called without arguments: {describe_error(error)}"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fl_rebasin.describe",
        description="Show which units of a model may be permuted, and what is pinned and why.",
    )
    parser.add_argument(
        "model",
        help="torchvision:MODEL, or MODULE:CALLABLE, which returns a module or a pair of a module "
        "and its example inputs",
    )
    parser.add_argument(
        "--input",
        action="append",
        metavar="SHAPE[:DTYPE]",
        help="an example input; repeat it for each positional argument of forward; "
        f"default {','.join(map(str, DEFAULT_INPUT))}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the spec as JSON")
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                spec = _derive(options.model, options.input)
            finally:
                for warning in caught:
                    _print_line("warning", warning.message)
        if options.json is not None:
            try:
                options.json.write_text(spec_to_json(spec) + "\n")
            except OSError as error:
                raise UsageError(f"--json {options.json}: {error.strerror}") from error
    except (UsageError, SpecError) as error:
        _print_line("error", error)
        return 2
    print(spec)
    return 0


def _derive(name: str, shapes: Sequence[str] | None) -> PermutationSpec:
    """Build the named model and derive its spec."""
    model, inputs = build(name), None
    if isinstance(model, tuple) and len(model) == 2:
        model, inputs = model
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name!r} returns a {type(model).__name__}, not a torch.nn.Module")
    if shapes:
        inputs = tuple(map(parse_input, shapes))
    elif inputs is None:
        inputs = torch.zeros(DEFAULT_INPUT)
    return derive_spec(model, inputs)


def _print_line(kind: str, message: object) -> None:
    """Write a message to stderr in one line; PyTorch's messages can have several."""
    print(f"{kind}: {in_one_line(message, 4000)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
