"""Files of pre-trained models: found on this machine, known by their digest, never fetched.

A study names a model's folder and pins its files. Where such folders lie is each party's own
matter: below the folder that the environment variable ``CONSILIUM_MODELS`` names. Nothing of a
model travels between the parties, and nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from common.errors import StudyError
from common.pins import Pinned

HOME = "CONSILIUM_MODELS"


def file_of(pinned: Pinned, name: str, *, what: str) -> Path:
    """The file ``name`` in the pinned folder, its content verified.

    Raises StudyError when there is none, or its SHA-256 is not the pinned one.
    """
    home = os.environ.get(HOME)
    if not home:
        raise StudyError(
            f"{what}: expected a folder with pre-trained models, found none; set {HOME} to the "
            f"folder in which {pinned.folder}/{name} lies"
        )
    path = Path(home) / pinned.folder / name
    if not path.is_file():
        raise StudyError(
            f"{what}: {path}: no such file; put the model's folder there, or set {HOME}"
        )
    state = path.stat()
    found = _digest(str(path), state.st_size, state.st_mtime_ns)
    if found != pinned.sha256:
        raise StudyError(
            f"{what}: {path}: expected SHA-256 {pinned.sha256[:16]}…, as the study pins it, found "
            f"{found[:16]}…; get the very file that the study means"
        )
    return path


@lru_cache(maxsize=16)
def _digest(path: str, size: int, changed_ns: int) -> str:  # noqa: ARG001  (a changed file is read anew)
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
