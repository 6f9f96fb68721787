"""Per-record gradients, their norms and their weighted sums, one layer at a time.

Three ways to get a record's norm in a layer, each exact or rounded *up*, never down:

* from the gradient itself, by Opacus's rule for the layer (convolutions, normalisations, LoRA);
* as a product of two norms, for a Linear layer that sees one vector a record (Goodfellow 2015,
  arXiv 1510.01799);
* from two Gram matrices over the positions of a sequence (Li et al. 2022, arXiv 2110.05679), for
  wide Linear layers. This sum can cancel almost entirely, and in float32 the norm then comes out
  far too small, even zero, for a record that was crafted so; a margin for the rounding error is
  added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.learning.capture import LayerCall, LayerGradient
from common.learning.groups import Groups
from common.models.checks import has_rule

Sums = dict[nn.Parameter, Tensor]
"""A parameter's sum over each of K groups: K · numel numbers, group by group."""

_ROUNDING = torch.finfo(torch.float32).eps


def record_gradients(calls: list[LayerCall]) -> list[LayerGradient]:
    """The per-record gradients of one layer's parameters, summed over its uses."""
    found: dict[nn.Parameter, Tensor] = {}
    for call in calls:
        for parameter, each in _rule(call).items():
            if parameter.requires_grad:
                found[parameter] = found[parameter] + each if parameter in found else each
    return [LayerGradient(parameter, each) for parameter, each in found.items()]


def _rule(call: LayerCall) -> dict[nn.Parameter, Tensor]:
    layer: Any = call.layer
    derivative = call.derivative
    if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
        derivative = _without_padding(call)  # Opacus's rule knows no padding
    if isinstance(layer, nn.LayerNorm) and layer.bias is None:
        normal = nn.functional.layer_norm(call.inputs, layer.normalized_shape, eps=layer.eps)
        between = range(1, derivative.dim() - len(layer.normalized_shape))
        each = normal * derivative
        return {layer.weight: each.sum(dim=tuple(between)) if between else each}
    if isinstance(layer, nn.Linear) and call.inputs.dim() == 3:
        return _linear_gradients(call)
    gradients: dict[nn.Parameter, Tensor] = opacus_rules()[type(layer)](
        layer, [call.inputs], derivative
    )
    return gradients


def opacus_rules() -> dict[type[nn.Module], Callable[..., Any]]:
    """Opacus's rules by kind of layer; loaded with the first model that needs one."""
    from opacus import GradSampleModule  # noqa: PLC0415 (three seconds, and no MLP needs it)

    rules: dict[type[nn.Module], Callable[..., Any]] = GradSampleModule.GRAD_SAMPLERS
    return rules


def _linear_gradients(call: LayerCall) -> dict[nn.Parameter, Tensor]:
    """Opacus's rule as one batched product: its einsum takes as long again to find that product."""
    layer: Any = call.layer
    found: dict[nn.Parameter, Tensor] = {}
    if layer.weight.requires_grad:
        found[layer.weight] = torch.bmm(call.derivative.mT, call.inputs)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = call.derivative.sum(dim=1)
    return found


class LayerSum(Protocol):
    """One layer's squared norms, and then its weighted sum."""

    @property
    def squares(self) -> Tensor:
        """Squared norm [rows] of each record's gradient in this layer; never rounded down."""
        ...

    def put_sums(self, factors: Tensor, sound: Tensor | None, groups: Groups, into: Sums) -> None:
        """Put ``Σ_i factors_i · gradient_i`` over the rows of each group into ``into``.

        Records that are not ``sound`` [rows] are left out; None: all are. No other layer has a sum
        for the same parameters: tied weights are refused.
        """
        ...


class Held:
    """A layer whose gradients themselves are held."""

    def __init__(self, gradients: list[LayerGradient]) -> None:
        self._flat = [(one.parameter, one.each.flatten(start_dim=1)) for one in gradients]
        self.squares = _sum_of_squares([flat for _, flat in self._flat])

    def put_sums(self, factors: Tensor, sound: Tensor | None, groups: Groups, into: Sums) -> None:
        """See ``LayerSum``."""
        for parameter, flat in self._flat:
            kept = _sound(flat, sound)
            sums = flat.new_empty(len(groups), flat.shape[1])
            for total, (start, stop) in zip(sums, groups.bounds(), strict=True):
                torch.mv(kept[start:stop].t(), factors[start:stop], out=total)
            into[parameter] = sums


class GhostLinear:
    """A Linear layer whose gradients are never held."""

    def __init__(self, call: LayerCall) -> None:
        self._call = call
        self.squares = _linear_squares(call)

    def put_sums(self, factors: Tensor, sound: Tensor | None, groups: Groups, into: Sums) -> None:
        """See ``LayerSum``."""
        layer: Any = self._call.layer
        derivative = _sound(self._call.derivative, sound)
        weighted = derivative * _like(factors, derivative)
        if layer.weight.requires_grad:
            into[layer.weight] = groups.outer(weighted, _sound(self._call.inputs, sound))
        if layer.bias is not None and layer.bias.requires_grad:
            into[layer.bias] = groups.lines(weighted).sum(dim=1)


class GhostEmbedding:
    """An Embedding layer: only the words that occur are ever touched."""

    def __init__(self, call: LayerCall) -> None:
        self._call = call
        self._derivative = _without_padding(call)
        self.squares = _embedding_squares(call, self._derivative)

    def put_sums(self, factors: Tensor, sound: Tensor | None, groups: Groups, into: Sums) -> None:
        """See ``LayerSum``."""
        layer: Any = self._call.layer
        derivative = _sound(self._derivative, sound)
        weighted = (derivative * _like(factors, derivative)).reshape(-1, layer.embedding_dim)
        words = self._call.inputs.reshape(len(self._call.inputs), -1)
        own = words + groups.of_rows[:, None] * layer.num_embeddings  # each group has its table
        tables = weighted.new_zeros(len(groups) * layer.num_embeddings, layer.embedding_dim)
        into[layer.weight] = tables.index_add_(0, own.reshape(-1), weighted)


def ghost(calls: list[LayerCall]) -> LayerSum:
    """The cheapest exact way for one layer; a layer used more than once is held."""
    call = calls[0]
    if len(calls) == 1 and isinstance(call.layer, nn.Linear) and not _cheap_to_hold(call):
        return GhostLinear(call)
    if len(calls) == 1 and isinstance(call.layer, nn.Embedding):
        return GhostEmbedding(call)
    return Held(record_gradients(calls))


def held_numbers(layer: nn.Module) -> int:
    """Numbers per record that ``ghost`` holds for this layer, at worst."""
    if isinstance(layer, nn.Embedding):
        return 0
    numbers = sum(one.numel() for one in layer.parameters() if one.requires_grad)
    return numbers if has_rule(layer) else 2 * numbers  # its own weights, and their gradient


def _sum_of_squares(flats: list[Tensor]) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(flats[0], dim=1).square_()
    for flat in flats[1:]:
        total += torch.linalg.vector_norm(flat, dim=1).square_()
    return total


def _cheap_to_hold(call: LayerCall) -> bool:
    """Whether the gradients themselves are cheaper than Gram matrices over the positions.

    A record's gradient takes T·in·out multiplications and in·out numbers, its Gram matrices
    T²·(in + out) and 2·T². Measured on one core for widths 64 to 1024, T 16 to 256 and LoRA of
    rank 8: Gram matrices win below T·(in + out) = in·out / 8, gradients above in·out / 4.
    """
    if call.inputs.dim() == 2:
        return False
    positions = call.inputs[0, ..., 0].numel()
    wide, out = call.inputs.shape[-1], call.derivative.shape[-1]
    return 4 * positions * (wide + out) >= wide * out


def _linear_squares(call: LayerCall) -> Tensor:
    layer: Any = call.layer
    weight = layer.weight.requires_grad
    bias = layer.bias is not None and layer.bias.requires_grad
    rows = len(call.inputs)
    seen = call.inputs.reshape(rows, -1, call.inputs.shape[-1])
    derivative = call.derivative.reshape(rows, -1, call.derivative.shape[-1])
    if call.inputs.dim() == 2:
        asked: Tensor = torch.linalg.vector_norm(call.derivative, dim=1).square_()
        if not weight:
            return asked
        given = torch.linalg.vector_norm(call.inputs, dim=1).square_()
        squares: Tensor = asked * (given + 1) if bias else asked * given
        return squares
    squares = derivative.new_zeros(rows)
    if weight:
        grams = torch.bmm(seen, seen.mT).mul_(torch.bmm(derivative, derivative.mT))
        lengths = torch.linalg.vector_norm(seen, dim=2) * torch.linalg.vector_norm(
            derivative, dim=2
        )
        terms = seen.shape[1] + seen.shape[2] + derivative.shape[2]
        margin = lengths.sum(dim=1).square_().mul_(_ROUNDING * terms)
        squares += grams.sum(dim=(1, 2)).clamp_(min=0).add_(margin)
    if bias:
        squares += torch.linalg.vector_norm(derivative.sum(dim=1), dim=1).square_()
    return squares


def _embedding_squares(call: LayerCall, derivative: Tensor) -> Tensor:
    """Exact: the derivatives at equal words of one record are added before they are squared."""
    layer: Any = call.layer
    rows = len(call.inputs)
    words = call.inputs.reshape(rows, -1)
    first = torch.arange(rows, device=words.device)[:, None] * layer.num_embeddings
    keys = (first + words).reshape(-1)
    pairs, place = torch.unique(keys, return_inverse=True)
    derivative = derivative.reshape(-1, layer.embedding_dim)
    sums = derivative.new_zeros(len(pairs), layer.embedding_dim)
    sums.index_add_(0, place, derivative)
    squares = derivative.new_zeros(rows)
    record = torch.div(pairs, layer.num_embeddings, rounding_mode="floor")
    return squares.index_add_(0, record, sums.square().sum(dim=1))


def _without_padding(call: LayerCall) -> Tensor:
    layer: Any = call.layer
    if layer.padding_idx is None:
        return call.derivative
    return call.derivative.masked_fill((call.inputs == layer.padding_idx)[..., None], 0.0)


def _sound(values: Tensor, sound: Tensor | None) -> Tensor:
    """``values`` [rows, …] with unsound records zeroed: zero times infinity is not zero."""
    if sound is None:
        return values
    return torch.where(_like(sound, values), values, torch.zeros_like(values))


def _like(per_row: Tensor, values: Tensor) -> Tensor:
    return per_row.reshape(-1, *([1] * (values.dim() - 1)))
