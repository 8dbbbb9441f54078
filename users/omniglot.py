"""Omniglot at 28x28: 1,623 characters of 50 alphabets, for pre-training a small image model. It has no users.

Source: Lake et al. 2015, "Human-level concept learning through probabilistic program induction".
"""

from pathlib import Path

import numpy as np
import torch

from users.base import Examples
from users.files import arrays_of, find


def omniglot(data_root: str | Path | None = None) -> Examples:
    """All drawings, uint8 ``[32460, 1, 28, 28]``, ink on black, labelled by character.

    Args:
        data_root: folder that holds ``omniglot28/omniglot28.npz``.

    Raises:
        FileNotFoundError: with what was looked for. ValueError: for a damaged file.
    """
    (path,) = find(data_root, "omniglot28", ("omniglot28.npz",))
    data = arrays_of(path, ("images", "character"))
    return Examples(torch.from_numpy(data["images"])[:, None], torch.from_numpy(data["character"].astype(np.int64)))
