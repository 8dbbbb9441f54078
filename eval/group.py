"""Some users' labelled examples, as a method sees them: after the frozen model, side by side, and raw.

Shapes: U users, N examples of the user who has most, N_i those of user i, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from users.base import Examples
from users.batch import Batch, Prepared


@dataclass(frozen=True)
class Group:
    """U users' labelled examples.

    Attributes:
        data: the population they belong to, seen through the model.
        ids: U user ids.
        examples: per user, as the population keeps them: ``inputs [N_i, ...]`` are images, or positions of items where the
            population has ``items``.
        batch: the same examples after the frozen model, side by side, ``[U, N]``; padding (weight 0) comes last.
        parts: support and validation examples apart, of a group that joins both.
    """

    data: Prepared
    ids: tuple[str, ...]
    examples: tuple[Examples, ...]
    batch: Batch
    parts: tuple["Group", "Group"] | None = None

    @staticmethod
    def of(data: Prepared, split: str, role: str, users: Tensor | None = None) -> "Group":
        """The examples of a split's users in a role; of the users at positions ``[U]`` within the split, or of all."""
        everybody = getattr(data.population, split)
        users = torch.arange(len(everybody)) if users is None else users
        some = [everybody[place] for place in users.tolist()]
        ids, examples = tuple(user.user_id for user in some), tuple(getattr(user, role) for user in some)
        return Group(data, ids, examples, data.rows(split, role, users))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def counts(self) -> list[int]:
        """N_i of every user."""
        return [len(each) for each in self.examples]

    def rows(self, users: Sequence[int]) -> "Group":
        """Some of the users, by position in the group."""
        parts = self.parts and (self.parts[0].rows(users), self.parts[1].rows(users))
        chosen = [(self.ids[i], self.examples[i]) for i in users]
        width = max((len(each) for _, each in chosen), default=0)
        batch = self.batch.rows(torch.tensor(users, dtype=torch.long)).columns(torch.arange(width))
        return Group(self.data, tuple(i for i, _ in chosen), tuple(e for _, e in chosen), batch, parts)

    def pick(self, places: Sequence[Tensor]) -> "Group":
        """Of every user the examples at some places, in that order: one tensor of positions ``[n_i]`` per user."""
        examples = tuple(Examples(e.inputs[p], e.labels[p]) for e, p in zip(self.examples, places, strict=True))
        counts = torch.tensor([len(p) for p in places])
        present = torch.arange(int(counts.max())) < counts[:, None]
        columns = torch.zeros(present.shape, dtype=torch.long)
        for row, place in zip(columns, places, strict=True):
            row[: len(place)] = place
        batch = self.batch
        chosen = Batch(
            batch.table,
            batch.index.gather(1, columns) * present,
            batch.labels.gather(1, columns) * present,
            present / counts[:, None].clamp_min(1),
        )
        return replace(self, examples=examples, batch=chosen, parts=None)

    def first(self, count: int) -> "Group":
        """Every user's first ``count`` examples (all of those who have fewer)."""
        return self.pick([torch.arange(min(count, n)) for n in self.counts])

    @staticmethod
    def joined(support: "Group", validation: "Group") -> "Group":
        """Both groups' examples for the same users, the first group's first."""
        both = zip(support.examples, validation.examples, strict=True)
        examples = tuple(Examples(torch.cat([a.inputs, b.inputs]), torch.cat([a.labels, b.labels])) for a, b in both)
        batch = Batch.joined(support.batch, validation.batch)
        wide = Group(support.data, support.ids, examples, batch)
        present = [row.nonzero()[:, 0] for row in batch.weights > 0]
        compact = wide._columns(present)
        return replace(wide, batch=compact, parts=(support, validation))

    def _columns(self, columns: Sequence[Tensor]) -> Batch:
        """The batch with padding moved to the end, given the columns in which every user has examples."""
        width = max(map(len, columns))
        order = torch.stack([torch.nn.functional.pad(c, (0, width - len(c))) for c in columns])
        present = torch.arange(width) < torch.tensor([len(c) for c in columns])[:, None]
        batch = self.batch
        return Batch(
            batch.table,
            batch.index.gather(1, order) * present,
            batch.labels.gather(1, order) * present,
            batch.weights.gather(1, order) * present,
        )

    def inputs(self, user: int) -> Tensor:
        """What the backbone reads of one user (position in the group), ``[N_i, ...]``."""
        items, raw = self.data.population.items, self.examples[user].inputs
        return self.data.pathways.model.backbone.prepare(raw if items is None else items.take(raw.tolist()))

    def labels(self, user: int) -> Tensor:
        """``[N_i]`` int64."""
        return self.examples[user].labels

    def offset(self, user: int) -> Tensor | None:
        """What cross-fitting adds to the population model's logits of one user's examples, ``[N_i, C]``; None: nothing.

        Whoever computes logits from :meth:`inputs` must add it: the model was fitted on those examples.
        """
        offset = self.batch.table.offset
        return None if offset is None else offset[self.batch.index[user, : len(self.examples[user])]]
