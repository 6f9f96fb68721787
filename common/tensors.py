"""Models as flat vectors and as files. No pickle: safetensors and plain arrays only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from common.errors import RunError
from common.files import write_atomically


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn, in their stable order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def get_vector(module: nn.Module) -> Tensor:
    """A detached copy of the trainable parameters as one vector [d], on the processor."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in trainable(module)]).cpu()


def set_vector(module: nn.Module, vector: Tensor) -> None:
    """Write ``vector`` [d] into the trainable parameters."""
    start, parameters = 0, trainable(module)
    if parameters:
        vector = vector.to(parameters[0].device)
    with torch.no_grad():
        for parameter in parameters:
            stop = start + parameter.numel()
            parameter.copy_(vector[start:stop].view_as(parameter))
            start = stop
    if start != vector.numel():
        raise ValueError(f"expected a vector of {start} numbers, found {vector.numel()}")


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values, in the order of the names."""
    running = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        running.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        running.update(tensor.cpu().numpy().tobytes())
    return running.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors, atomically."""
    write_atomically(path, save({name: t.detach().contiguous() for name, t in tensors.items()}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors. Raises RunError when the file is absent or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; is this a run folder that was started?") from None
    except Exception as error:  # safetensors raises its own untyped errors
        raise RunError(f"{path}: not a whole safetensors file ({error})") from None
