"""Layers without a gradient rule: each record passes through one with weights of its own.

The gradient in respect of a record's own copy of the weights is that record's gradient, whatever
the layer computes; and no record can reach another one inside it. ``torch.func.vmap`` takes the
records together; what it has no batching rule for is taken record by record.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from common.errors import PrivacyError
from common.learning.groups import Groups
from common.place import wide

Copies = dict[str, Tensor]
"""A layer's trainable parameters by name, of each record: [rows, *shape]."""

_logger = logging.getLogger(__name__)


class EachItsOwn:
    """What stands in for a layer's ``forward``: ``own`` [K, *shape], one set for each group.

    Groups are of rows; all tensors that the layer is given hold the rows first.
    """

    def __init__(self, layer: nn.Module, own: Mapping[str, Tensor], groups: Groups) -> None:
        self._layer = layer
        self._own = own
        self._groups = groups

    def copies(self) -> Copies:
        """Everybody's own weights; views where all rows are of one group."""
        if len(self._groups) == 1:
            rows = self._groups.rows
            return {name: one.expand(rows, *one.shape[1:]) for name, one in self._own.items()}
        return {name: one.index_select(0, self._groups.of_rows) for name, one in self._own.items()}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The layer's answer."""
        return answer_each(self._layer, self.copies(), arguments, named)


def learnt(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of ``layer`` and all its parts, by name."""
    return {name: one for name, one in layer.named_parameters() if one.requires_grad}


@contextmanager
def copied(layers: list[nn.Module], rows: int) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Within, each record of a batch of ``rows`` has its own copy of these layers' weights.

    Gives the copies [rows, *shape], leaves to differentiate by. Where weights were already those
    of K hospitals (an ``EachItsOwn`` stands in), the copies are of those.
    """
    found: dict[nn.Parameter, Tensor] = {}
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer, standing in zip(layers, before, strict=True):
            parameters = learnt(layer)
            if isinstance(standing, EachItsOwn):
                own = standing.copies()
            else:
                own = {name: one.expand(rows, *one.shape) for name, one in parameters.items()}
            leaves = {name: one.detach().requires_grad_() for name, one in own.items()}
            found.update({parameters[name]: one for name, one in leaves.items()})
            layer.__dict__["forward"] = functools.partial(_answer, layer, leaves)
        yield found
    finally:
        for layer, standing in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if standing is not None:
                layer.__dict__["forward"] = standing


def _answer(layer: nn.Module, copies: Copies, *arguments: Any, **named: Any) -> Any:
    return answer_each(layer, copies, arguments, named)


def answer_each(
    layer: nn.Module, copies: Copies, arguments: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    """What ``layer`` answers, each record by its own ``copies`` of the weights [rows, …].

    Raises PrivacyError when the layer is given, or answers, something that does not hold the
    records one by one.
    """
    given, how = pytree.tree_flatten((arguments, named))
    rows = len(next(iter(copies.values())))
    mapped = [place for place, one in enumerate(given) if isinstance(one, Tensor)]
    for place in mapped:
        if given[place].shape[:1] != (rows,):
            raise PrivacyError(
                f"{type(layer).__name__}: expected the {rows} records in the first dimension of "
                f"all that it is given, found shape {tuple(given[place].shape)}; keep records first"
            )
    shapes: list[Any] = []

    def one(own: Copies, *tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(given)
        for place, tensor in zip(mapped, tensors, strict=True):
            filled[place] = tensor[None]
        alone, keywords = pytree.tree_unflatten(filled, how)
        values = {f"layer.{name}": value for name, value in own.items()}
        answered, form = pytree.tree_flatten(functional_call(_Bare(layer), values, alone, keywords))
        shapes[:] = [form, answered]
        return tuple(value for value in answered if isinstance(value, Tensor))

    kind = next(iter(copies.values())).device.type
    # In float32: what autocast knows to be safe are layers, of which this is none.
    with torch.autocast(kind, enabled=False):
        for place in mapped:
            given[place] = wide(given[place])
        together = _mapped(layer, one, copies, [given[place] for place in mapped])
        dimensions = iter(_record_dimensions(layer, given, mapped, how))
    form, answered = shapes
    whole = iter(together)
    found = [
        _rejoined(next(whole), next(dimensions)) if isinstance(value, Tensor) else value
        for value in answered
    ]
    return pytree.tree_unflatten(found, form)


class _Bare(nn.Module):
    """A layer without what stands in for its ``forward``, and without its hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *arguments: Any, **named: Any) -> Any:
        layer: Any = self.layer
        if not isinstance(layer, nn.RNNBase):
            return type(layer).forward(layer, *arguments, **named)
        # A recurrent layer of torch keeps a list of its weights beside their names.
        kept = layer._flat_weights
        layer.__dict__["_flat_weights"] = [getattr(layer, one) for one in layer._flat_weights_names]
        try:
            return type(layer).forward(layer, *arguments, **named)
        finally:
            layer.__dict__["_flat_weights"] = kept


def _mapped(
    layer: nn.Module,
    one: Callable[..., tuple[Tensor, ...]],
    copies: Copies,
    tensors: list[Tensor],
) -> list[Tensor]:
    """``one`` of every record: [rows, …] of each of its answers."""
    kind = type(layer)
    if kind not in _BY_RECORD and not _pads(layer):
        try:
            return list(_vmapped(one, copies, tensors))
        except PrivacyError:
            raise
        except Exception as error:  # vmap raises whatever the layer makes it raise
            _BY_RECORD.add(kind)
            _logger.warning(
                "%s: torch.func.vmap cannot take its records together (%s); one by one",
                kind.__name__,
                str(error).partition(". ")[0].partition("\n")[0],
            )
    rows = len(next(iter(copies.values())))
    parts = [
        one({name: own[row] for name, own in copies.items()}, *(t[row] for t in tensors))
        for row in range(rows)
    ]
    return [torch.stack(part) for part in zip(*parts, strict=True)]


def _pads(layer: nn.Module) -> bool:
    """Whether it has a table whose padding learns nothing; vmap would let it (PyTorch 2.13)."""
    return any(getattr(part, "padding_idx", None) is not None for part in layer.modules())


_BY_RECORD: set[type[nn.Module]] = set()
_SLOW = "There is a performance drop"


def _vmapped(
    one: Callable[..., tuple[Tensor, ...]], copies: Copies, tensors: list[Tensor]
) -> tuple[Tensor, ...]:
    with warnings.catch_warnings():
        # Its own loop over records is no quicker than ours, and takes fewer layers.
        warnings.filterwarnings("error", message=_SLOW)
        answer: tuple[Tensor, ...] = vmap(one, randomness="different")(copies, *tensors)
    return answer


def _record_dimensions(
    layer: nn.Module, given: list[Any], mapped: list[int], how: Any
) -> list[int]:
    """The dimension that holds the records in each tensor of an answer: the one that grows."""

    def shapes(rows: int) -> list[tuple[int, ...]]:
        filled = list(given)
        for place in mapped:
            filled[place] = given[place][:1].expand(rows, *given[place].shape[1:])
        arguments, named = pytree.tree_unflatten(filled, how)
        with torch.no_grad():
            answered = pytree.tree_leaves(_Bare(layer)(*arguments, **named))
        return [tuple(one.shape) for one in answered if isinstance(one, Tensor)]

    found = []
    for one, two in zip(shapes(1), shapes(2), strict=True):
        grown = [place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
        if len(one) != len(two) or len(grown) != 1 or (one[grown[0]], two[grown[0]]) != (1, 2):
            raise PrivacyError(
                f"{type(layer).__name__}: expected an answer to each record, found shapes {one} "
                f"for one record and {two} for two"
            )
        found.append(grown[0])
    return found


def _rejoined(each: Tensor, dimension: int) -> Tensor:
    """``each`` [rows, …, 1, …], the 1 where a batch holds its records, as that batch."""
    return each.squeeze(dimension + 1).movedim(0, dimension)
