"""One model, the weights of K hospitals: their records pass through it as one batch.

Rows keep their place in the first dimension, hospital after hospital, so that everything without
trainable weights (activations, attention's products, frozen layers) runs as it is. Only a trainable
layer must know whose row is whose; this module has its rule, for every layer that has a gradient
rule. To any other layer each row comes with its own hospital's weights (see
``common.learning.unruled``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import PrivacyError
from common.learning.groups import Groups
from common.learning.unruled import EachItsOwn, learnt
from common.models.checks import check_private, check_records_apart, learners
from common.place import beside
from common.tensors import trainable

Own = dict[str, Tensor]
"""A layer's trainable parameters by name, [K, *shape] each."""

Rule = Callable[[Any, Tensor, Own, Groups], Tensor]
"""What a layer answers to rows [rows, …], given the groups' own parameters."""


@contextmanager
def stacked(model: nn.Module, weights: Tensor, groups: Groups) -> Iterator[None]:
    """Within, ``model`` answers the rows of group k by the trainable weights ``weights[k]``.

    ``weights`` [K, d]. The model's own trainable weights are not touched.
    """
    ruled, unruled = learners(model)
    groups = groups.beside(model)
    own = _by_parameter(trainable(model), *beside(model, weights))
    try:
        for layer in ruled:
            named = {
                name: own[parameter]
                for name, parameter in layer.named_parameters(recurse=False)
                if parameter.requires_grad
            }
            # An attribute of the instance goes before the class's method; hooks run all the same.
            layer.__dict__["forward"] = _answering(layer, named, groups)
        for layer in unruled:
            named = {name: own[parameter] for name, parameter in learnt(layer).items()}
            layer.__dict__["forward"] = EachItsOwn(layer, named, groups)
        yield
    finally:
        for layer in [*ruled, *unruled]:
            layer.__dict__.pop("forward", None)


def obstacle(model: nn.Module, like: Tensor) -> str | None:
    """Why ``model`` cannot be stacked; None when it can. ``like`` [rows, …] gives records' shape.

    A model that mixes records would mix hospitals. Dropout draws for the whole batch in one go:
    other draws than those of each hospital.
    """
    try:
        check_private(model)
        check_records_apart(model, like)
    except PrivacyError as error:
        return str(error)
    return (
        f"{type(model).__name__} draws random numbers as it learns" if _draws(model, like) else None
    )


def _draws(model: nn.Module, like: Tensor) -> bool:
    training = model.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = torch.get_rng_state()
        model.train()(*beside(model, torch.zeros_like(like[:1])))
        drawn = not torch.equal(torch.get_rng_state(), before)
    model.train(training)
    return drawn


def _by_parameter(parameters: list[nn.Parameter], weights: Tensor) -> dict[nn.Parameter, Tensor]:
    sizes = [parameter.numel() for parameter in parameters]
    parts = torch.split(weights, sizes, dim=1)
    return {
        parameter: part.reshape(len(weights), *parameter.shape)
        for parameter, part in zip(parameters, parts, strict=True)
    }


def _answering(layer: nn.Module, own: Own, groups: Groups) -> Callable[[Tensor], Tensor]:
    rule = RULES[type(layer)]

    def forward(inputs: Tensor) -> Tensor:
        output = rule(layer, inputs, own, groups)
        # The derivative at every trainable layer's output is asked for, also of the first one.
        return output if output.requires_grad else output.requires_grad_()

    return forward


class _Linear(torch.autograd.Function):
    """x Wᵀ with a W [out, in] for each group, over x [rows, …, in]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        inputs, weight = _cast(inputs), _cast(weight)
        ctx.save_for_backward(inputs, weight)
        ctx.groups = groups
        return groups.times(inputs, weight.mT)

    @staticmethod
    def backward(ctx: Any, derivative: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        wanted, learns, _ = ctx.needs_input_grad
        asked = ctx.groups.times(derivative, weight) if wanted else None
        if not learns:
            return asked, None, None
        return asked, ctx.groups.outer(derivative, inputs), None


def _linear(layer: nn.Linear, inputs: Tensor, own: Own, groups: Groups) -> Tensor:
    if "weight" in own:
        output: Tensor = _Linear.apply(inputs, own["weight"], groups)  # type: ignore[no-untyped-call]
    else:
        output = functional.linear(inputs, layer.weight)
    if layer.bias is None:
        return output
    if "bias" not in own:
        return output + layer.bias
    between = (1,) * (inputs.dim() - 2)
    return output + _of_rows(own["bias"], groups).view(groups.rows, *between, -1)


class _Convolution(torch.autograd.Function):
    """A convolution of each group's own, one group after another.

    Measured for 13 groups of 16 images on one core: this loop 9.5, 11.8 and 21.4 ms for 1 → 16
    channels at 28 × 28 and 16 → 32 at 14 × 14 (stride 2), and 8 → 8 at 28 × 28; one grouped
    convolution over channels side by side 6.7, 8.1 and 13.8; unfolding and one batched product 3.1,
    9.1 and 97. The loop alone takes groups of different sizes without empty rows, which would be
    half as many again for samples of 16 on average: what it loses, it need not pay for those.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, how: How, groups: Groups
    ) -> Tensor:
        inputs, weight = _cast(inputs), _cast(weight)
        bias = None if bias is None else _cast(bias)
        ctx.save_for_backward(inputs, weight)
        ctx.how, ctx.groups, ctx.biased = how, groups, bias is not None
        parts = [
            torch.convolution(
                inputs[start:stop], weight[one], None if bias is None else bias[one], *how
            )
            for one, (start, stop) in enumerate(groups.bounds())
        ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, derivative: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        sizes = [weight.shape[1]] if ctx.biased else None
        parts = [
            torch.ops.aten.convolution_backward(
                derivative[start:stop],
                inputs[start:stop],
                weight[one],
                sizes,
                *ctx.how,
                wanted,
            )
            for one, (start, stop) in enumerate(ctx.groups.bounds())
        ]
        asked, learnt, shifted = (
            (torch.cat if place == 0 else torch.stack)([part[place] for part in parts])
            if needed
            else None
            for place, needed in enumerate(wanted)
        )
        return asked, learnt, shifted, None, None


def _cast(values: Tensor) -> Tensor:
    """As autocast, if any, would give it to a layer of its own; it does not reach into these."""
    kind = values.device.type
    return values.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else values


How = tuple[Any, ...]
"""Stride, padding, dilation, transposed, output padding and groups of a convolution."""


def _convolution(layer: Any, inputs: Tensor, own: Own, groups: Groups) -> Tensor:
    weight = own["weight"] if "weight" in own else _shared(layer.weight, groups)
    bias = own.get("bias")
    if bias is None and layer.bias is not None:
        bias = _shared(layer.bias, groups)
    none = (0,) * len(layer.kernel_size)
    padding = layer.padding
    if isinstance(padding, str):
        # Padding by name may be uneven: it is put around the input, more of it at the end.
        inputs, padding = _padded(layer, inputs), none
    how = (layer.stride, padding, layer.dilation, False, none, layer.groups)
    return _Convolution.apply(inputs, weight, bias, how, groups)  # type: ignore[no-any-return, no-untyped-call]


def _padded(layer: Any, inputs: Tensor) -> Tensor:
    if layer.padding == "valid":
        return inputs
    ends: list[int] = []
    for size, dilation in reversed(list(zip(layer.kernel_size, layer.dilation, strict=True))):
        whole = dilation * (size - 1)
        ends += [whole // 2, whole - whole // 2]
    return functional.pad(inputs, ends)


def _shared(parameter: Tensor, groups: Groups) -> Tensor:
    return parameter.detach().expand(len(groups), *parameter.shape)


def _embedding(layer: nn.Embedding, inputs: Tensor, own: Own, groups: Groups) -> Tensor:
    first = (groups.of_rows * layer.num_embeddings).view(-1, *(1,) * (inputs.dim() - 1))
    tables = own["weight"].reshape(-1, layer.embedding_dim)
    output = functional.embedding(inputs + first, tables)
    if layer.padding_idx is None or not output.requires_grad:
        return output
    # Padding is looked up, but learns nothing.
    padding = (inputs == layer.padding_idx)[..., None]
    return torch.where(padding, output.detach(), output)


def _group_norm(layer: nn.GroupNorm, inputs: Tensor, own: Own, groups: Groups) -> Tensor:
    normal = functional.group_norm(inputs, layer.num_groups, eps=layer.eps)
    return _affine(layer, normal, own, groups, (-1, *(1,) * (inputs.dim() - 2)))


def _instance_norm(layer: Any, inputs: Tensor, own: Own, groups: Groups) -> Tensor:
    normal = functional.instance_norm(inputs, eps=layer.eps)
    return _affine(layer, normal, own, groups, (-1, *(1,) * (inputs.dim() - 2)))


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor, own: Own, groups: Groups) -> Tensor:
    normal = functional.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
    return _affine(layer, normal, own, groups, _last(inputs, layer.normalized_shape))


def _rms_norm(layer: nn.RMSNorm, inputs: Tensor, own: Own, groups: Groups) -> Tensor:
    normal = functional.rms_norm(inputs, list(layer.normalized_shape), eps=layer.eps)
    return _affine(layer, normal, own, groups, _last(inputs, layer.normalized_shape))


def _last(inputs: Tensor, normalised: tuple[int, ...]) -> tuple[int, ...]:
    return (*(1,) * (inputs.dim() - 1 - len(normalised)), *normalised)


def _affine(layer: Any, normal: Tensor, own: Own, groups: Groups, shape: tuple[int, ...]) -> Tensor:
    """``normal`` · weight + bias, by each row's own; ``shape`` of a parameter beside a row."""

    def each(name: str) -> Tensor | None:
        shared = getattr(layer, name, None)
        if shared is None:
            return None
        rows = _of_rows(own[name], groups) if name in own else shared[None]
        return rows.reshape(len(rows), *shape)

    weight, bias = each("weight"), each("bias")
    if weight is None:
        return normal if bias is None else normal + bias
    return normal * weight if bias is None else torch.addcmul(bias, normal, weight)


def _of_rows(values: Tensor, groups: Groups) -> Tensor:
    """Each row's own of ``values`` [K, …]: [rows, …]."""
    return values.index_select(0, groups.of_rows)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _embedding,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.InstanceNorm3d: _instance_norm,
    nn.RMSNorm: _rms_norm,
}
