"""No minimum or pinned version has a vulnerability listed in advisories.toml, unless an exception is justified."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import qbatch

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
ADVISORIES: list[dict[str, Any]] = tomllib.loads((ROOT / "advisories.toml").read_text())["advisory"]


def floors() -> Iterator[tuple[str, str]]:
    """Each package that pyproject.toml names, with the lowest version that it takes."""
    project = PROJECT["project"]
    listed = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    listed += [text for extra in project["optional-dependencies"].values() for text in extra]
    for requirement in map(Requirement, listed):
        if requirement.name == project["name"]:
            continue
        (floor,) = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
        yield canonicalize_name(requirement.name), floor


def pins() -> Iterator[tuple[str, str]]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            name, version = line.split("==")
            yield canonicalize_name(name), version


def standing(package: str, version: str) -> list[str]:
    """The advisories that a version is under."""
    return [
        advisory["id"]
        for advisory in ADVISORIES
        if advisory["package"] == package
        and "unreached" not in advisory
        and SpecifierSet(advisory["affected"]).contains(version, prereleases=True)
    ]


@pytest.mark.parametrize(("package", "version"), sorted({*floors(), *pins()}))
def test_no_floor_and_no_pin_is_under_an_advisory(package: str, version: str) -> None:
    assert standing(package, version) == []


@pytest.mark.parametrize("advisory", ADVISORIES, ids=lambda advisory: advisory["id"])
def test_an_advisory_is_whole_and_of_something_that_is_used(advisory: dict[str, Any]) -> None:
    assert re.fullmatch(r"CVE-\d{4}-\d+|GHSA(-[a-z0-9]{4}){3}|PYSEC-\d{4}-\d+", advisory["id"])
    assert advisory["package"] in dict(floors()) | dict(pins())
    assert advisory["summary"]
    affected = SpecifierSet(advisory["affected"])
    assert all(specifier.operator in ("<", "<=") for specifier in affected)
    if advisory["fixed"]:
        assert not affected.contains(advisory["fixed"], prereleases=True)
        assert Version(advisory["fixed"]) >= max(Version(specifier.version) for specifier in affected)
    assert ("unreached" in advisory) == ("absent" in advisory)


def test_no_advisory_is_listed_twice() -> None:
    assert len({advisory["id"] for advisory in ADVISORIES}) == len(ADVISORIES)


def test_what_advisories_call_unused_is_not_in_the_code() -> None:
    package = Path(qbatch.__file__).parent
    folders = [package, *(path for path in package.iterdir() if path.is_dir())]
    code = "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    assert "from_pretrained" in code
    for advisory in ADVISORIES:
        assert not [word for word in advisory.get("absent", ()) if word in code], advisory["id"]


@pytest.mark.parametrize(
    ("package", "version"), [("jinja2", "3.1"), ("jinja2", "3.1.5"), ("sentencepiece", "0.2"), ("setuptools", "77")]
)
def test_earlier_vulnerable_versions_would_be_found(package: str, version: str) -> None:
    assert standing(package, version)
