"""The networks of the simulations: shapes, published sizes, norms and seeds."""

from typing import TypedDict, Unpack

import pytest
import torch
from experiment.errors import UserError
from experiment.models import NORMS, ChannelLayerNorm, build_model, default_width
from torch import Tensor, nn

NAMES = ("conv", "resnet20", "mlp")


class Options(TypedDict, total=False):
    width: int
    norm: str
    in_channels: int
    num_classes: int
    image_size: int
    seed: int


def build(name: str, **changed: Unpack[Options]) -> nn.Module:
    options: Options = {
        "width": 8 if name == "mlp" else 1,
        "norm": "batch",
        "in_channels": 3,
        "num_classes": 10,
        "image_size": 32,
        "seed": 0,
    }
    return build_model(name, **(options | changed))


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(in_channels: int, image_size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, in_channels, image_size, image_size, generator=generator)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("in_channels", "image_size"), [(3, 32), (1, 8)])
def test_logits_have_the_right_shape_and_depend_on_every_parameter(
    name: str, norm: str, in_channels: int, image_size: int
) -> None:
    model = build(name, norm=norm, in_channels=in_channels, num_classes=7, image_size=image_size)
    assert model.training
    logits = model(images(in_channels, image_size))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key


@pytest.mark.parametrize(
    ("image_size", "sizes"), [(32, [16, 8, 4, 4]), (8, [8, 4, 2, 2])], ids=["cifar", "digits"]
)
def test_conv_net_halves_the_image_at_the_right_layers(image_size: int, sizes: list[int]) -> None:
    model = build("conv", width=2, image_size=image_size)
    seen: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[1:])))
    model(images(3, image_size))
    assert seen == [(c, s, s) for c, s in zip((2, 4, 4, 8), sizes, strict=True)]


def test_resnet20_has_the_published_size() -> None:
    # 269,722 with parameter-free shortcuts (He et al., 2016: 0.27 M). The two projections add their
    # 1x1 kernels and the scale and shift of their norms.
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert num_parameters(build("resnet20")) == 269_722 + projections


def test_resnet20_width_multiplies_the_channels() -> None:
    state = build("resnet20", width=2).state_dict()
    assert state["conv.weight"].shape[0] == 32
    assert state["classifier.weight"].shape == (10, 128)


def test_resnet20_adds_its_shortcuts() -> None:
    model = build("resnet20", norm="none")
    sample = images(16, 8)
    for block in model.get_submodule("blocks").children():
        shortcut = block.get_submodule("shortcut")(sample)
        with torch.no_grad():
            for name in ("conv2.weight", "conv2.bias"):
                block.get_parameter(name).zero_()
        assert torch.equal(block(sample), torch.relu(shortcut))
        sample = block(sample)


def test_mlp_has_three_hidden_layers() -> None:
    linears = [module for module in build("mlp", width=6).modules() if type(module) is nn.Linear]
    sizes = [(linear.in_features, linear.out_features) for linear in linears]
    assert sizes == [(3 * 32 * 32, 6), (6, 6), (6, 6), (6, 10)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", NORMS)
def test_only_layers_before_batch_norm_have_no_bias(name: str, norm: str) -> None:
    model = build(name, norm=norm)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    *hidden, logits = layers
    assert len(hidden) >= 3
    assert all((layer.bias is None) == (norm == "batch") for layer in hidden)
    assert logits.bias is not None


def test_channel_layer_norm_is_layer_norm_at_each_position() -> None:
    norm = ChannelLayerNorm(5)
    generator = torch.Generator().manual_seed(1)
    nn.init.normal_(norm.norm.weight, generator=generator)
    nn.init.normal_(norm.norm.bias, generator=generator)
    sample = torch.randn(2, 5, 3, 4, generator=generator)
    for row in range(3):
        for column in range(4):
            position = sample[:, :, row, column]
            centred = position - position.mean(1, keepdim=True)
            scaled = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-5)
            expected = scaled * norm.norm.weight + norm.norm.bias
            assert torch.allclose(norm(sample)[:, :, row, column], expected, atol=1e-5)


@pytest.mark.parametrize(("width", "groups"), [(32, 8), (12, 6), (7, 7), (11, 1), (1, 1)])
def test_number_of_groups_is_the_largest_divisor_up_to_8(width: int, groups: int) -> None:
    norms = [
        m for m in build("mlp", width=width, norm="group").modules() if type(m) is nn.GroupNorm
    ]
    assert [norm.num_groups for norm in norms] == [groups] * 3


@pytest.mark.parametrize("name", NAMES)
def test_only_the_seed_determines_the_parameters(name: str) -> None:
    torch.manual_seed(5)
    first = build(name, seed=1)
    torch.manual_seed(6)
    again, other = build(name, seed=1), build(name, seed=2)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_global_random_state_does_not_change(name: str) -> None:
    before = torch.get_rng_state()
    build(name, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_gpus_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    build("mlp", seed=1)
    assert seeded == []


def test_default_widths() -> None:
    assert [default_width(name) for name in NAMES] == [32, 1, 512]


def test_error_for_an_unknown_model_lists_the_known_ones() -> None:
    for call in (build, default_width):
        with pytest.raises(UserError, match="model 'vgg': use one of conv, resnet20, mlp"):
            call("vgg")


def test_error_for_an_unknown_norm_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="norm 'rms': use one of batch, layer, group, none"):
        build("conv", norm="rms")


@pytest.mark.parametrize("width", [0, -4])
def test_width_below_1_is_an_error(width: int) -> None:
    with pytest.raises(UserError, match=f"width {width} is below 1: .* default of conv is 32"):
        build("conv", width=width)
