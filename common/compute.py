"""What a machine's owner says of where its models run: `[compute]` of a settings file."""

from __future__ import annotations

import os
from typing import Literal

from common.strict import Strict, parse_strict

DEVICE_VARIABLE, PRECISION_VARIABLE = "CONSILIUM_DEVICE", "CONSILIUM_PRECISION"


class ComputeSpec(Strict):
    """``device``: ``auto`` is what the environment variable CONSILIUM_DEVICE says, else a GPU where
    there is one, else the processor. ``precision``, in which models learn: ``auto`` is what
    CONSILIUM_PRECISION says, else bfloat16 on a GPU that can, else float32."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def settled(self) -> ComputeSpec:
        """With what the environment says in place of ``auto``; see ``from_environment``."""
        said = from_environment()
        return ComputeSpec(
            device=said.device if self.device == "auto" else self.device,
            precision=said.precision if self.precision == "auto" else self.precision,
        )


def from_environment() -> ComputeSpec:
    """What the environment variables say; raises StudyError for words that mean nothing."""
    found = {"device": DEVICE_VARIABLE, "precision": PRECISION_VARIABLE}
    said = {key: os.environ[name] for key, name in found.items() if name in os.environ}
    origin = "--device, CONSILIUM_DEVICE or CONSILIUM_PRECISION"
    return parse_strict(ComputeSpec, said, origin=origin)
