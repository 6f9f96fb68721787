"""Where models run: the processor or a GPU, and in which precision they learn there.

A choice of the process, as its number of threads is. Weights, clipped sums, noise and optimisers
stay on the processor in float32: what a hospital releases is made there, from the same streams,
wherever its gradients were. Only passes over records, and the clip of what they give, move.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.compute import ComputeSpec
from common.errors import StudyError


@dataclass(frozen=True)
class Place:
    """``device``: where models run. ``bf16``: whether they learn in bfloat16 where that is as good
    (PyTorch's autocast: products, not sums, norms or losses)."""

    device: torch.device
    bf16: bool = False

    def passing(self) -> AbstractContextManager[object]:
        """Within, a model's forward pass computes in this precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def __str__(self) -> str:
        """For a person."""
        name = "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        return f"{name}, bfloat16" if self.bf16 else name


CPU = torch.device("cpu")
_chosen: Place | None = None


def here() -> Place:
    """This process's place: what was chosen, else what the environment says."""
    return _chosen or choose(ComputeSpec())


def choose(spec: ComputeSpec) -> Place:
    """Let the process's models run as ``spec`` says from now on; gives the place.

    Raises StudyError for a GPU that is not there.
    """
    global _chosen  # noqa: PLW0603  (a choice of the process)
    spec, found = spec.settled(), torch.cuda.is_available()
    if spec.device == "cuda" and not found:
        raise StudyError(
            "device: expected a GPU for 'cuda', PyTorch finds none; "
            "install a build of PyTorch for CUDA, or choose 'cpu'"
        )
    on_gpu = found and spec.device != "cpu"
    if on_gpu:
        _be_exact()
    bf16 = spec.precision == "bfloat16" or (
        spec.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported()
    )
    _chosen = Place(torch.device("cuda") if on_gpu else CPU, bf16)
    return _chosen


@contextmanager
def placed(spec: ComputeSpec) -> Iterator[Place]:
    """Within, models run there; see ``choose``."""
    global _chosen  # noqa: PLW0603
    before = _chosen
    try:
        yield choose(spec)
    finally:
        _chosen = before


@contextmanager
def at_work(*models: nn.Module) -> Iterator[Place]:
    """Within, ``models`` are at this process's place; afterwards on the processor."""
    place = here()
    try:
        for one in models:
            one.to(place.device)
        yield place
    finally:
        for one in models:
            one.to(CPU)


def device_of(model: nn.Module) -> torch.device:
    """Where ``model`` is."""
    return next((one.device for one in model.parameters()), CPU)


def beside(model: nn.Module, *tensors: Tensor) -> list[Tensor]:
    """The tensors where ``model`` is."""
    device = device_of(model)
    return [one.to(device) for one in tensors]


def wide(values: Tensor) -> Tensor:
    """In float32 what a pass gave in bfloat16: losses, norms, clip and sums are of these."""
    return values.float() if values.dtype is torch.bfloat16 else values


def _be_exact() -> None:
    """The same numbers every time, and float32 where float32 is said: not TF32, no atomic sums."""
    # Read by cuBLAS when it starts; see PyTorch's notes on reproducibility.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # A layer of somebody's own without such an algorithm still runs; PyTorch warns of it.
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    # Attention's fused ways back add up in any order; this one multiplies matrices.
    torch.backends.cuda.enable_flash_sdp(enabled=False)
    torch.backends.cuda.enable_mem_efficient_sdp(enabled=False)
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
