"""A folder of many runs belongs to one study and one kind of noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.files import write_atomically


def claim(
    folder: Path,
    name: str,
    kind: str,
    asked: Mapping[str, Any],
    *,
    data_folder: Path,
    replace_existing: bool,
) -> None:
    """Make ``folder`` this ``kind``'s own, by the file ``name``: other runs must never mix with it.

    ``asked``: what must be the same for the folder's runs to be used again. Raises RunError when
    the folder holds something else.
    """
    path = folder / name
    if replace_existing and path.is_file():
        shutil.rmtree(folder)
    wanted = json.loads(json.dumps(asked))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in wanted} != wanted:
            raise RunError(
                f"{folder} holds a {kind} of another study or other noise; choose another "
                f"folder, or start over with --replace"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder}: not empty and not a {kind}; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    settings = wanted | {"data_folder": str(data_folder.resolve())}
    write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())
