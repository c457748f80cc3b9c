"""The dynamic head against its formulas, written out with plain convolutions and loops."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import deform_conv2d

from pipeline.models.glip.deformable import TAPS, DeformableConvolution
from pipeline.models.glip.dyhead import OFFSETS, DynamicBlock, DynamicRelu, flat_prefix

WIDTH, GROUPS = 8, 2


def block(compat: bool = False, moving: bool = True) -> DynamicBlock:
    torch.manual_seed(0)
    made = DynamicBlock(WIDTH, GROUPS, compat).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        if not moving:  # no offsets, and modulations of one
            made.offset.weight.zero_()
            made.offset.bias.copy_(torch.cat([torch.zeros(OFFSETS), torch.full((TAPS,), 30.0)]))
    return made


def pyramid(height: int = 13, width: int = 10, levels: int = 3) -> list[Tensor]:
    """Odd sizes, each half of the one before, rounded up."""
    torch.manual_seed(1)
    found = []
    for _ in range(levels):
        found.append(torch.randn(2, WIDTH, height, width))
        height, width = -(-height // 2), -(-width // 2)
    return found


def hard(values: Tensor) -> Tensor:
    """relu6(x + 3) / 6, number by number."""
    return torch.tensor([min(max(value + 3, 0), 6) / 6 for value in values.flatten().tolist()]).view_as(values)


def by_hand(made: DynamicBlock, levels: list[Tensor], number: int) -> Tensor:
    """Section 1.3 of the specification, with offsets from the released code's reading of memory where it has it."""
    level = levels[number]
    raw = made.offset(level)
    moves, mask = raw[:, :OFFSETS].contiguous(), raw[:, OFFSETS:].sigmoid()

    def convolved(part: str, source: Tensor, stride: int, some: Tensor, weights: Tensor) -> Tensor:
        own = getattr(made, part)
        kernel, bias = own.convolution.weight, own.convolution.bias
        found = deform_conv2d(source, some, kernel, bias, stride=stride, padding=1, mask=weights)
        return functional.group_norm(found, GROUPS, own.norm.weight, own.norm.bias)

    branches = [convolved("same", level, 1, moves, mask)]
    if number:
        branches.append(convolved("below", levels[number - 1], 2, moves, mask))
    if number + 1 < len(levels):
        above = levels[number + 1]
        height, width = above.shape[2:]
        if made.compat_offsets:  # the kernel's flat index, sample by sample
            flat = [one.flatten()[: OFFSETS * height * width].view(OFFSETS, height, width) for one in moves]
            light = [one.flatten()[: TAPS * height * width].view(TAPS, height, width) for one in mask]
            some, weights = torch.stack(flat), torch.stack(light)
        else:
            some, weights = (
                functional.interpolate(one, size=(height, width), mode="bilinear", align_corners=True)
                for one in (moves, mask)
            )
        found = convolved("above", above, 1, some, weights)
        branches.append(functional.interpolate(found, size=level.shape[2:], mode="bilinear", align_corners=True))
    total = torch.zeros_like(level)
    for branch in branches:
        mean = branch.flatten(2).mean(dim=2)
        attention = hard(functional.relu(mean @ made.attention.weight.T + made.attention.bias))
        total = total + attention[:, :, None, None] * branch
    total = total / len(branches)
    hidden = functional.relu(total.mean(dim=(2, 3)) @ made.relu.hidden.weight.T + made.relu.hidden.bias)
    numbers = hard(hidden @ made.relu.slopes.weight.T + made.relu.slopes.bias)
    a1, b1, a2, b2 = (numbers[:, n * WIDTH : (n + 1) * WIDTH, None, None] for n in range(4))
    return torch.maximum(total * ((a1 - 0.5) * 2 + 1) + b1 - 0.5, total * ((a2 - 0.5) * 2) + b2 - 0.5)


@pytest.mark.parametrize("compat", [False, True])
def test_a_block_is_its_formula(compat: bool) -> None:
    made, levels = block(compat), pyramid()
    with torch.no_grad():
        found = made(levels)
        for number, level in enumerate(found):
            assert level.shape == levels[number].shape
            torch.testing.assert_close(level, by_hand(made, levels, number), rtol=1e-4, atol=1e-5)


def test_the_two_readings_of_offsets_differ_below_the_top() -> None:
    """The coarsest level has nothing above it."""
    levels = pyramid()
    with torch.no_grad():
        ours, theirs = block()(levels), block(compat=True)(levels)
    assert not torch.allclose(ours[0], theirs[0], atol=1e-3) and torch.equal(ours[2], theirs[2])


def test_without_offsets_the_convolutions_are_plain() -> None:
    made, levels = block(moving=False), pyramid(levels=1)
    with torch.no_grad():
        raw = made.offset(levels[0])
        own = made.same.convolution
        found = made.same(levels[0], raw[:, :OFFSETS], raw[:, OFFSETS:].sigmoid())
        plain = functional.conv2d(levels[0], own.weight, own.bias, padding=1)
        expected = functional.group_norm(plain, GROUPS, made.same.norm.weight, made.same.norm.bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_offsets_of_another_size_are_refused() -> None:
    """By torchvision, too, which is the reason for both rules: the authors' kernel reads beyond what it should."""
    made, levels = block(), pyramid(levels=2)
    raw = made.offset(levels[0])
    offsets, weights = raw[:, :OFFSETS], raw[:, OFFSETS:].sigmoid()
    with pytest.raises(ValueError, match="offsets"):
        made.above(levels[1], offsets, weights)
    own = made.above.convolution
    with pytest.raises(RuntimeError):
        deform_conv2d(levels[1], offsets.contiguous(), own.weight, own.bias, padding=1, mask=weights)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("reach", [0.3, 1.5, 40.0])
def test_the_convolution_is_torchvisions_with_its_gradients(stride: int, reach: float) -> None:
    """Near, between other pixels, and far outside of the map."""
    torch.manual_seed(0)
    own = DeformableConvolution(WIDTH, stride)
    with torch.no_grad():
        own.weight.copy_(torch.randn_like(own.weight))
        own.bias.copy_(torch.randn_like(own.bias))
    size = (-(-7 // stride), -(-10 // stride))
    inputs = [torch.randn(2, WIDTH, 7, 10), torch.randn(2, OFFSETS, *size) * reach, torch.rand(2, TAPS, *size)]
    inputs = [one.requires_grad_() for one in inputs]
    found = own(*inputs)
    expected = deform_conv2d(inputs[0], inputs[1], own.weight, own.bias, stride, 1, mask=inputs[2])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(found)
    wanted = [*inputs, own.weight, own.bias]
    ours, theirs = (torch.autograd.grad(one, wanted, direction) for one in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_samples_are_not_stored_for_the_backward_pass() -> None:
    """What autograd keeps is less than two maps, not nine."""
    own, level = DeformableConvolution(32, 1), torch.randn(1, 32, 24, 24, requires_grad=True)
    stored: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        stored[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        own(level, torch.zeros(1, OFFSETS, 24, 24, requires_grad=True), torch.ones(1, TAPS, 24, 24, requires_grad=True))
    assert sum(stored.values()) - own.weight.numel() < 3 * level.numel()


def test_the_flat_prefix_is_the_kernels_index() -> None:
    """Number i of a sample's numbers at channel c, row y and column x of the smaller map, where i counts these."""
    values = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    found = flat_prefix(values, (2, 3))
    for image in range(2):
        for channel in range(3):
            for y in range(2):
                for x in range(3):
                    assert found[image, channel, y, x] == image * 60 + (channel * 2 + y) * 3 + x


def test_the_dynamic_relu_begins_as_a_relu_with_a_slope() -> None:
    """With weights of zero the four numbers are those of hard-sigmoid(0) = 1/2: max(x, 0)."""
    made = DynamicRelu(8)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        values = torch.linspace(-3, 3, 8 * 4).view(1, 8, 2, 2)
        torch.testing.assert_close(made(values), values.clamp(min=0))


def test_bfloat16_and_gradients_are_finite() -> None:
    made, levels = block(), pyramid()
    inputs = [level.requires_grad_() for level in levels]
    with torch.autocast("cpu", torch.bfloat16):
        found = made(inputs)
    torch.stack([level.float().square().sum() for level in found]).sum().backward()
    assert all(level.grad is not None and level.grad.isfinite().all() and level.grad.any() for level in inputs)
