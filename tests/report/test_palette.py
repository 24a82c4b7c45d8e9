"""The colours of the style sheet: seen on their background, and told apart with impaired colour vision too."""

from __future__ import annotations

import re
from importlib.resources import files

import numpy as np
import pytest

# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
# Linear RGB to OKLab (Ottosson 2020), in which a distance of 0.02 is about the least that one sees.
TO_LMS = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
TO_LAB = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]


def linear(rgb: np.ndarray) -> np.ndarray:
    share = rgb / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


@pytest.fixture(params=["light", "dark"])
def theme(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """The experts' colours and the cards' colour, in linear RGB."""
    parts = (files("raymoe.report") / "eval_page.css").read_text().split("@media (prefers-color-scheme: dark)")
    css = parts[request.param == "dark"]
    colours = [[int(part) for part in found.split()] for found in re.findall(r"--c\d+: ([\d ]+);", css)]
    card = re.search(r"--card: #(\w+);", css)
    assert card is not None
    digits = card[1] if len(card[1]) == 6 else "".join(2 * digit for digit in card[1])
    return linear(np.array(colours[:16])), linear(np.array(list(bytes.fromhex(digits))))


def test_contrast_with_the_page(theme: tuple[np.ndarray, np.ndarray]) -> None:
    colours, card = theme
    bright = np.array([0.2126, 0.7152, 0.0722])
    one, other = colours @ bright + 0.05, card @ bright + 0.05
    assert len(colours) == 16
    assert (np.maximum(one, other) / np.minimum(one, other)).min() >= 3, "WCAG 2.2, 1.4.11"


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize(("count", "least"), [(8, 0.07), (16, 0.04)])
def test_colours_differ(theme: tuple[np.ndarray, np.ndarray], vision: str, count: int, least: float) -> None:
    seen = np.clip(theme[0][:count] @ np.array(VISION[vision]).T, 0, 1)
    lab = np.cbrt(seen @ np.array(TO_LMS).T) @ np.array(TO_LAB).T
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(count, 1)]
    assert distances.min() >= least
