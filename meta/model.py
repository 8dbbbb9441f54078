"""The population model: a frozen backbone and a classifier, fitted on examples that nobody is rewarded on."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm.auto import tqdm

from backbones import BACKBONES, make_backbone
from backbones.artefacts import cache_key, load_or_make
from backbones.base import Backbone, PopulationModel, hash_tensors
from backbones.registry import Registry
from backbones.typed import check_types
from meta.images import pretrained_resnet
from users.base import Examples, Population
from users.batch import CHUNK
from users.items import Items, TensorItems

Fitter = Callable[..., PopulationModel]
FITTERS: Registry[Fitter] = Registry("fitter")
"""By backbone name, where the backbone itself is learned from the population: ``(population, folder, seed, **kwargs)``."""
FITTERS.register("resnet-small", pretrained_resnet)
STRENGTHS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0, 100.0, 1000.0)
"""Inverse L2 penalties that the classifier chooses from."""


def further_arguments(name: str) -> set[str]:
    """Names of the keyword arguments that :func:`population_model` takes for this backbone."""
    return {*signature(_factory(name)).parameters} - {"population", "folder", "seed"}


def check_backbone(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for an argument of :func:`population_model` for this backbone that is of another type."""
    check_types(_factory(name), arguments, f"backbone {name!r}")


def _factory(name: str) -> Callable[..., Any]:
    return FITTERS.get(name) if name in list(FITTERS) else BACKBONES.get(name)


def population_model(name: str, population: Population, folder: Path, seed: int = 0, **kwargs) -> PopulationModel:
    """The model before anyone is personal, made or loaded.

    A backbone that is learned from scratch (``resnet-small``) is trained on ``population.fitting``; on the features of
    any other a logistic regression is fitted there, its penalty chosen by cross-validation, and once more per fold if the
    population is cross-fitted. A backbone that brings a classifier of its own for as many classes keeps it if the
    population has no ``fitting`` examples.

    Args:
        name: of a registered backbone.
        population: whose fitting examples.
        folder: where what was learned is kept.
        seed: of random starts and of the cross-validation.
        kwargs: of the backbone's factory.

    Raises:
        ValueError: if there is nothing to fit the classifier on, or a class is missing from it.
    """
    check_backbone(name, kwargs)
    if name in list(FITTERS):
        return FITTERS.get(name)(population, folder, seed, **kwargs)
    made = make_backbone(name, **kwargs)
    backbone = made.backbone if isinstance(made, PopulationModel) else made
    if population.fitting is None:
        if isinstance(made, PopulationModel) and made.num_classes == population.num_classes:
            return made
        raise ValueError(
            f"population {population.name!r} has no `fitting` examples for the classifier of backbone {name!r}; add some, or "
            "register a backbone that brings a classifier for its classes."
        )
    if not len(population.fitting):
        raise ValueError(f"population {population.name!r} sets no examples aside for the classifier; raise fit_share.")
    _check_classes(population, population.fitting.labels)
    backbone.freeze()
    return _probed(backbone, population, population.fitting, folder, seed)


def _check_classes(population: Population, fitted: Tensor) -> None:
    """Raise ``ValueError`` for a class that is none of the labels fitted on."""
    if missing := sorted(set(range(population.num_classes)) - set(fitted.tolist())):
        name = population.class_names[missing[0]] if population.class_names else str(missing[0])
        raise ValueError(
            f"no example that fits the population model has the label {name!r}: give more users, or let more of them fit it "
            "(a larger fit_share)."
        )


def _probed(backbone: Backbone, population: Population, fitting: Examples, folder: Path, seed: int) -> PopulationModel:
    items = population.items or TensorItems(fitting.inputs)
    places = fitting.inputs if population.items else torch.arange(len(fitting))
    blank = PopulationModel(backbone, torch.zeros(1, 1), torch.zeros(1))
    facts = {"labels": fitting.labels, "places": places, "classes": torch.tensor(population.num_classes)}
    folds = None if population.folds is None else population.folds[places]
    if folds is not None:
        facts["folds"] = folds
    key = cache_key(model=blank.backbone_fingerprint(), items=items.fingerprint(), facts=hash_tensors(facts), seed=seed)

    def fit() -> tuple[dict[str, Tensor], dict]:
        features, labels, classes = readouts(backbone, items, places), fitting.labels, population.num_classes
        draw = torch.Generator().manual_seed(seed)
        parts = torch.randint(4, labels.shape, generator=draw) if folds is None else folds
        strength = _strength(features, places, labels, parts)

        def classifier(rows: Tensor) -> tuple[Tensor, Tensor]:
            return _classifier(_Counts.of(features, places, labels, rows), classes, strength)

        weight, bias = classifier(torch.arange(len(labels)))
        tensors = {"weight": weight, "bias": bias}
        if folds is not None and population.folds is not None:
            count = int(population.folds.max()) + 1
            each = [classifier((folds != k).nonzero()[:, 0]) for k in range(count)]
            tensors |= {"fold_weight": torch.stack([w for w, _ in each]), "fold_bias": torch.stack([b for _, b in each])}
        return tensors, {"strength": strength, "examples": len(labels)}

    return PopulationModel(backbone, **load_or_make(folder / f"classifier-{key}", "classifier", fit)[0])


@torch.no_grad()
def readouts(backbone: Backbone, items: Items, places: Tensor) -> Tensor:
    """Readout features ``[len(places), F]``, computed once per distinct item."""
    distinct, back = places.unique(return_inverse=True)
    order = sorted(distinct.tolist(), key={place: rank for rank, place in enumerate(items.order())}.__getitem__)
    starts = tqdm(range(0, len(order), CHUNK), desc="features for the classifier", unit="chunk", disable=len(order) <= CHUNK)
    parts = [backbone(backbone.prepare(items.take(order[s : s + CHUNK]))) for s in starts]
    found = torch.cat(parts)
    return found[torch.tensor(order).argsort()][back]


@dataclass(frozen=True)
class _Counts:
    """Examples of equal item and label put together: features ``[R, F]``, labels ``[R]``, how many they are ``[R]``."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    counts: NDArray[np.int64]

    @staticmethod
    def of(features: Tensor, places: Tensor, labels: Tensor, rows: Tensor) -> "_Counts":
        pairs, inverse, counts = torch.stack([places[rows], labels[rows]], 1).unique(
            dim=0, return_inverse=True, return_counts=True
        )
        first = torch.empty(len(pairs), dtype=torch.long).scatter_(0, inverse, rows)
        return _Counts(features[first].numpy(), pairs[:, 1].numpy(), counts.numpy())

    def fit(self, strength: float) -> LogisticRegression:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # under the weakest penalties; held-out losses judge them
            return LogisticRegression(C=strength, max_iter=300).fit(self.features, self.labels, self.counts)

    def loss(self, fitted: LogisticRegression) -> float:
        truth = np.searchsorted(fitted.classes_, self.labels)
        probability = fitted.predict_proba(self.features)[np.arange(len(truth)), truth]
        return float(-(np.log(probability.clip(1e-9)) * self.counts).sum())


def _strength(features: Tensor, places: Tensor, labels: Tensor, parts: Tensor) -> float:
    """The penalty with the least log loss on the parts ``[N]`` that were left out of the fit, each in turn.

    Penalties are weakened until that loss rises: the weakest take longest to fit.
    """
    folds = []
    for part in range(int(parts.max()) + 1):
        fit, held = (parts != part).nonzero()[:, 0], (parts == part).nonzero()[:, 0]
        if not len(held) or len(labels[fit].unique()) < len(labels.unique()):
            return STRENGTHS[0]  # too few examples to choose by: the strongest penalty
        folds.append((_Counts.of(features, places, labels, fit), _Counts.of(features, places, labels, held)))
    best, least = STRENGTHS[0], np.inf
    for strength in STRENGTHS:
        loss = sum(held.loss(fit.fit(strength)) for fit, held in folds)
        if loss >= least:
            break
        best, least = strength, loss
    return best


def _classifier(counted: _Counts, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Weight ``[C, F]`` and bias ``[C]``. Raises ``ValueError`` for a class without examples."""
    if missing := sorted(set(range(classes)) - set(counted.labels.tolist())):
        raise ValueError(
            f"no fitting example has class {missing[0]}; let more users fit the population model (a larger fit_share)."
        )
    fitted = counted.fit(strength)
    weight, bias = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
    if classes == 2:  # scikit-learn keeps one row for two classes
        return torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias
