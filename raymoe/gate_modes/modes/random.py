"""`random`: directions that are drawn from a seed, for routers that are to be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymoe.gate_modes.base import DrawnMode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Random(DrawnMode):
    """A random direction at unit length, about N(0, 1/hidden) for each element.

    Rows of N(0, 1), as some tools draw them, make router logits so large that the softmax sends everything to one
    expert.
    """

    name = "random"

    def draw_row(self, generator: np.random.Generator, hidden: int) -> npt.NDArray[np.float32]:
        """As `DrawnMode.draw_row`."""
        from raymoe.gate_modes.directions import normalize

        return normalize(generator.standard_normal(hidden))


MODE = Random()
