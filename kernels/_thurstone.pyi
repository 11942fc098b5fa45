import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

def thurstone_map(
    prior: Floats,
    known: Floats,
    stds: Floats,
    preferences: Floats,
    sigma: float,
    lam: float,
    threads: int,
    score: Floats,
    std: Floats,
) -> None: ...
def thurstone_joint(
    prior: Floats,
    weights: Floats,
    stds: Floats,
    pairs: NDArray[np.int64],
    preferences: Floats,
    sigmas: Floats,
    counts: Floats,
    exact_up_to: int,
    score: Floats,
    std: Floats,
) -> None: ...
def inverse_mills_ratios(z: float) -> list[float]: ...
def which_is_out_of_range(known: Floats, stds: Floats, preferences: Floats) -> int: ...
