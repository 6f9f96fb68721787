"""From SMILES to compounds, scaffolds and inputs; RDKit's own answers are the golden values."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from client.hospital import split_patients
from common.errors import DataError, StudyError
from common.features import FeatureMap, range_scaling
from common.learning.gradients import PerRecordGradients
from common.learning.pretrain import mask_for, pretrain
from common.models import build_student, build_teacher
from common.simulation import SimulationSpec
from common.smiles import VOCABULARY, pieces, token_ids
from common.sources import CsvSource
from common.strict import parse_strict
from common.study import EvaluationSpec, Study, parse_study
from common.tables import Table, compounds_of, read_table
from common.tensors import get_vector, trainable
from simulations.partitions import partition

pytest.importorskip("rdkit", reason="needs the extra `molecules`")

from common.molecules import (
    ATOM_NUMBERS,
    DESCRIPTORS,
    Layout,
    compound,
    descriptors,
    fingerprint,
    graph,
    scaffold,
    scaffold_folds,
    scaffold_sets,
)

ASPIRIN, IBUPROFEN = "CC(=O)Oc1ccccc1C(=O)O", "CC(C)Cc1ccc(cc1)C(C)C(=O)O"
SMILES = [
    ASPIRIN,
    IBUPROFEN,
    "CCO",
    "CCN",
    "CCCl",
    "c1ccccc1",
    "Cc1ccccc1",
    "Oc1ccccc1",
    "C1CCCCC1N",
    "C1CCCCC1O",
    "c1ccncc1C",
    "c1ccc2ccccc2c1",
]


@pytest.fixture
def chemistry(tree: dict[str, Any]) -> Study:
    """A small study on molecules."""
    tree |= {
        "task": "screening",
        "public": {"kind": "held_apart", "fraction": 0.2},
        "simulation": {"hospitals": 3, "source": {"kind": "csv", "path": "compounds.csv"}},
    }
    tree["dictionary"] = {
        "label": {"name": "active", "classes": [[0], [1]]},
        "columns": [{"name": "smiles", "kind": "molecule", "bits": 64, "atoms": 12, "tokens": 20}],
    }
    return parse_study(tree, origin="test")


def table_from(study: Study, folder: Path, smiles: list[str]) -> Table:
    lines = ["smiles,active", *(f"{one},{row % 2}" for row, one in enumerate(smiles))]
    (folder / "compounds.csv").write_text("\n".join(lines) + "\n")
    return read_table(CsvSource(kind="csv", path="compounds.csv"), study.dictionary, folder)


def test_salts_charges_and_mirror_images_are_one_compound() -> None:
    free = compound("CC(N)C(=O)O")  # alanine
    for other in ("C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O", "CC(N)C(=O)[O-].[Na+]", " OC(=O)C(C)N "):
        assert compound(other) == free
    assert compound("CC([NH3+])C(=O)O.[Cl-]") == free
    assert compound("CCC(N)C(=O)O") != free


@pytest.mark.parametrize("wrong", ["", "C1CC", "not a molecule", "C(C)(C)(C)(C)C"])
def test_what_is_no_structure_is_empty(wrong: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert compound(wrong) == ""
    assert capfd.readouterr().err == ""  # RDKit would print the cell


def test_inputs_are_what_rdkit_says() -> None:
    from rdkit import Chem
    from rdkit.Chem import AllChem, Descriptors

    molecule = Chem.MolFromSmiles(ASPIRIN)
    counts = AllChem.GetHashedMorganFingerprint(molecule, 2, nBits=256).GetNonzeroElements()
    found = fingerprint(compound(ASPIRIN), 256)
    assert {int(bit): int(found[bit]) for bit in np.flatnonzero(found)} == counts
    values = descriptors(compound(ASPIRIN))
    assert len(values) == DESCRIPTORS
    assert values[0] * 160 + 270 == pytest.approx(Descriptors.MolWt(molecule), abs=1e-3)
    assert values[1] * 56 + 58 == pytest.approx(Descriptors.TPSA(molecule), abs=1e-3)
    assert values[11] * 2.2 + 2.4 == pytest.approx(Descriptors.MolLogP(molecule), abs=1e-3)


def test_a_graph_has_its_atoms_and_bonds() -> None:
    atoms, bonds = graph(compound("C=CO"))
    assert atoms.shape == (3, ATOM_NUMBERS)
    assert (atoms[:, 0] == 1).all()
    assert bonds.tolist() == [[0, 2, 0], [2, 0, 1], [0, 1, 0]]
    assert set(graph(compound("c1ccccc1"))[1].ravel()) == {0, 1.5}


def test_a_graph_is_padded_or_cut_to_its_public_size() -> None:
    small, large = Layout(bits=16, atoms=9), Layout(bits=16, atoms=4)
    for layout, there in ((small, 9), (large, 4)):
        inputs = layout.encode([compound("CCCCCCCCCC"), compound("CC")])
        assert inputs.shape == (2, layout.width)
        atoms = inputs[:, layout.numbers : layout.numbers + layout.atoms * ATOM_NUMBERS]
        assert atoms.reshape(2, layout.atoms, ATOM_NUMBERS)[:, :, 0].sum(axis=1).tolist() == [
            there,
            2,
        ]


def test_scaffolds_are_bemis_and_murckos() -> None:
    assert scaffold(compound(ASPIRIN)) == scaffold(compound(IBUPROFEN)) == "c1ccccc1"
    assert scaffold(compound("CCO")) == ""
    sets = scaffold_sets([compound(one) for one in SMILES])
    assert sets == [[0, 1, 5, 6, 7], [2, 3, 4], [8, 9], [11], [10]]


def test_the_rarest_scaffolds_are_part_0() -> None:
    folds = scaffold_folds([compound(one) for one in SMILES], 6)
    assert np.flatnonzero(folds == 0).tolist() == [10, 11]
    assert np.flatnonzero(folds == 1).tolist() == [8, 9]


def test_unreadable_rows_are_left_out_and_compounds_are_the_patients(
    chemistry: Study, tmp_path: Path
) -> None:
    table = table_from(chemistry, tmp_path, ["CCO", "nonsense", "OCC", "", "CCCCCCCCCCCCCC"])
    assert list(table.patients) == ["CCO", "CCO", "CCCCCCCCCCCCCC"]
    assert table.report.patients == 2
    assert table.report.unlabelled == 0
    unreadable, cut = table.report.problems
    assert "2 of 5 structures are empty or cannot be read (nonsense)" in unreadable
    assert "1 molecules have more atoms" in cut


def test_a_column_may_name_another_unit(
    chemistry: Study, tmp_path: Path, tree: dict[str, Any]
) -> None:
    tree["dictionary"]["patient_id"] = "donor"
    named = parse_study(tree, origin="test")
    (tmp_path / "c.csv").write_text("smiles,active,donor\nCCO,1,a\nCCN,0,a\n")
    table = read_table(CsvSource(kind="csv", path="c.csv"), named.dictionary, tmp_path)
    assert list(table.patients) == ["a", "a"]


def test_no_site_and_no_part_shares_a_scaffold(chemistry: Study, tmp_path: Path) -> None:
    rings = [f"C1{'C' * size}1{'C' * tail}" for size in range(2, 14) for tail in range(4)]
    table = table_from(chemistry, tmp_path, rings + ["C" * one for one in range(1, 12)])
    spec = parse_strict(
        SimulationSpec,
        {
            "source": {"kind": "csv", "path": "x"},
            "hospitals": 3,
            "partition": "scaffold",
        },
        origin="test",
    )
    parts = partition(table, spec, 3, np.random.default_rng(0), 4)
    sites = [table.take(rows) for rows in parts]
    evaluation = EvaluationSpec(folds=4, split="scaffold")
    tested, trained = set(), set()
    for number, site in enumerate(sites):
        train, test = split_patients(site, evaluation, seed=0, name=str(number))
        assert len(train) > len(test) > 0
        tested |= {scaffold(one) for one in compounds_of(test)}
        trained |= {scaffold(one) for one in compounds_of(train)}
    assert not tested & trained
    assert sum(map(len, sites)) == len(table)
    assert max(map(len, sites)) - min(map(len, sites)) <= 8


def test_a_missing_rdkit_is_one_line(
    chemistry: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__
    monkeypatch.setattr(
        "common.readers.import_module",
        lambda name: real("no_such_rdkit") if name.startswith("rdkit") else real(name),
    )
    with pytest.raises(DataError, match=r"needs rdkit, .* `pip install 'consilium\[molecules\]'`"):
        table_from(chemistry, tmp_path, ["CCO"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"public": {"kind": "dictionary"}}, "cannot draw molecules"),
        ({"scaling": "private"}, "expected 'ranges' for molecules"),
        ({"task": "diagnosis"}, "did you mean task = 'screening'"),
        (
            {"teacher": {"kind": "cnn", "hidden": [4, 4]}},
            "'mlp' or 'components' or 'graph' or 'transformer' or",
        ),
    ],
)
def test_what_molecules_cannot_be_is_refused(
    chemistry: Study, tree: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        parse_study(tree | change, origin="test")


@pytest.mark.parametrize(
    ("spec", "size"),
    [({"kind": "graph", "hidden": [4, 4]}, "atoms"), ({"kind": "transformer"}, "tokens")],
)
def test_a_network_needs_the_size_of_what_it_reads(
    chemistry: Study, tree: dict[str, Any], spec: dict[str, Any], size: str
) -> None:
    tree["dictionary"]["columns"][0][size] = 0
    tree["teacher"] = spec
    with pytest.raises(StudyError, match=f"kind = '{spec['kind']}' needs {size} = N"):
        parse_study(tree, origin="test")


def test_scaffolds_need_molecules(tree: dict[str, Any]) -> None:
    tree["evaluation"]["split"] = "scaffold"
    with pytest.raises(StudyError, match=r"evaluation.split: 'scaffold' needs a molecule"):
        parse_study(tree, origin="test")


GRAPH = {"kind": "graph", "hidden": [5, 7, 6]}
TRANSFORMER = {"kind": "transformer", "width": 8, "layers": 1, "heads": 2}


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("spec", [GRAPH, TRANSFORMER], ids=lambda spec: spec["kind"])
def test_per_record_gradients_equal_autograd(
    chemistry: Study, tree: dict[str, Any], role: str, spec: dict[str, Any]
) -> None:
    tree[role] = spec
    study = parse_study(tree, origin="test")
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    assert features.molecule is not None
    inputs = torch.from_numpy(features.molecule.encode([compound(one) for one in SMILES]))
    model: nn.Module = (build_teacher if role == "teacher" else build_student)(study, features)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))

    def loss(answers: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (answers[:, 0] - targets).square()

    targets = torch.linspace(-1, 1, len(inputs))
    fast = PerRecordGradients(model, loss)(get_vector(model), inputs, targets)
    for row in range(len(inputs)):
        one = loss(model(inputs[row : row + 1]), targets[row : row + 1]).sum()
        slow = torch.cat([g.reshape(-1) for g in torch.autograd.grad(one, trainable(model))])
        torch.testing.assert_close(fast[row], slow, rtol=1e-4, atol=1e-5)


def test_a_graphs_answer_does_not_depend_on_the_order_of_its_atoms(
    chemistry: Study, tree: dict[str, Any]
) -> None:
    tree["student"] = {"kind": "graph", "hidden": [5, 6]}
    study = parse_study(tree, origin="test")
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    layout = features.molecule
    assert layout is not None
    row = torch.from_numpy(layout.encode([compound(ASPIRIN)]))[0]
    middle = layout.numbers + layout.atoms * ATOM_NUMBERS
    order = torch.randperm(layout.atoms, generator=torch.Generator().manual_seed(0))
    atoms = row[layout.numbers : middle].reshape(layout.atoms, ATOM_NUMBERS)[order]
    end = middle + layout.atoms**2
    bonds = row[middle:end].reshape(layout.atoms, layout.atoms)[order][:, order]
    other = torch.cat([row[: layout.numbers], atoms.reshape(-1), bonds.reshape(-1), row[end:]])
    model = build_student(study, features)
    torch.testing.assert_close(model(row[None]), model(other[None]))


def test_pretraining_hides_numbers_one_by_one_and_never_the_graph(
    chemistry: Study, table_of: Callable[..., Table]
) -> None:
    features = FeatureMap(chemistry.dictionary, range_scaling(chemistry.dictionary))
    layout = features.molecule
    assert layout is not None
    batch = torch.ones(200, layout.width)
    mask = mask_for(features, batch, 0.3, torch.Generator().manual_seed(0))
    assert mask[:, : layout.numbers].float().mean() == pytest.approx(0.3, abs=0.02)
    assert not mask[:, layout.numbers :].any()


def test_a_smiles_is_atoms_bonds_and_ring_numbers() -> None:
    """Schwaller et al. 2019: elements of two letters and atoms in brackets are one token."""
    given = "Clc1c[nH]c(Br)c1[N+](=O)[O-]"
    assert " ".join(pieces(given)) == "Cl c 1 c [nH] c ( Br ) c 1 [N+] ( = O ) [O-]"
    assert pieces("C%12Si") == ["C", "%12", "S", "i"]
    ids = token_ids(given, 20)
    assert len(set(ids[:17])) == len(set(pieces(given)))
    assert (ids[:17] > 0).all()
    assert not ids[17:].any()
    assert token_ids(given, 3).tolist() == ids[:3].tolist()
    # Whatever is not in the list has one id, the last.
    assert token_ids("[U]%99$", 4).tolist() == [VOCABULARY - 1] * 3 + [0]


def test_tokens_lie_behind_the_graph_and_longer_structures_are_reported(
    chemistry: Study, tmp_path: Path
) -> None:
    layout = FeatureMap(chemistry.dictionary, range_scaling(chemistry.dictionary)).molecule
    assert layout is not None
    known = compound(ASPIRIN)
    inputs = layout.encode([known])
    assert inputs.shape == (1, layout.width)
    assert inputs[0, -20:].tolist() == token_ids(known, 20).tolist()
    without = Layout(layout.bits, layout.atoms).encode([known])
    assert (inputs[:, :-20] == without).all()
    longer = "C(Cl)(Cl)(Cl)C(Cl)(Cl)C(Cl)(Cl)Cl"  # 11 atoms, 23 tokens
    (problem,) = table_from(chemistry, tmp_path, ["CCO", longer]).report.problems
    assert "1 molecules have more atoms or tokens" in problem


def test_hidden_tokens_of_public_structures_are_learnt(
    chemistry: Study, tree: dict[str, Any]
) -> None:
    tree["teacher"] = TRANSFORMER
    adam = {"kind": "adam", "learning_rate": 1e-2}
    losses = []
    for steps in (0, 80):
        tree["pretrain"] = {"steps": steps, "optimiser": adam}
        study = parse_study(tree, origin="test")
        features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
        assert features.molecule is not None
        # So often that what is kept to watch is also among what is learnt.
        known = [compound(one) for one in SMILES] * 8
        corpus = torch.from_numpy(features.molecule.encode(known))
        teacher = build_teacher(study, features)
        losses.append(pretrain(study, teacher, features, corpus))
    assert losses[1] < 0.7 * losses[0]


def test_a_transformer_reads_the_tokens_alone(chemistry: Study, tree: dict[str, Any]) -> None:
    tree["teacher"] = TRANSFORMER
    study = parse_study(tree, origin="test")
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    assert features.molecule is not None
    inputs = torch.from_numpy(features.molecule.encode([compound(ASPIRIN), compound(IBUPROFEN)]))
    encoder = build_teacher(study, features).encoder
    found = encoder(inputs)
    assert (found[0] - found[1]).abs().max() > 1e-3
    inputs[:, :-20] = 0.0
    torch.testing.assert_close(encoder(inputs), found)


def test_components_are_those_of_the_public_structures_alone(
    chemistry: Study, tree: dict[str, Any]
) -> None:
    """scikit-learn's are the golden values; signs are free."""
    from sklearn.decomposition import PCA

    tree["teacher"] = {"kind": "components", "width": 5}
    tree["pretrain"] = {"steps": 0, "optimiser": {"kind": "sgd", "learning_rate": 1.0}}
    study = parse_study(tree, origin="test")
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    assert features.molecule is not None
    inputs = torch.from_numpy(features.molecule.encode([compound(one) for one in SMILES]))
    corpus, others = inputs[:9], inputs[9:]
    teacher = build_teacher(study, features)
    assert np.isnan(pretrain(study, teacher, features, corpus))
    golden = PCA(5).fit(corpus[:, : features.numbers].numpy())
    # Divided by the root of their deviation, and each record brought to norm 1.
    wanted = golden.transform(others[:, : features.numbers].numpy())
    wanted /= np.var(golden.transform(corpus[:, : features.numbers].numpy()), axis=0) ** 0.25
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    found = teacher.encoder(others).detach().numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(wanted), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": {"kind": "components"}}, "is for teachers.*did you mean 'mlp'"),
        ({"teacher": {"kind": "components"}}, "expected pretrain.steps = 0"),
    ],
)
def test_what_components_cannot_be_is_refused(
    chemistry: Study, tree: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        parse_study(tree | change, origin="test")


def test_more_components_than_inputs_are_refused(chemistry: Study, tree: dict[str, Any]) -> None:
    tree["teacher"] = {"kind": "components", "width": 1000}
    tree["pretrain"] = {"steps": 0, "optimiser": {"kind": "sgd", "learning_rate": 1.0}}
    study = parse_study(tree, origin="test")
    with pytest.raises(StudyError, match="expected at most 113 components"):
        build_teacher(study, FeatureMap(study.dictionary, range_scaling(study.dictionary)))
