"""What a meta-initialisation gives away of the users it was learned from, and an adapter of its user's examples.

Shapes: U users, X examples of a user, S shadow adapters, R reference models.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from backbones.pathways import Pathways
from eval.attacks import Success, Values, confidence, lira, rmia, success
from meta.inner import MetaInit, adapt, adapted
from users.batch import Batch, Part, Prepared, Rows

TOGETHER = 16
"""Shadow adapters of one user that are learned together."""


def log_likelihoods(pathways: Pathways, init: MetaInit, support: Rows, query: Rows) -> Values:
    """Of users' query examples after adapting on their support with everything on, ``[U]``: what meta-training raises."""
    gates = torch.ones(len(support), pathways.num_pathways, dtype=torch.bool)
    loss = adapted(pathways, init, support, query, gates, chunk=32)[1]
    counts = [query.rows(users).weights.gt(0).sum(1) for users in torch.arange(len(query)).split(32)]
    return (-loss.double() * torch.cat(counts)).detach().numpy()


def user_membership(
    data: Prepared, target: MetaInit, references: Sequence[MetaInit], members: range, others: range, population: range
) -> Success:
    """Was this user in meta-training? Offline RMIA with the reference initialisations.

    Args:
        data: a population whose train users include all of those named below.
        target: the initialisation under attack.
        references: learned alike, from users who are none of them.
        members: places among train users of those it was learned from (or some of them).
        others: places of users of the same kind it was not learned from.
        population: places of further such users, by whom ratios are judged.
    """

    def under(init: MetaInit, places: range) -> Values:
        users = torch.tensor(places)
        support, query = (Part(data, "train", role, users) for role in ("support", "query"))
        return log_likelihoods(data.pathways, init, support, query)

    def scores(places: range) -> Values:
        refs, judged = (np.stack([under(init, some) for init in references]) for some in (places, population))
        return rmia(under(target, places), refs, under(target, population), judged)

    return success(scores(members), scores(others))


def example_membership(data: Prepared, init: MetaInit, split: str, users: int, shadows: int = 64, seed: int = 0) -> Success:
    """Was this example in the user's support? LiRA on the adapter, everything on; the user's query examples were not.

    Whoever holds a user's adapter is meant to be the user; this says what somebody else would learn from it.

    Args:
        data: the population.
        init: where adapters start.
        split: whose users.
        users: how many of them.
        shadows: adapters per user, each learned on as many of the user's examples as there are in the support.
        seed: of the draws.
    """
    draw, found = torch.Generator().manual_seed(seed), []
    for place in tqdm(range(users), desc=f"{shadows} shadow adapters each", unit="user"):
        one = torch.tensor([place])
        support, query = (data.rows(split, role, one) for role in ("support", "query"))
        both, shown = Batch.joined(support, query), int((support.weights > 0).sum())
        present = (both.weights[0] > 0).nonzero()[:, 0]
        mine = torch.zeros(len(present), dtype=torch.bool)
        mine[:shown] = True
        inside = _dealt(len(present), shown, shadows, draw)
        known = _confidences(data.pathways, init, both.columns(present), torch.cat([mine[None], inside]))
        found.append((lira(known[0], known[1:], inside.numpy()), mine.numpy()))
    scores, truth = (np.concatenate(part) for part in zip(*found, strict=True))
    return success(scores[truth], scores[~truth])


def _dealt(examples: int, shown: int, shadows: int, draw: torch.Generator) -> Tensor:
    """Which examples each shadow is shown, ``[shadows, examples]``: dealt like cards, so that all are shown about as often."""
    decks = -(-shadows * shown // examples) + 1
    cards = torch.cat([torch.randperm(examples, generator=draw) for _ in range(decks)])
    inside = torch.zeros(shadows, examples, dtype=torch.bool)
    for shadow, row in enumerate(inside):
        row[cards[shadow * shown : (shadow + 1) * shown]] = True
    return inside


def _confidences(pathways: Pathways, init: MetaInit, examples: Batch, inside: Tensor) -> NDArray[np.float64]:
    """Of one user's examples ``[1, X]`` under adapters learned on parts of them ``[S, X]``: ``[S, X]``."""
    found = []
    for some in inside.split(TOGETHER):
        rows = examples.rows(torch.zeros(len(some), dtype=torch.long))
        shown = Batch(rows.table, rows.index, rows.labels, some / some.sum(1, keepdim=True))
        gates = torch.ones(len(some), pathways.num_pathways, dtype=torch.bool)
        weights = adapt(pathways, init, shown, gates)
        with torch.no_grad():
            likely = pathways.logits(rows.frozen, weights, gates).log_softmax(-1)
        found.append(likely.gather(-1, rows.labels[..., None])[..., 0])
    return confidence(torch.cat(found).double().numpy())
