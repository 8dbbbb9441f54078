"""Who is personalised: users with labelled examples in three roles, and populations split by user.

Shapes: U users, N examples per user, P pathways.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backbones.base import hash_tensors
from backbones.pathways import Frozen, Pathways

ROLES = ("support", "validation", "query")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Examples:
    """Labelled examples of one user in one role.

    Attributes:
        inputs: ``[N, ...]`` as the backbone reads them.
        labels: ``[N]`` int64 class indices.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class User:
    """Somebody with labelled examples.

    Attributes:
        user_id: unique within the population.
        support: what the model may be adapted on.
        validation: what choices are rewarded on.
        query: what is reported.
        info: facts for the reader (the kind of shift, say) that no method may look at.

    A class may be missing from the support; its examples can then be predicted only as far as the population model
    and the meta-initialisation know it.

    Raises:
        ValueError: names the user, the role and the cure, if a role is empty or the inputs are not finite.
    """

    user_id: str
    support: Examples
    validation: Examples
    query: Examples
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role in ROLES:
            examples: Examples = getattr(self, role)
            if not len(examples):
                cure = "serve them the population model as it is" if role == "support" else "leave the user out"
                raise ValueError(f"user {self.user_id!r} has no {role} examples; give them at least one, or {cure}.")
            if len(examples.inputs) != len(examples.labels):
                raise ValueError(
                    f"user {self.user_id!r} has {len(examples.inputs)} {role} inputs but {len(examples.labels)} labels; "
                    "give every input one label."
                )
            if examples.inputs.is_floating_point() and not examples.inputs.isfinite().all():
                raise ValueError(f"user {self.user_id!r} has NaN or infinite {role} inputs; remove or impute those examples.")


@dataclass(frozen=True)
class Population:
    """Users split into train, val and test; the splits share no user.

    Attributes:
        name: for reports and file names.
        num_classes: C; labels are below it.
        train, val, test: the users of each split.
        seed: what everything random about the population followed from.
    """

    name: str
    num_classes: int
    train: tuple[User, ...]
    val: tuple[User, ...]
    test: tuple[User, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        ids = [user.user_id for user in self.users]
        if len(set(ids)) < len(ids):
            twice = sorted({i for i in ids if ids.count(i) > 1})
            raise ValueError(f"user ids must be unique across splits; these occur twice: {twice[:5]}.")
        for user in self.users:
            for role in ROLES:
                labels = getattr(user, role).labels
                if labels.min() < 0 or labels.max() >= self.num_classes:
                    raise ValueError(
                        f"user {user.user_id!r} has {role} labels outside 0..{self.num_classes - 1}; "
                        "map labels to class indices first."
                    )

    @property
    def users(self) -> tuple[User, ...]:
        """All users: train, then val, then test."""
        return (*self.train, *self.val, *self.test)

    def indices(self, split: str) -> range:
        """Positions in :attr:`users` of one split's users."""
        sizes = [len(getattr(self, name)) for name in SPLITS]
        start = sum(sizes[: SPLITS.index(split)])
        return range(start, start + sizes[SPLITS.index(split)])

    def fingerprint(self, *splits: str) -> str:
        """A hash of every example of every user, of some splits or (none named) of all."""
        tensors = {}
        for user in (user for split in splits or SPLITS for user in getattr(self, split)):
            for role in ROLES:
                examples: Examples = getattr(user, role)
                tensors[f"{user.user_id}/{role}/inputs"] = examples.inputs
                tensors[f"{user.user_id}/{role}/labels"] = examples.labels
        return hash_tensors(tensors)


@dataclass(frozen=True)
class Batch:
    """Examples of U users side by side, after the frozen part of the model.

    Attributes:
        frozen: sites ``[U, N, ..., width_p]``; users with fewer than N examples are padded.
        labels: ``[U, N]``.
        weights: ``[U, N]``, 1 / (the user's number of examples), 0 where padded; rows sum to 1.
    """

    frozen: Frozen
    labels: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, users: Tensor) -> "Batch":
        """The batch of some of the users, ``[U']`` positions, in that order and with repetitions if asked."""
        return Batch(self.frozen.map(lambda t: t[users]), self.labels[users], self.weights[users])

    def columns(self, examples: Tensor) -> "Batch":
        """The batch of some example positions, the same for all users; weights are made to sum to 1 again."""
        weights = self.weights[:, examples]
        total = weights.sum(1, keepdim=True).clamp_min(1e-12)
        return Batch(self.frozen.map(lambda t: t[:, examples]), self.labels[:, examples], weights / total)

    @staticmethod
    def joined(first: "Batch", second: "Batch") -> "Batch":
        """Both batches' examples for the same users, every example with equal weight."""
        counts = [(batch.weights > 0).sum(1, keepdim=True) for batch in (first, second)]
        total = counts[0] + counts[1]
        weights = [batch.weights * count / total for batch, count in zip((first, second), counts, strict=True)]
        sites = zip(first.frozen.sites, second.frozen.sites, strict=True)
        context = {k: torch.cat([first.frozen.context[k], second.frozen.context[k]], 1) for k in first.frozen.context}
        frozen = Frozen(tuple(torch.cat(pair, 1) for pair in sites), context)
        return Batch(frozen, torch.cat([first.labels, second.labels], 1), torch.cat(weights, 1))


def stack(pathways: Pathways, users: Sequence[User], role: str, chunk: int = 2048) -> Batch:
    """Run the frozen part once over the examples that ``users`` have in ``role``, ``chunk`` examples at a time."""
    examples: list[Examples] = [getattr(user, role) for user in users]
    counts = torch.tensor([len(e) for e in examples])
    present = torch.arange(int(counts.max())) < counts[:, None]
    parts = [pathways.frozen(part) for part in torch.cat([e.inputs for e in examples]).split(chunk)]
    flat = Frozen(
        tuple(torch.cat(site) for site in zip(*(part.sites for part in parts), strict=True)),
        {k: torch.cat([part.context[k] for part in parts]) for k in parts[0].context},
    )
    labels = _padded(torch.cat([e.labels for e in examples]), present)
    return Batch(flat.map(lambda t: _padded(t, present)), labels, present / counts[:, None])


def _padded(flat: Tensor, present: Tensor) -> Tensor:
    if present.all():
        return flat.unflatten(0, present.shape)
    out = flat.new_zeros(*present.shape, *flat.shape[1:])
    out[present] = flat
    return out
