"""DICOM files and picture folders: right grey values, whose they are, and nothing of a header."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from client.sources.pixels import fit
from client.sources.reading import read_public
from common.dictionary import Dictionary
from common.errors import DataError, StudyError
from common.sources import DicomSource, ImagesSource
from common.strict import parse_strict
from common.tables import Table

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CONSILIUM_DATA", ROOT.parent / "shared" / "data"))
SCANS = Dictionary.model_validate_json(
    """{"label": {"name": "Modality", "classes": [["CT"], ["MR", "NM", "US"]]},
        "columns": [{"name": "scan", "kind": "image", "shape": [64, 64]}]}"""
)
XRAYS = SCANS.model_copy(
    update={"label": SCANS.label.model_copy(update={"name": "ill", "classes": ((0,), (1,))})}
)


def dicom(**settings: Any) -> DicomSource:
    return parse_strict(DicomSource, {"kind": "dicom", "path": "scans", **settings}, origin="x")


@pytest.fixture
def pydicom() -> Any:
    return pytest.importorskip("pydicom", reason="pydicom is not installed (consilium[dicom])")


@pytest.fixture
def write(pydicom: Any, tmp_path: Path) -> Any:
    """Writes a small DICOM file; keywords are elements of its header."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    (tmp_path / "scans").mkdir()

    def run(name: str, pixels: Any, patient: str | None = "P1", **header: Any) -> Path:
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
        meta.MediaStorageSOPInstanceUID = generate_uid()
        made = FileDataset(name, {}, file_meta=meta, preamble=b"\0" * 128)
        made.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        made.SOPClassUID = meta.MediaStorageSOPClassUID
        if patient is not None:
            made.PatientID = patient
        made.PatientName, made.Modality = "CANARY^NAME", "DX"
        array = np.asarray(pixels)
        made.Rows, made.Columns = array.shape[-2:]
        if array.ndim == 3:
            made.NumberOfFrames = len(array)
        made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
        bits = array.dtype.itemsize * 8
        made.BitsAllocated = made.BitsStored = bits
        made.HighBit = bits - 1
        made.PixelRepresentation = int(array.dtype.kind == "i")
        made.PixelData = array.tobytes()
        made.BurnedInAnnotation = "NO"
        for key, value in header.items():
            setattr(made, key, value)
        path = tmp_path / "scans" / name
        made.save_as(path, enforce_file_format=True)
        return path

    return run


@pytest.fixture
def labelled(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "labels.csv").write_text("image,ill,phone\na.dcm,0,1\nb.dcm,1,2\nc.dcm,1,3\n")
    return {"labels": {"path": "labels.csv", "key": "image"}}


RAMP = np.tile(np.arange(64, dtype=np.uint16) * 10, (64, 1))


def read(folder: Path, source: Any, dictionary: Dictionary = XRAYS) -> Table:
    return read_public(source, dictionary, folder)


def test_low_is_white_in_monochrome1(write: Any, labelled: Any, tmp_path: Path) -> None:
    write("a.dcm", RAMP)
    write("b.dcm", RAMP, PhotometricInterpretation="MONOCHROME1")
    table = read(tmp_path, dicom(**labelled))
    plain, inverse = table.values["scan"]
    np.testing.assert_allclose(plain, RAMP / 630, atol=1e-6)
    np.testing.assert_allclose(inverse, 1 - plain, atol=1e-6)
    assert table.labels.tolist() == [0, 1]


def test_rescale_then_window(write: Any, labelled: Any, tmp_path: Path) -> None:
    scale = {"RescaleSlope": 2, "RescaleIntercept": -100}
    write("a.dcm", RAMP, WindowCenter=200, WindowWidth=101, **scale)
    write("b.dcm", RAMP, WindowCenter=[200, 9], WindowWidth=[101, 9], **scale)
    write("c.dcm", RAMP, **scale)
    table = read(tmp_path, dicom(**labelled))
    wanted = np.clip((RAMP * 2.0 - 100 - 199.5) / 100 + 0.5, 0, 1)
    np.testing.assert_allclose(table.values["scan"][0], wanted, atol=1e-6)
    np.testing.assert_array_equal(table.values["scan"][0], table.values["scan"][1])
    np.testing.assert_allclose(table.values["scan"][2], RAMP / 630, atol=1e-6)
    fixed = read(tmp_path, dicom(window=[200.0, 101.0], **labelled))
    np.testing.assert_array_equal(fixed.values["scan"][2], table.values["scan"][0])


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(300.0, 200.0), (0.0, 1.0), (50.5, 33.0)])
def test_windows_are_those_of_pydicom(
    pydicom: Any, function: str, centre: float, width: float
) -> None:
    """The standard's formulas, as an independent library works them out."""
    from pydicom.dataset import Dataset
    from pydicom.pixels import apply_windowing

    from client.sources.dicom import window

    header = Dataset()
    header.PhotometricInterpretation, header.PixelRepresentation = "MONOCHROME2", 0
    header.BitsStored = 16
    header.WindowCenter, header.WindowWidth, header.VOILUTFunction = centre, width, function
    stored = np.arange(0, 700, dtype=np.uint16)
    expected = apply_windowing(stored, header) / 65535
    np.testing.assert_allclose(
        window(stored.astype(float), centre, width, function), expected, atol=1e-6
    )


def test_frames(write: Any, tmp_path: Path) -> None:
    frames = np.stack([np.full((64, 64), value, np.uint8) for value in (0, 100, 200)])
    frames[:, 0, 0] = 255  # so that each has a range
    frames[:, 0, 1] = 0
    write("a.dcm", frames, Modality="CT")
    for which, rows in (("first", [0]), ("middle", [100]), ("all", [0, 100, 200])):
        table = read(tmp_path, dicom(frames=which), SCANS)
        np.testing.assert_allclose(table.values["scan"][:, 9, 9], np.array(rows) / 255, atol=1e-6)
        assert table.report.patients == 1
    # Even where the study forgot who patients are, one person's frames are one person's.
    assert SCANS.patient_id == ""
    assert set(table.patients) == {"P1"}


def test_what_does_not_fit_is_left_out_with_the_reason(
    write: Any, labelled: Any, tmp_path: Path
) -> None:
    write("a.dcm", RAMP)
    write("b.dcm", RAMP, patient=None)
    write("c.dcm", RAMP, BurnedInAnnotation="YES")
    write("d.dcm", RAMP)  # no label
    whole = write("e.dcm", RAMP)
    whole.write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "scans" / "notes.txt").write_text("CANARY")
    table = read(tmp_path, dicom(**labelled))
    assert len(table) == 1
    assert table.report.unlabelled == 1
    problems = "\n".join(table.report.problems)
    for words in ("no PatientID", "text is burned into them", "cut short or invalid", "no DICOM"):
        assert sum(words in one and "1 files left out" in one for one in table.report.problems) == 1
    assert "CANARY" not in problems
    kept = read(tmp_path, dicom(burned_in="keep", **labelled))
    assert kept.labels.tolist() == [0, 1]


def test_silence_about_burned_in_text_is_reported(
    write: Any, labelled: Any, tmp_path: Path
) -> None:
    write("a.dcm", RAMP, BurnedInAnnotation=None)
    table = read(tmp_path, dicom(**labelled))
    assert any("1 images do not say whether text is burned" in one for one in table.report.problems)


def test_a_header_gives_away_nothing_but_what_is_listed(
    write: Any, labelled: Any, tmp_path: Path
) -> None:
    write("a.dcm", RAMP)
    for name in ("PatientName", "PatientBirthDate", "InstitutionName", "StudyDate"):
        with pytest.raises(DataError, match="not found"):
            read(tmp_path, dicom(rename={"ill": name}, **labelled))
    with pytest.raises(DataError, match="direct identifier"):
        read(tmp_path, dicom(rename={"ill": "phone"}, **labelled))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("image,ill\na.dcm,0\na.dcm,1\n", "expected each 'image' once, found 1 again"),
        ("picture,ill\na.dcm,0\n", "column 'image' not found"),
    ],
)
def test_a_label_table_must_be_clear(write: Any, table: str, says: str, tmp_path: Path) -> None:
    write("a.dcm", RAMP)
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=says):
        read(tmp_path, dicom(labels={"path": "labels.csv", "key": "image"}))


def test_dicom_needs_an_image_study(write: Any, tmp_path: Path) -> None:
    table = Dictionary.model_validate_json(
        """{"label": {"name": "ill", "classes": [[0], [1]]},
            "columns": [{"name": "a", "kind": "numeric", "range": [0, 1]}]}"""
    )
    with pytest.raises(DataError, match="the study has no image column"):
        read(tmp_path, dicom(), table)


def test_a_missing_library_names_its_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(DataError, match=r"needs pydicom.*pip install 'consilium\[dicom\]'"):
        read(tmp_path, dicom())


def test_real_files_in_place(pydicom: Any) -> None:
    """One picture in four transfer syntaxes is one picture; the broken ones are named."""
    if not (DATA / "dicom").is_dir():
        pytest.skip(f"needs dicom below {DATA}; set CONSILIUM_DATA")
    source = parse_strict(DicomSource, {"kind": "dicom", "path": "dicom"}, origin="x")
    table = read(DATA, source, SCANS)
    mr = table.values["scan"][table.patients == "4MR1"]
    assert len(mr) == 4  # explicit, implicit, big-endian, RLE
    for other in mr[1:]:
        np.testing.assert_array_equal(mr[0], other)
    assert set(table.patients) >= {"1CT1", "4MR1"}
    problems = "\n".join(table.report.problems)
    for name in ("MR_truncated.dcm", "badVR.dcm", "rtstruct.dcm", "test-SR.dcm", "waveform_ecg"):
        assert name in problems
    if pytest.importorskip("gdcm", reason="gdcm is not installed (consilium[dicom])"):
        assert set(table.patients) == {"1CT1", "8NM1", "4MR1", "204"}


# Pictures

SPEC = {"kind": "images", "path": "pics", "patient_pattern": r"person(\d+)_"}


def images(**settings: Any) -> ImagesSource:
    return parse_strict(ImagesSource, {**SPEC, **settings}, origin="x")


def picture(folder: Path, name: str, array: Any, **options: Any) -> None:
    path = folder / "pics" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def test_pictures_by_folder_and_pattern(tmp_path: Path) -> None:
    small = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    picture(tmp_path, "well/person1_a.png", small)
    picture(tmp_path, "ill/person1_b.png", small.astype(np.uint16) * 257)
    picture(tmp_path, "ill/person2_c.png", np.stack([small] * 3, axis=2))
    picture(tmp_path, "ill/person3_d.jpeg", small, quality=95)
    (tmp_path / "pics" / "ill" / "person4_e.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    picture(tmp_path, "ill/nobody.png", small)
    table = read(tmp_path, images(rename={"ill": "folder"}, recode={"ill": {"well": 0, "ill": 1}}))
    assert table.patients.tolist() == ["1", "2", "3", "1"]
    assert table.labels.tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(table.values["scan"][3], small / 255, atol=1e-6)
    np.testing.assert_allclose(table.values["scan"][0], small / 255, atol=1e-6)  # 16 bits
    np.testing.assert_allclose(table.values["scan"][1], small / 255, atol=1e-6)  # colour
    np.testing.assert_allclose(table.values["scan"][2], small / 255, atol=0.02)  # lossy
    problems = "\n".join(table.report.problems)
    assert "person4_e.png" in problems
    assert "whose they are is not known; that decides what protects (ill/nobody.png)" in problems


def test_pictures_by_a_table(tmp_path: Path) -> None:
    picture(tmp_path, "a.png", np.zeros((64, 64), np.uint8))
    picture(tmp_path, "b.png", np.zeros((64, 64), np.uint8))
    (tmp_path / "t.csv").write_text("f,who,ill\na.png,7,1\nb.png,7,0\n")
    labels = {"path": "t.csv", "key": "f"}
    table = read(tmp_path, images(patient_pattern="", patient="who", labels=labels))
    assert table.patients.tolist() == ["7", "7"]
    assert table.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match="column 'whom' not found in the label table; did you mean"):
        read(tmp_path, images(patient_pattern="", patient="whom", labels=labels))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"patient_pattern": ""}, "give either patient or patient_pattern"),
        ({"patient_pattern": "", "patient": "who"}, "give labels"),
        ({"labels": {"path": "x", "key": "k", "by": "study"}}, "expected 'file'"),
    ],
)
def test_whose_pictures_they_are_must_be_said(settings: Any, says: str) -> None:
    with pytest.raises(StudyError, match=says):
        images(**settings)


@pytest.mark.parametrize("pattern", ["person(", "person", "(a)(b)"])
def test_a_pattern_has_one_group(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    with pytest.raises(DataError, match="patient_pattern"):
        read(tmp_path, images(patient_pattern=pattern))


def test_a_bomb_of_a_picture_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path, "person1_a.png", np.zeros((64, 64), np.uint8))
    picture(tmp_path, "person2_b.png", np.zeros((90, 90), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    with pytest.raises(DataError, match="too large"):
        read(tmp_path, images(rename={"ill": "folder"}))


@given(st.integers(1, 90), st.integers(1, 90), st.floats(0, 1, width=32))
def test_fitting_keeps_grey_values_and_form(height: int, width: int, grey: float) -> None:
    fitted = fit(np.full((height, width), grey, np.float32), (40, 30))
    assert fitted.shape == (40, 30)
    assert 0 <= fitted.min() <= fitted.max() <= 1
    assert fitted.max() == pytest.approx(grey, abs=1e-6)
    # Only black beside it, and as much of it as its form says.
    shown = fitted > grey / 2
    np.testing.assert_allclose(fitted, np.where(shown, grey, 0), atol=1e-6)
    scale = min(40 / height, 30 / width)
    assert grey == 0 or shown.sum() == max(1, round(height * scale)) * max(1, round(width * scale))
