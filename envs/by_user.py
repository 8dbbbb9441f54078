"""What is observed of a user before anything is decided, for all users at once or for each when somebody asks.

Shapes: U users, E width of an embedding, P pathways, S statistics.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from envs.statistics import PathwayStatistics, Raw
from users.base import SPLITS
from users.batch import Batch, Prepared
from users.embedding import UserEmbedder

TOGETHER = 64
"""Users observed together on demand."""
SCORES = ("gradient_norm", "relative_gradient")


class ByUser:
    """An array ``[U, ...]`` whose rows are filled in when somebody reads them; indexed like a NumPy array.

    Args:
        array: where the rows are kept.
        fill: called with the positions of users before their rows are read.
    """

    def __init__(self, array: NDArray[Any], fill: Callable[[NDArray[np.int64]], None]) -> None:
        self._array, self._fill = array, fill
        self._places = np.arange(len(array))

    @property
    def shape(self) -> tuple[int, ...]:
        """``(U, ...)``."""
        return self._array.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the values."""
        return self._array.dtype

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        self._fill(np.atleast_1d(self._places[index[0] if isinstance(index, tuple) else index]))
        return self._array[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        self._fill(self._places)
        return np.array(self._array, dtype=dtype) if copy or dtype not in (None, self._array.dtype) else self._array


class Observed:
    """Embeddings, statistics and scores of all users of a population.

    Args:
        data: the users.
        embedder, statistics: how they are observed; fitted on train users.
        lazy: observe users only when somebody asks for them, as is always done where the population is lazy. Else the first
            question about a user has the whole split observed, all together as without ``lazy``: to the bit the same.

    Attributes:
        arrays: by name: ``embeddings`` ``[U, E]`` and ``statistics`` ``[U, P, S]`` float32, and the scores of
            :data:`SCORES`, ``[U, P]`` float64. Where users are observed on demand, :class:`ByUser` arrays.
        known: ``[U]`` bool, who has been observed.
    """

    def __init__(self, data: Prepared, embedder: UserEmbedder, statistics: PathwayStatistics, lazy: bool = False) -> None:
        self.data, self.embedder, self.of = data, embedder, statistics
        users, pathways = sum(len(getattr(data.population, split)) for split in SPLITS), data.pathways.num_pathways
        self.known = np.zeros(users, dtype=bool)
        self._found: dict[str, NDArray[Any]] = {
            "embeddings": np.zeros((users, embedder.axes.shape[1] + len(embedder.score_mean)), dtype=np.float32),
            "statistics": np.zeros((users, pathways, statistics.mean.shape[1] + 3), dtype=np.float32),
            **{name: np.zeros((users, pathways)) for name in SCORES},
        }
        self.arrays: dict[str, Any] = self._found
        if lazy or data.population.lazy:
            self.arrays = {name: ByUser(array, self.fill) for name, array in self._found.items()}
        else:
            self.fill(np.arange(users))

    def fill(self, users: NDArray[np.int64]) -> None:
        """Observe those of the users at these positions who have not been observed yet."""
        missing = np.unique(users[~self.known[users]])
        for split in SPLITS:
            inside = self.data.population.indices(split)
            mine = missing[(missing >= inside.start) & (missing < inside.stop)]
            if len(mine) and not self.data.population.lazy:
                raw = self.of.raw(self.data.part(split, "support"))
                self._write(np.array(inside), self.data.readouts(split, "support"), raw)
                continue
            for some in np.split(mine, range(TOGETHER, len(mine), TOGETHER)):
                if len(some):
                    support = self.data.rows(split, "support", torch.from_numpy(some - inside.start))
                    self._write(some, support, self.of.raw(support))

    def _write(self, users: NDArray[np.int64], support: Batch, raw: Raw) -> None:
        self._found["embeddings"][users] = self.embedder.embed(support).numpy()
        self._found["statistics"][users] = self.of.observe(raw).numpy()
        for name in SCORES:
            self._found[name][users] = getattr(raw, name).double().numpy()
        self.known[users] = True
