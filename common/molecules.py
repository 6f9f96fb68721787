"""Molecules: from a SMILES to the compound, its scaffold, and the numbers that a network sees.

All chemistry is RDKit's (the extra ``molecules``). What a structure becomes depends on that
structure and on public constants alone, and is remembered: a study reads each compound many times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.readers import needed
from common.smiles import token_ids

LONGEST = 512
"""Characters of the longest SMILES that is read; longer ones are no small molecules."""

_REMEMBERED = 2**16
# Morgan fingerprints of radius 2 (Rogers & Hahn 2010: ECFP4).
_RADIUS = 2
# Contributions to the surface are seen in units of so many Å².
_SURFACE = 20.0
# Descriptors with a mean and a standard deviation, rounded from the public structures of Tox21.
_DESCRIPTORS: tuple[tuple[str, float, float], ...] = (
    ("_CalcMolWt", 270.0, 160.0),
    ("CalcTPSA", 58.0, 56.0),
    ("CalcNumHBD", 1.25, 1.9),
    ("CalcNumHBA", 3.4, 3.0),
    ("CalcNumRotatableBonds", 4.3, 4.4),
    ("CalcNumRings", 1.8, 1.8),
    ("CalcNumAromaticRings", 1.1, 1.1),
    ("CalcFractionCSP3", 0.46, 0.32),
    ("CalcNumHeteroatoms", 4.8, 3.9),
    ("CalcNumAmideBonds", 0.33, 0.95),
    ("CalcLabuteASA", 111.0, 64.0),
)
_CRIPPEN = ((2.4, 2.2), (72.0, 41.0))  # logP and molar refractivity (Wildman & Crippen 1999)
_SURFACES = (("SlogP_VSA_", 12), ("SMR_VSA_", 10), ("PEOE_VSA_", 14))  # Labute 2000
_REACH = 4.0

DESCRIPTORS = len(_DESCRIPTORS) + len(_CRIPPEN) + sum(count for _, count in _SURFACES)

_ELEMENTS = ("C", "N", "O", "S", "F", "Cl", "Br", "I", "P")
_DEGREES, _HYDROGENS, _CHARGES = range(1, 5), range(1, 4), (-1, 1)

ATOM_NUMBERS = 1 + len(_ELEMENTS) + 1 + len(_DEGREES) + len(_HYDROGENS) + len(_CHARGES) + 2
"""Numbers by which a graph describes an atom; the first is 1 where there is an atom at all."""


@dataclass(frozen=True)
class Layout:
    """Where a molecule's inputs lie: fingerprint, descriptors, then its graph, then its tokens.

    ``bits``: length of the fingerprint. ``atoms``: the most atoms of a graph; 0 for no graph.
    ``tokens``: the most tokens of its SMILES; 0 for none.
    """

    bits: int
    atoms: int
    tokens: int = 0

    @property
    def numbers(self) -> int:
        """Inputs before graph and tokens."""
        return self.bits + DESCRIPTORS

    @property
    def width(self) -> int:
        """All inputs."""
        return self.numbers + self.atoms * (ATOM_NUMBERS + self.atoms) + self.tokens

    def encode(self, compounds: Sequence[str]) -> NDArray[np.float32]:
        """[rows, width]: log(1 + count), descriptors, atoms [atoms, ATOM_NUMBERS], bonds
        [atoms, atoms], ids of tokens; of a larger molecule the first atoms and tokens in the order
        of its SMILES."""
        end = self.width - self.tokens
        inputs = np.zeros((len(compounds), self.width), dtype=np.float32)
        for row, one in enumerate(compounds):
            inputs[row, : self.bits] = np.log1p(fingerprint(one, self.bits).astype(np.float32))
            inputs[row, self.bits : self.numbers] = descriptors(one)
            if self.atoms:
                inputs[row, self.numbers : end] = self._graph(one)
            if self.tokens:
                inputs[row, end:] = token_ids(one, self.tokens)
        return inputs

    def _graph(self, compound: str) -> NDArray[np.float32]:
        own, between = graph(compound)
        count = min(self.atoms, len(own))
        atoms = np.zeros((self.atoms, ATOM_NUMBERS), dtype=np.float32)
        bonds = np.zeros((self.atoms, self.atoms), dtype=np.float32)
        atoms[:count], bonds[:count, :count] = own[:count], between[:count, :count]
        return np.concatenate([atoms.ravel(), bonds.ravel()])


def check_rdkit() -> None:
    """Raises DataError, with the line that installs it, where RDKit is missing."""
    _rdkit("Chem")


@lru_cache(maxsize=_REMEMBERED)
def compound(smiles: str) -> str:
    """The compound of a SMILES: its largest fragment, uncharged, as canonical SMILES without
    stereochemistry. Empty where the structure cannot be read.

    Salts, charges and mirror images of one substance are one compound: one privacy unit. None of
    what a network sees could tell them apart.
    """
    chem, standard = _rdkit("Chem"), _rdkit("Chem.MolStandardize.rdMolStandardize")
    with _silence():
        molecule = chem.MolFromSmiles(smiles.strip())
        if molecule is None or molecule.GetNumAtoms() == 0:
            return ""
        fragments = chem.GetMolFrags(molecule, asMols=True)
        largest = max(fragments, key=lambda one: (one.GetNumHeavyAtoms(), _canonical(one)))
        found = _canonical(standard.Uncharger().uncharge(largest))
        readable = len(found) <= LONGEST and chem.MolFromSmiles(found) is not None
    return found if readable else ""


@lru_cache(maxsize=_REMEMBERED)
def atom_count(compound: str) -> int:
    """Heavy atoms of a compound."""
    return int(_molecule(compound).GetNumHeavyAtoms())


@lru_cache(maxsize=_REMEMBERED)
def scaffold(compound: str) -> str:
    """Rings and what links them, as SMILES (Bemis & Murcko 1996); empty for a chain."""
    murcko = _rdkit("Chem.Scaffolds.MurckoScaffold")
    with _silence():
        found: str = murcko.MurckoScaffoldSmiles(mol=_molecule(compound), includeChirality=False)
    return found


def scaffold_sets(compounds: Sequence[str]) -> list[list[int]]:
    """Positions of the compounds of each scaffold, the largest set first; of sets of one size the
    one whose first compound comes last goes first, as in MoleculeNet (Wu et al. 2018)."""
    sets: dict[str, list[int]] = {}
    for position, one in enumerate(compounds):
        sets.setdefault(scaffold(one), []).append(position)
    return sorted(sets.values(), key=lambda one: (len(one), one[0]), reverse=True)


def scaffold_folds(compounds: Sequence[str], folds: int) -> NDArray[np.int64]:
    """The part of each compound [compounds]: whole scaffolds, the rarest in part 0.

    With ten parts, part 0 is the test set and part 1 the validation set of MoleculeNet's
    deterministic scaffold split, whose training set holds the most frequent scaffolds.
    """
    found, end = np.empty(len(compounds), dtype=np.int64), 0
    for members in scaffold_sets(compounds):
        end += len(members)
        found[members] = (len(compounds) - end) * folds // len(compounds)
    return found


@lru_cache(maxsize=_REMEMBERED)
def fingerprint(compound: str, bits: int) -> NDArray[np.uint8]:
    """How often each circular substructure occurs [bits]; 255 stands for that and more."""
    counts = _generator(bits).GetCountFingerprintAsNumPy(_molecule(compound))
    held: NDArray[np.uint8] = np.minimum(counts, 255).astype(np.uint8)
    return held


@lru_cache(maxsize=_REMEMBERED)
def descriptors(compound: str) -> NDArray[np.float32]:
    """Weight, logP, polar surface, … in public units, held within ±4 [DESCRIPTORS]."""
    molecule, known = _molecule(compound), _rdkit("Chem.rdMolDescriptors")
    values = [
        (getattr(known, name)(molecule) - mean) / spread for name, mean, spread in _DESCRIPTORS
    ]
    values += [
        (value - mean) / spread
        for value, (mean, spread) in zip(
            known.CalcCrippenDescriptors(molecule), _CRIPPEN, strict=True
        )
    ]
    for name, _ in _SURFACES:
        values += [value / _SURFACE for value in getattr(known, name)(molecule)]
    held: NDArray[np.float32] = np.nan_to_num(np.array(values, dtype=np.float32))
    return held.clip(-_REACH, _REACH)


@lru_cache(maxsize=_REMEMBERED)
def graph(compound: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Atoms [atoms, ATOM_NUMBERS], and the orders of the bonds between them [atoms, atoms]:
    1, 1.5 in an aromatic ring, 2 or 3; 0 where there is none."""
    molecule = _molecule(compound)
    atoms = np.array([_atom(one) for one in molecule.GetAtoms()], dtype=np.float32)
    bonds = np.zeros((len(atoms), len(atoms)), dtype=np.float32)
    for bond in molecule.GetBonds():
        ends = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        bonds[ends] = bonds[ends[::-1]] = bond.GetBondTypeAsDouble()
    return atoms, bonds


def _atom(atom: Any) -> list[float]:
    element, charge = atom.GetSymbol(), atom.GetFormalCharge()
    return [
        1.0,
        *(float(element == one) for one in _ELEMENTS),
        float(element not in _ELEMENTS),
        *(float(atom.GetDegree() == one) for one in _DEGREES),
        *(float(atom.GetTotalNumHs() == one) for one in _HYDROGENS),
        *(float(np.sign(charge) == one) for one in _CHARGES),
        float(atom.GetIsAromatic()),
        float(atom.IsInRing()),
    ]


def _canonical(molecule: Any) -> str:
    found: str = _rdkit("Chem").MolToSmiles(molecule, isomericSmiles=False)
    return found


def _molecule(compound: str) -> Any:
    with _silence():
        return _rdkit("Chem").MolFromSmiles(compound)


@lru_cache(maxsize=8)
def _generator(bits: int) -> Any:
    made: Callable[..., Any] = _rdkit("Chem.rdFingerprintGenerator").GetMorganGenerator
    return made(radius=_RADIUS, fpSize=bits)


@contextmanager
def _silence() -> Iterator[None]:
    """RDKit prints what it cannot read, which may be a hospital's cell."""
    with _rdkit("rdBase").BlockLogs():
        yield


def _rdkit(module: str) -> ModuleType:
    found: ModuleType = needed(f"rdkit.{module}", "molecules", "kind = 'molecule'")
    return found
