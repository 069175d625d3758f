"""Optional packages that are missing: the message must lead to them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pixart_core.extras import PACKAGES, require

PYPROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")


def test_the_message_says_what_for_and_how() -> None:
    with pytest.raises(ImportError, match=r"drawing needs no_such_package.*pip install diffusers"):
        require("no_such_package", "drawing")


@pytest.mark.parametrize("extra", PACKAGES)
def test_the_packages_are_those_of_the_extra(extra) -> None:
    """Protects the message from naming too little once an extra grows."""
    assert set(PACKAGES[extra].split()) == _packages(extra)


def _packages(extra: str) -> set[str]:
    """What an extra installs; it may name another extra of this project."""
    [listed] = re.findall(rf"^{extra} = \[(.*)\]$", PYPROJECT, re.MULTILINE)
    names = set(re.findall(r'"([\w-]+)', listed)) - {"pixart-delta"}
    for other in re.findall(r'"pixart-delta\[(\w+)\]', listed):
        names |= _packages(other)
    return names
