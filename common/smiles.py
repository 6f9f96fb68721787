"""From a SMILES to token ids: atoms, bonds, brackets and ring numbers, by a public list.

Atom-level tokens as of Schwaller et al. 2019 ("Molecular Transformer", ACS Cent. Sci. 5, 1572): an
atom in brackets, and an element of two letters, are one token; every other sign is one by itself.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from common.dictionary import PADDING

_PIECES = re.compile(r"\[[^\]]*\]|Br|Cl|%\d\d|.")

# Written down once and for good: what stands in canonical SMILES without stereochemistry. Atoms in
# brackets are those of at least five of Tox21's 7,500 public structures.
_TOKENS = (
    *("C", "c", "N", "n", "O", "o", "S", "s", "P", "F", "Cl", "Br", "I", "B"),
    *("(", ")", "=", "#", "-", ":", ".", "/", "\\", *"123456789"),
    *("[N+]", "[O-]", "[nH]", "[n+]", "[N-]", "[P+]", "[Si]", "[Se]", "[As]", "[Sn]", "[Hg]"),
    *("[C]", "[c]", "[CH2]", "[CH3]", "[O]", "[OH]", "[S]", "[PH]", "[Cl]", "[Cr]"),
)
_IDS = {token: PADDING + 1 + place for place, token in enumerate(_TOKENS)}
_OTHER = PADDING + 1 + len(_TOKENS)

VOCABULARY = _OTHER + 1
"""Different tokens: padding (0), the list, and one for all that is not in it."""


def pieces(smiles: str) -> list[str]:
    """The tokens of a SMILES, which together are the SMILES again.

    >>> pieces("C[nH]Cl%12")
    ['C', '[nH]', 'Cl', '%12']
    """
    return _PIECES.findall(smiles)


def token_ids(smiles: str, length: int) -> NDArray[np.int64]:
    """Ids below ``VOCABULARY`` [length]: cut at ``length``, padded with 0 behind."""
    found = np.full(length, PADDING, dtype=np.int64)
    ids = [_IDS.get(one, _OTHER) for one in pieces(smiles)[:length]]
    found[: len(ids)] = ids
    return found
