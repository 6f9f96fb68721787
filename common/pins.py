"""What pins a file of a pre-trained model in a study."""

from __future__ import annotations

from pydantic import Field

from common.strict import Strict


class Pinned(Strict):
    """A file of a pre-trained model.

    ``folder``: the model's folder below ``CONSILIUM_MODELS`` of each party (docs/text.md).
    ``sha256``: the file's digest; another file is refused.
    """

    folder: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
