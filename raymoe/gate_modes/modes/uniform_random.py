"""`uniform_random`: rows that are drawn from a seed as torch.nn.Linear initializes weights, for routers that are to be
trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymoe.gate_modes.base import DrawnMode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class UniformRandom(DrawnMode):
    """Each element is drawn from U(-1/sqrt(hidden), 1/sqrt(hidden))."""

    name = "uniform_random"

    def draw_row(self, generator: np.random.Generator, hidden: int) -> npt.NDArray[np.float32]:
        """As `DrawnMode.draw_row`."""
        import numpy as np

        bound = hidden**-0.5
        return generator.uniform(-bound, bound, hidden).astype(np.float32)


MODE = UniformRandom()
