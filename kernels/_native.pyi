import numpy as np
from numpy.typing import NDArray

def write_patches(
    pixels: NDArray[np.uint8],
    patch: int,
    merge: int,
    temporal: int,
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    out: NDArray[np.float32],
) -> None: ...
