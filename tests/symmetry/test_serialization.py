"""Specs as JSON: they are read back unchanged, and refused if invalid or of another model."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same, random_state, spec_of, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO, each_model

from fl_rebasin import PermutationSpec, SpecError, derive_spec, spec_from_json, spec_to_json
from fl_rebasin.symmetry.axes import groups_of
from fl_rebasin.symmetry.fingerprint import fingerprint

Edit = Callable[[dict[str, Any]], object]


@each_model
def test_a_spec_is_read_back_unchanged(name: str) -> None:
    entry = ZOO[name]
    spec = spec_of(entry)
    loaded = spec_from_json(spec_to_json(spec), entry.build())
    assert loaded == spec
    assert spec_to_json(loaded) == spec_to_json(spec)
    state = random_state(entry, seed=1)
    permutation = spec.random(torch.Generator().manual_seed(4))
    assert permutation.moved > 0
    assert loaded.random(torch.Generator().manual_seed(4)) == permutation
    moved = spec.apply(permutation, state)
    assert_same(loaded.apply(permutation, state), moved, rtol=0, atol=0)


class Heads(nn.Module):
    """Attention between two groups of units; the attention's own units lie within heads."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.query = nn.Linear(4, 8)
        self.context = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, heads, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        context = self.context(inputs)
        return self.out(self.attention(self.query(inputs), context, context)[0])


HEADS_SPEC = derive_spec(Heads(), torch.zeros(2, 5, 4))
HEADS_TEXT = spec_to_json(HEADS_SPEC)
BLOCKS = next(iter(HEADS_SPEC.within.values()))
INNER = next(iter(HEADS_SPEC.within))
WEIGHT = "attention.in_proj_weight"


def nest(depth: int) -> Any:
    found: Any = 2
    for _ in range(depth):
        found = {"cat": [found]}
    return found


def sized(value: Any) -> Edit:
    return lambda content: content["groups"].update({BLOCKS: value})


def axes_of(key: str, value: Any) -> Edit:
    return lambda content: content["axes"].update({key: value})


def field_set_to(field: str, value: Any) -> Edit:
    return lambda content: content.update({field: value})


MALFORMED: dict[str, tuple[Edit, str]] = {
    "another format": (
        field_set_to("format", "fl_rebasin.spec/0"),
        r"format 'fl_rebasin.spec/0'.*reads",
    ),
    "no format": (lambda content: content.pop("format"), "'format'.*derive it again"),
    **{
        f"no {field}": (lambda content, field=field: content.pop(field), f"'{field}'.*again")
        for field in ("groups", "within", "axes", "pinned", "learnable", "fingerprint")
    },
    "an axis of an unknown group": (axes_of("out.bias", ["gone"]), "unknown group 'gone'"),
    "negative size": (sized(-1), "the size -1: sizes are non-negative integers"),
    "boolean size": (sized(True), "the size True: sizes are non-negative"),
    "float size": (sized(2.0), r"the size 2\.0: sizes are non-negative"),
    "string as size": (sized("2"), "the size '2': sizes are non-negative"),
    "NaN as size": (sized(math.nan), "the size nan: sizes are non-negative"),
    "huge size": (sized(2**63), "the size 9223372036854775808: sizes are non-negative integers"),
    "negative fixed axis": (axes_of("out.bias", [-3]), "the size -3: sizes are non-negative"),
    "boolean fixed axis": (axes_of("out.bias", [True]), "the size True: sizes are non-negative"),
    "a group within itself": (
        lambda content: content["within"].update({INNER: INNER}),
        "puts the group .* within .*, which is invalid",
    ),
    "a group within units": (
        lambda content: content["within"].update({BLOCKS: INNER}),
        "puts the group .* within .*, which is invalid",
    ),
    "a group within an unknown group": (
        lambda content: content["within"].update({INNER: "gone"}),
        "within 'gone', which is invalid",
    ),
    "an unknown group within a group": (
        lambda content: content["within"].update({"gone": BLOCKS}),
        f"'gone' within '{BLOCKS}', which is invalid",
    ),
    "a learnable key without axes": (
        lambda content: content["learnable"].append("gone"),
        r"lists \['gone'\] as learnable but has no axes",
    ),
    "units without their blocks": (
        axes_of("out.bias", [INNER]),
        f"out.bias has units within '{BLOCKS}', but no axis of that group",
    ),
    "units within one of two blocks": (
        axes_of("out.bias", [{"prod": [BLOCKS, BLOCKS, INNER]}]),
        f"out.bias has units within '{BLOCKS}', which is twice in a product",
    ),
    "a group on no axis": (
        lambda content: content["groups"].update(spare=3),
        r"\['spare'\].*on no axis",
    ),
    "a deep nest": (axes_of("out.bias", [nest(5000)]), "nested too deeply|RecursionError"),
    "a nest": (axes_of("out.bias", [nest(200)]), "nested too deeply|RecursionError"),
    "an empty concatenation": (axes_of("out.bias", [{"cat": []}]), r"the axis \{'cat': \[\]\}"),
    "an empty product": (axes_of("out.bias", [{"prod": []}]), r"the axis \{'prod': \[\]\}"),
    **{
        f"wrong parts: {case}": (
            lambda content, value=value: content["axes"][WEIGHT].__setitem__(1, value),
            words,
        )
        for case, value, words in [
            ("no cases", {"across": 0, "cases": []}, "the axis"),
            ("no pairs", {"across": 0, "cases": [[24, 8, 1]]}, "the axis"),
            ("numbers", {"across": 0, "cases": [24]}, "cases are 24, which is not a list"),
            (
                "no such axis",
                {"across": 2, "cases": [[24, 8]]},
                "whose parts do not match its axis 2",
            ),
            ("too few", {"across": 0, "cases": [[8, 8]]}, "whose parts do not match its axis 0"),
            (
                "splits units",
                {"across": 0, "cases": [[3, 8], [21, 8]]},
                "whose parts do not match its axis 0",
            ),
            (
                "uneven",
                {"across": 0, "cases": [[8, 8], [16, 7]]},
                "whose parts do not match its axis 0",
            ),
            ("inside", {"cat": [{"across": 0, "cases": [[24, 8]]}]}, "the axis .*across"),
            ("negative", {"across": -2, "cases": [[24, 8]]}, "the size -2: sizes are non-negative"),
        ]
    },
    "an unknown expression": (axes_of("out.bias", [{"sum": [3]}]), r"the axis \{'sum': \[3\]\}"),
    "two expressions": (axes_of("out.bias", [{"cat": [3], "prod": [1]}]), "the axis .*cat.*prod"),
    "parts that are not a list": (axes_of("out.bias", [{"cat": 3}]), r"the axis \{'cat': 3\}"),
    "parts that are a string": (axes_of("out.bias", [{"cat": "3"}]), r"the axis \{'cat': '3'\}"),
    "a list as axis": (axes_of("out.bias", [[3]]), r"the axis \[3\]"),
    "null as axis": (axes_of("out.bias", [None]), "the axis None"),
    "a string for a list of axes": (axes_of("out.bias", BLOCKS), "axes of out.bias.* not a list"),
    "a dict for a list of axes": (axes_of("out.bias", {BLOCKS: 3}), "of out.bias.* not a list"),
    "a number for a list of axes": (axes_of("out.bias", 3), "axes of out.bias.* not a list"),
    **{
        f"a list for {field}": (field_set_to(field, []), f"{field} .*not a dict")
        for field in ("groups", "within", "axes", "pinned")
    },
    "a string for learnable": (field_set_to("learnable", "out"), "learnable .*not a list"),
    "a dict for learnable": (field_set_to("learnable", {"out.bias": 1}), "learnable .*not a list"),
    "a number among learnable": (field_set_to("learnable", [3]), "learnable.* 3, .*not a string"),
    "a list among learnable": (
        field_set_to("learnable", [["out.bias"]]),
        "learnable.*, .*not a string",
    ),
    "a key counted twice": (field_set_to("learnable", ["out.bias"] * 2), r"\['out.bias'\].*twice"),
    "a number as reason": (
        field_set_to("pinned", {"out.bias[0]": 3}),
        "pinned.* 3, .*not a string",
    ),
    "a list as blocks": (field_set_to("within", {INNER: [BLOCKS]}), "within.*, .*not a string"),
    "a number as fingerprint": (field_set_to("fingerprint", 3), "fingerprint.* 3, .*not a string"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_an_error_says_what_is_wrong_with_a_malformed_spec(case: str) -> None:
    edit, words = MALFORMED[case]
    content = json.loads(HEADS_TEXT)
    edit(content)
    try:
        text = json.dumps(content)
    except RecursionError:
        text = HEADS_TEXT.replace('"fl_rebasin.spec/1"', '{"cat":[' * 5000)
    with pytest.raises(SpecError, match=words) as caught:
        spec_from_json(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a permutation spec.*derive it again"),
        ("{", "not a permutation spec.*derive it again"),
        (HEADS_TEXT[:-9], "not a permutation spec"),
        (HEADS_TEXT + "}", "not a permutation spec"),
        ("[" * 100_000, "not a permutation spec"),
        ('{"a":' * 100_000, "not a permutation spec"),
        (f'{{"format": {"9" * 5000}}}', "not a permutation spec"),
        ("3", "not a permutation spec"),
        ("null", "not a permutation spec"),
        ("[]", "not a permutation spec"),
        ('"fl_rebasin.spec/1"', "not a permutation spec"),
        (None, "not a permutation spec"),
    ],
    ids=range(12),
)
def test_text_that_is_no_spec_is_refused(text: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        spec_from_json(text)
    assert len(str(caught.value)) < 300


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.integers(2**62, 2**64)
    | st.floats()
    | st.sampled_from([BLOCKS, INNER, WEIGHT, "out.bias", "cat", "prod", ""]),
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(
            st.sampled_from([BLOCKS, INNER, "cat", "prod", "out.bias"]), inside, max_size=2
        )
    ),
    max_leaves=6,
)


def mutate(content: Any, data: st.DataObject) -> Any:
    """Replace, add or remove a random value at a random position of nested lists and dicts."""
    if isinstance(content, dict) and content and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(sorted(content)))
        act = data.draw(st.sampled_from(["go", "go", "drop", "add"]))
        if act == "drop":
            return {name: value for name, value in content.items() if name != key}
        if act == "add":
            return {**content, data.draw(st.sampled_from([BLOCKS, INNER, "new"])): data.draw(JSON)}
        return {**content, key: mutate(content[key], data)}
    if isinstance(content, list) and content and data.draw(st.integers(0, 3)):
        place = data.draw(st.integers(0, len(content) - 1))
        return [*content[:place], mutate(content[place], data), *content[place + 1 :]]
    return data.draw(JSON)


def assert_usable(spec: PermutationSpec) -> None:
    """Check that a spec can be printed, written, and applied to tensors of its shapes."""
    assert spec_from_json(spec_to_json(spec)) == spec
    assert str(spec)
    assert 0.0 <= spec.freedom <= 1.0
    if any(size > 10**4 for size in spec.groups.values()) or any(
        axis.size > 10**4 for axes in spec.axes.values() for axis in axes
    ):
        return
    shapes = {key: tuple(axis.size for axis in axes) for key, axes in spec.axes.items()}
    if all(math.prod(shape) < 10**5 for shape in shapes.values()):
        state = {key: torch.randn(shape) for key, shape in shapes.items()}
        permutation = spec.random(torch.Generator().manual_seed(0))
        moved = spec.apply(permutation, state)
        for key, tensor in moved.items():
            torch.testing.assert_close(tensor.flatten().sort()[0], state[key].flatten().sort()[0])
        assert_same(spec.apply(permutation.invert(), moved), state, rtol=0, atol=0)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_randomly_changed_spec_is_refused_or_valid(data: st.DataObject) -> None:
    content = json.loads(HEADS_TEXT)
    for _ in range(data.draw(st.integers(1, 3))):
        content = mutate(content, data)
    try:
        spec = spec_from_json(json.dumps(content))
    except SpecError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert_usable(spec)
    known = {
        group.name for axes in spec.axes.values() for axis in axes for group in groups_of(axis)
    }
    assert known == set(spec.groups)


class Plain(nn.Module):
    """A net whose attributes may differ."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs))


def convolution(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, **options), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def dense(between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("build", "other", "inputs"),
    [
        (lambda: dense(nn.ReLU()), lambda: dense(nn.Tanh()), (2, 4)),
        (lambda: dense(nn.LeakyReLU(0.1)), lambda: dense(nn.LeakyReLU(0.2)), (2, 4)),
        (lambda: Heads(2), lambda: Heads(4), (2, 5, 4)),
        (lambda: convolution(stride=1), lambda: convolution(stride=2), (2, 3, 8, 8)),
        (lambda: convolution(padding=0), lambda: convolution(padding=1), (2, 3, 8, 8)),
        (lambda: convolution(dilation=1), lambda: convolution(dilation=2), (2, 3, 8, 8)),
        (
            lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4)),
            lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(1, 4)),
            (2, 4, 5),
        ),
        (lambda: dense(nn.Dropout(0.1)), lambda: dense(nn.Dropout(0.2)), (2, 4)),
        (lambda: Plain(order=[0, 1]), lambda: Plain(order=[1, 0]), (2, 4)),
        (lambda: Plain(act=F.relu), lambda: Plain(act=F.softmax), (2, 4)),
        (lambda: Plain(act=torch.relu), lambda: Plain(act=torch.tanh), (2, 4)),
        (lambda: Plain(norm=nn.BatchNorm1d), lambda: Plain(norm=nn.LayerNorm), (2, 4)),
        (lambda: Plain(steps={"a": (1, 2)}), lambda: Plain(steps={"a": (1, 3)}), (2, 4)),
        (lambda: Plain(kinds={"a", "b"}), lambda: Plain(kinds={"a", "c"}), (2, 4)),
    ],
    ids=range(14),
)
def test_another_architecture_with_the_same_shapes_is_refused(
    build: Callable[[], nn.Module], other: Callable[[], nn.Module], inputs: tuple[int, ...]
) -> None:
    spec = derive_spec(build(), torch.zeros(inputs))
    text = spec_to_json(spec)
    spec.check(other().state_dict())  # Keys and shapes are the same.
    assert spec_from_json(text, build()) == spec
    with pytest.raises(
        SpecError, match=r"another architecture \(fingerprint \w{12}\.\.\., the model's is"
    ):
        spec_from_json(text, other())


@pytest.mark.parametrize("name", sorted(ZOO)[::8])
def test_weights_dtype_mode_and_hooks_do_not_change_the_fingerprint(name: str) -> None:
    model = ZOO[name].build()
    expected = fingerprint(model)
    torch.manual_seed(5)
    assert fingerprint(ZOO[name].build()) == expected
    assert fingerprint(copy.deepcopy(model)) == expected
    assert fingerprint(copy.deepcopy(model).double()) == expected
    assert fingerprint(copy.deepcopy(model).requires_grad_(False)) == expected
    for training in (False, True):
        assert fingerprint(copy.deepcopy(model).train(training)) == expected
    hooked = copy.deepcopy(model)
    hooked.register_forward_hook(lambda *_: None)
    hooked.register_full_backward_hook(lambda *_: None)
    assert fingerprint(hooked) == expected


def test_a_meta_model_has_the_fingerprint_of_the_real_model() -> None:
    with torch.device("meta"):
        empty = dense(nn.ReLU())
    assert fingerprint(empty) == fingerprint(dense(nn.ReLU()))


def test_training_does_not_change_the_fingerprint() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 8, 8))
    expected = fingerprint(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state_of(model)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(before["0.weight"], model[0].weight)
    assert fingerprint(model) == expected


def test_an_error_names_the_keys_or_shapes_that_differ() -> None:
    text = spec_to_json(derive_spec(dense(nn.ReLU()), torch.zeros(2, 4)))
    wide = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3))
    with pytest.raises(SpecError, match=r"0\.weight has shape \(7, 4\), the spec expects \(6, 4\)"):
        spec_from_json(text, wide)
    bare = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(SpecError, match=r"lacks 1 keys of the spec: \['0\.bias'\]"):
        spec_from_json(text, bare)
    with pytest.raises(SpecError, match=r"2 keys beyond the spec: \['3\.weight', '3\.bias'\]"):
        spec_from_json(text, nn.Sequential(*dense(nn.ReLU()), nn.Linear(3, 3)))
