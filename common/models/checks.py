"""Which models can be trained privately: refused before training, with the reason in one line.

A private step needs the gradient of each record by itself. That exists only when no record changes
another one's answer and nothing computed from records stays in the model. A layer of a kind listed
here has a fast rule for it; any other is differentiated record by record (see
``common.learning.unruled``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from common.errors import PrivacyError
from common.place import device_of

# Exact types: a subclass may compute something else. Records lie in the first dimension of each.
SUPPORTED_LAYERS: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.Embedding,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        nn.RMSNorm,
    }
)
CHECKPOINTED = (
    "gradient checkpointing runs a layer twice for one step, so that its records would be counted "
    "twice; switch it off"
)
_MADE_UP_TOKENS = 8
# By name: to load Opacus takes longer than all else a command loads, and few models need it.
_SEQUENCE_BIAS = ("opacus.layers.dp_multihead_attention", "SequenceBias")


def check_private(model: nn.Module) -> None:
    """Refuse a model whose per-record gradients do not exist or are not computed correctly.

    Raises PrivacyError, which names the layer and says what to use in its place.
    """
    for name, module in model.named_modules():
        place = _place(name, module)
        if isinstance(module, _BatchNorm):
            raise PrivacyError(
                f"{place}: BatchNorm mixes the records of a batch and remembers their statistics, "
                f"so that no patient's own gradient exists; use GroupNorm"
            )
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            raise PrivacyError(
                f"{place}: running statistics of patients would stay in the model uncharged; "
                f"set track_running_stats=False or use GroupNorm"
            )
        if getattr(module, "gradient_checkpointing", False) is True:
            raise PrivacyError(f"{place}: {CHECKPOINTED}")
        if getattr(module, "inplace", False) is True:
            raise PrivacyError(
                f"{place}: overwrites the values that per-record gradients are computed from; "
                f"set inplace=False"
            )
        if trains_within(module):
            _check_layer(place, module)
    _check_untied(model)


def trains(module: nn.Module) -> bool:
    """Whether the module itself, not a part of it, holds a trainable parameter."""
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def trains_within(module: nn.Module) -> bool:
    """Whether the module, or a part of it, holds a trainable parameter."""
    return any(parameter.requires_grad for parameter in module.parameters())


def has_rule(module: nn.Module) -> bool:
    """Whether ``module`` has a rule for its records' gradients."""
    return type(module) in SUPPORTED_LAYERS and getattr(module, "padding_mode", "zeros") == "zeros"


def learners(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The layers that learn: those with a rule, and those without.

    A layer without one is a whole, with all its parts: what they do, it alone knows. (PyTorch's
    attention never calls the layer that holds some of its weights.)
    """
    ruled: list[nn.Module] = []
    unruled: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        if module in ruled or module in unruled or not trains_within(module):
            return
        if trains(module) or isinstance(module, nn.MultiheadAttention):
            (ruled if has_rule(module) else unruled).append(module)
            return
        for part in module.children():
            visit(part)

    visit(model)
    return ruled, unruled


def check_records_apart(model: nn.Module, like: Tensor, *, learning: bool = True) -> None:
    """Refuse a model in which one record changes another one's answer.

    Two made-up records of the shape and type of ``like`` [rows, …] are answered together and
    alone; no patient's value enters. It finds hand-written normalisation over the batch, which no
    list of layers can, and trainable layers that see something else than records in the first
    dimension, which would be mistaken for records whenever the sizes happen to agree. A model that
    is ``learning`` is asked in training mode too, where it may compute something else.
    """
    shape = (2, *like.shape[1:])
    if like.is_floating_point():
        made_up = torch.cos(torch.arange(math.prod(shape), dtype=like.dtype) ** 1.5).reshape(shape)
    else:
        # A short text of ones is compared: zeros would be padding, whose answer is fixed.
        made_up = torch.zeros(shape, dtype=like.dtype)
        made_up[0, ..., :_MADE_UP_TOKENS] = 1
    made_up = made_up.to(device_of(model))
    rows_seen: list[tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = []

    def note(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        rows_seen.append((layer, tuple(arguments[0].shape), tuple(output.shape)))

    handles = [one.register_forward_hook(note) for one in learners(model)[0]]
    training = model.training
    model.eval()  # dropout draws differ between calls, by design
    try:
        answers = []
        for rows in (2, 1):
            with torch.no_grad():
                answers.append(model(made_up[:rows]))
            for layer, given, answered in rows_seen:
                check_records_first(model, layer, rows, given, answered)
            rows_seen.clear()
        others = _beside_others(model, made_up) if learning else answers[:1] * 2
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    together, alone = answers
    if alone.shape[0] != 1 or not (_equal(together, alone) and _equal(*others)):
        raise PrivacyError(
            f"{type(model).__name__}: the answer for one record depends on the other records of "
            f"its batch, so that no patient's own gradient exists; normalise each record by itself"
        )


def _beside_others(model: nn.Module, made_up: Tensor) -> list[Tensor]:
    """Answers in training mode to the first of two records, beside the second and beside itself.

    Both batches have one shape and one seed, so that dropout draws alike for them.
    """
    # torch.manual_seed would seed every kind of device there may be: ten milliseconds each time.
    on_gpu = made_up.device.type == "cuda"
    seed = torch.cuda.manual_seed if on_gpu else torch.default_generator.manual_seed
    answers = []
    model.train()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for rows in ((0, 1), (0, 0)):
            seed(0)
            answers.append(model(made_up[list(rows)]))
    return answers


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether the first record is answered alike."""
    return torch.allclose(one[:1], other[:1], rtol=1e-3, atol=1e-4, equal_nan=True)


def check_records_first(
    model: nn.Module, layer: nn.Module, rows: int, given: tuple[int, ...], answered: tuple[int, ...]
) -> None:
    """Refuse a layer whose input or output does not hold the ``rows`` records one by one."""
    if given[:1] != (rows,) or answered[:1] != (rows,):
        raise PrivacyError(
            f"{place_of(model, layer)}: expected the {rows} records in the first dimension, found "
            f"shape {given}; keep records first, or freeze the layer"
        )


def place_of(model: nn.Module, layer: nn.Module) -> str:
    """How an error names ``layer``."""
    name = next(name for name, module in model.named_modules() if module is layer)
    return _place(name, layer)


def _place(name: str, layer: nn.Module) -> str:
    return f"layer {name!r} ({type(layer).__name__})" if name else type(layer).__name__


def _check_layer(place: str, module: nn.Module) -> None:
    if any((one.__module__, one.__name__) == _SEQUENCE_BIAS for one in type(module).__mro__):
        raise PrivacyError(
            f"{place}: its answer does not hold the records one by one; "
            f"build the attention without add_bias_kv"
        )
    if type(module) in SUPPORTED_LAYERS and any(True for _ in module.buffers(recurse=False)):
        raise PrivacyError(
            f"{place}: a trainable layer with buffers may keep values of patients; "
            f"remove the buffers or freeze the layer"
        )
    if getattr(module, "parametrizations", None):
        raise PrivacyError(f"{place}: parametrised weights have no per-record rule; remove them")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    ):
        raise PrivacyError(
            f"{place}: max_norm, scale_grad_by_freq and sparse mix records or change weights "
            f"outside the private step; leave them off"
        )


def _check_untied(model: nn.Module) -> None:
    owner: dict[tuple[int, int], str] = {}
    for name, parameter in _trainable_everywhere(model):
        place = (parameter.untyped_storage().data_ptr(), int(parameter.storage_offset()))
        if parameter.numel() == 0:
            continue
        if place in owner:
            raise PrivacyError(
                f"weights {owner[place]!r} and {name!r} are tied: each layer would be clipped as "
                f"if it were alone, and the bound on a patient would fail; give each its own"
            )
        owner[place] = name


def _trainable_everywhere(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            yield name, parameter
