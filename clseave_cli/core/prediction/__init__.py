"""Predicting one pair or many, with torch or an exported folder; exporting; serving."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
