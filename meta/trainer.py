"""Meta-training: the loop around an outer algorithm, with checkpoints from which it goes on exactly."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from backbones.artefacts import ArtefactError, exists, load_artefact, save_artefact
from backbones.pathways import Pathways, Weights
from backbones.pretrain import AUGMENTATIONS
from meta.inner import MetaInit, adapted
from meta.masks import masks_for
from meta.outer import ALGORITHMS, adapted_pathways
from meta.private import RATES, UPDATES, PrivateRounds, together
from users.batch import Batch, Rows

Log = Callable[[str, float, int], None]
Masks = Callable[[Tensor, torch.Generator], Tensor]
KEEP = ("last", "best")
LATER = {"start_steps": 0, "start_copies": 0, "start_augment": "shift", "public_steps": 0}
"""Settings that came later: what was learned without them keeps its name."""
CHECKPOINT = "meta-checkpoint"
EVERY = 100
"""Steps between two lines in the log, two checkpoints, and two looks at val users."""


@dataclass(frozen=True)
class MetaConfig:
    """How the meta-initialisation is learned.

    Attributes:
        algorithm: a name from :data:`meta.outer.ALGORITHMS`.
        steps: outer steps.
        users: users per outer step.
        inner_steps: K, gradient steps of a user.
        inner_rate: where the inner learning rates start; of low-rank updates at a tenth of it.
        head_rate: where the head's starts; None: at ``inner_rate`` as well.
        outer_rate: Adam's learning rate for the weights, decayed to zero along a cosine.
        rate_of_rates: the same for the inner rates' logarithms; they are few, and are not learned by heart.
        all_on: share of users that are trained with every pathway on; the others draw masks of random density. With 1 what val
            users choose (``keep``, ``shrink``) they choose with every pathway on, too.
        random_start: learn the inner rates alone and leave the weights at their random start, as a rival that was
            tuned with the same budget.
        resample: deal each user's support and query examples anew in every step, class by class, so that a class keeps
            its number of support examples: many more tasks from few users.
        neutral: leave the pathways' outputs at zero in the shared start, so that every mask begins as the population model
            and only what pathways read and the rates are learned; few train users cannot be learned by heart then.
        keep: ``last``, or ``best``: the state, among those after every 100 steps and the start, with the least query loss of
            val users under a fixed mixture of masks. Few train users are soon known by heart.
        start_steps: fit the pathways to the examples that the population model was fitted on for so many steps before users
            are met, see :mod:`meta.start`; for pathways that are to do without the model's own readout.
        start_copies: changed copies of every such image, beside it.
        start_augment: how they are changed, a name from :data:`backbones.pretrain.AUGMENTATIONS`.
        public_steps: meta-train on val users, who are public, for so many steps before train users are met: what they teach
            need not be learned under noise. They then choose nothing (``keep``, ``shrink``), and say little where reported.
        shrink: choose on val users how far examples may move a user and in how many steps, see :mod:`meta.shrinkage`; by
            :func:`meta.learned.meta_initialisation`, after training. Training that goes on from such a start keeps its prior.
        seed: everything random follows from it and the step number.
    """

    algorithm: str = "fomaml"
    steps: int = 2000
    users: int = 16
    inner_steps: int = 3
    inner_rate: float = 0.1
    head_rate: float | None = None
    outer_rate: float = 1e-2
    rate_of_rates: float = 1e-2
    all_on: float = 0.2
    random_start: bool = False
    resample: bool = False
    neutral: bool = False
    keep: str = "last"
    start_steps: int = 0
    start_copies: int = 0
    start_augment: str = "shift"
    public_steps: int = 0
    shrink: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        ALGORITHMS.get(self.algorithm)
        for name in ("steps", "users", "inner_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.head_rate is not None and not self.head_rate > 0:
            raise ValueError(f"head_rate must be above 0, got {self.head_rate}.")
        if not (self.inner_rate > 0 and self.outer_rate > 0 and self.rate_of_rates > 0 and 0 <= self.all_on <= 1):
            raise ValueError(
                f"rates must be above 0 and all_on between 0 and 1, got inner_rate={self.inner_rate}, "
                f"outer_rate={self.outer_rate}, rate_of_rates={self.rate_of_rates}, all_on={self.all_on}."
            )
        if self.keep not in KEEP:
            raise ValueError(f"keep must be {' or '.join(KEEP)}, got {self.keep!r}.")
        self._check_start()

    def _check_start(self) -> None:
        """Where training begins, against what else is asked for."""
        if self.start_steps < 0:
            raise ValueError(f"start_steps must be at least 0, got {self.start_steps}.")
        if self.start_steps and (self.neutral or self.random_start):
            raise ValueError("a start that is fitted (start_steps) is neither neutral nor random: choose one of them.")
        AUGMENTATIONS.get(self.start_augment)
        if self.start_copies < 0:
            raise ValueError(f"start_copies must be at least 0, got {self.start_copies}.")
        if self.start_copies and not self.start_steps:
            raise ValueError("start_copies are of the examples that start_steps fit pathways to: set start_copies=0 as well.")
        if self.public_steps < 0:
            raise ValueError(f"public_steps must be at least 0, got {self.public_steps}.")
        if self.public_steps and (self.keep == "best" or self.shrink):
            raise ValueError("val users who teach the start (public_steps) cannot choose as well: keep='last', shrink=False.")
        if self.public_steps and (self.start_steps or self.neutral or self.random_start):
            raise ValueError("a start that val users teach (public_steps) is neither fitted, neutral nor random: choose one.")
        if self.random_start and self.algorithm == "reptile":
            raise ValueError("Reptile learns no inner rates, so there is nothing to learn from a random start.")


class MetaTrainer:
    """Learns a :class:`MetaInit` from train users.

    Args:
        pathways: the pathways to initialise.
        support, query: all train users' examples, of which each step takes those of a few users.
        config: see :class:`MetaConfig`.
        folder: where checkpoints go; none are written without.
        val: val users' support and query examples, where the best state is to be kept.
        start: where to go on from; None: from a random start.
        weights: where to start instead of at random.
        private: the rounds' guarantee; None without.
        masks: what users are trained under, positions ``[B]`` among train users and a generator to masks ``[B, P]``; None:
            :func:`meta.masks.masks_for`.
    """

    def __init__(
        self,
        pathways: Pathways,
        support: Rows,
        query: Rows,
        config: MetaConfig,
        folder: Path | None = None,
        val: tuple[Rows, Rows] | None = None,
        start: MetaInit | None = None,
        masks: Masks | None = None,
        weights: Weights | None = None,
        private: PrivateRounds | None = None,
    ) -> None:
        if (val is not None) != (config.keep == "best"):
            raise ValueError("val users are needed to keep the best state, and for nothing else.")
        self.pathways, self.support, self.query, self.config, self.folder = pathways, support, query, config, folder
        self.val, self.private = val, private
        self.best: tuple[float, MetaInit] | None = None
        self.step = 0
        self.masks = masks or self._usual_masks
        if start is not None:
            weights = start.weights
        self.weights = {k: w.clone().requires_grad_() for k, w in (weights or pathways.start(config.seed)).items()}
        rates = torch.full((config.inner_steps, pathways.num_pathways), config.inner_rate * pathways.rate_scale)
        rates[:, -1] = config.inner_rate if config.head_rate is None else config.head_rate
        rates = rates if start is None else start.rates.clone()
        self.log_rates = rates.log().requires_grad_()
        self.prior, self.sharpness = (0.0, 1.0) if start is None else (start.prior, start.sharpness)
        silent = pathways.outputs if config.neutral else frozenset()
        for key in silent:
            self.weights[key].data.zero_()
        learned = [] if config.random_start else [w for k, w in self.weights.items() if k not in silent]
        groups = [{"params": learned, "peak": config.outer_rate}, {"params": [self.log_rates], "peak": config.rate_of_rates}]
        self.optimiser = torch.optim.Adam([group for group in groups if group["params"]], lr=config.outer_rate)

    def init(self) -> MetaInit:
        """The meta-initialisation as it stands, differentiable with respect to what is learned."""
        adapted = adapted_pathways(self.config.algorithm, self.pathways)
        return MetaInit(self.weights, self.log_rates.exp(), adapted, self.prior, self.sharpness)

    def result(self) -> MetaInit:
        """The meta-initialisation as constants: the best so far where that is kept, else the present one."""
        return self.best[1] if self.best else self.present()

    def present(self) -> MetaInit:
        """The present state as constants."""
        now = self.init()
        weights = {k: w.detach().clone() for k, w in now.weights.items()}
        return replace(now, weights=weights, rates=now.rates.detach().clone())

    def run(self, log: Log | None = None, every: int = EVERY) -> MetaInit:
        """Train from where it stands to the configured number of steps; checkpoint and log ``every`` so many."""
        if self.step == 0:
            self._look_at_val(log)
        total, since = torch.zeros(()), self.step
        bar = tqdm(total=self.config.steps, initial=self.step, desc=f"meta-train ({self.config.algorithm})", unit="step")
        with bar:
            while self.step < self.config.steps:
                total += self._outer_step()
                bar.update()
                if self.step % every == 0 or self.step == self.config.steps:
                    if self.private:
                        self.save()  # what was spent, before anything of it is shown
                    loss = float(total) / (self.step - since)
                    total.zero_()
                    since = self.step
                    if not self.private:  # what train users lose is no part of what is released under noise
                        bar.set_postfix(query_loss=f"{loss:.3f}", refresh=False)
                    if log:
                        self._log_rates(log)
                        if self.private:
                            log("privacy/epsilon", self.private.accountant.spent(), self.step)
                        else:
                            log("meta/train_query_loss", loss, self.step)
                    self._look_at_val(log)
                    self.save()
        return self.result()

    def _look_at_val(self, log: Log | None) -> None:
        """Keep the present state if val users do best with it."""
        if self.val is None:
            return
        (support, query), pathways = self.val, self.pathways
        dense = 1.0 if self.config.all_on == 1 else 0.5
        masks = masks_for(pathways, len(support), torch.Generator().manual_seed(0), all_on=dense)
        state = self.present()
        loss = float(adapted(pathways, state, support, query, masks)[1].mean())
        if log:
            log("meta/val_query_loss", loss, self.step)
        if self.best is None or loss < self.best[0]:
            self.best = (loss, state)

    def _outer_step(self) -> Tensor:
        config = self.config
        draw = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        for group in self.optimiser.param_groups:
            progress = torch.tensor(torch.pi * self.step / config.steps)
            group["lr"] = group["peak"] * float(1 + progress.cos()) / 2
        loss = self._usual_gradients(draw) if self.private is None else self._private_gradients(self.private)
        self.optimiser.step()
        self.step += 1
        return loss

    def _usual_gradients(self, draw: torch.Generator) -> Tensor:
        """Set the gradients of what is learned; return the users' query loss."""
        config = self.config
        users = torch.randperm(len(self.support), generator=draw)[: config.users]
        gates = self.masks(users, draw)
        outer = ALGORITHMS.get(config.algorithm)
        support, query = self.support.rows(users), self.query.rows(users)
        if config.resample:
            support, query = redealt(support, query, draw)
        objective, loss = outer(self.pathways, self.init(), support, query, gates)
        if not objective.isfinite():
            raise FloatingPointError(
                f"the meta-loss became {objective.item()} at step {self.step}; lower inner_rate or outer_rate."
            )
        self.optimiser.zero_grad()
        objective.backward()
        return loss

    def _private_gradients(self, private: PrivateRounds) -> Tensor:
        """The same under noise, of whom chance draws; nothing else of them gets out."""
        users, init, draw = private.cohort(self.step), self.present(), private.source(self.step, "masks")
        gates, updates = self.masks(users, draw), UPDATES.get(self.config.algorithm)

        def pieces() -> Iterator[dict[str, Tensor]]:
            for places in torch.arange(len(users)).split(together(self.pathways)):
                support, query = self.support.rows(users[places]), self.query.rows(users[places])
                if self.config.resample:
                    support, query = redealt(support, query, draw)
                yield updates(self.pathways, init, support, query, gates[places])

        released = private.release(self._learned(), pieces())
        for name, parameter in self._learned().items():
            parameter.grad = released[name]
        return torch.zeros(())

    def _learned(self) -> dict[str, Tensor]:
        """What an outer step changes, by name."""
        groups = {id(parameter) for group in self.optimiser.param_groups if group["peak"] for parameter in group["params"]}
        known = {name: tensor for name, tensor in self._tensors().items() if id(tensor) in groups}
        if self.config.algorithm == "reptile":
            known.pop(RATES, None)
        return known

    def _usual_masks(self, users: Tensor, draw: torch.Generator) -> Tensor:
        return masks_for(self.pathways, len(users), draw, self.config.all_on)

    def _log_rates(self, log: Log) -> None:
        for p, name in enumerate(self.pathways.names):
            log(f"meta_rate/{name}", float(self.log_rates[:, p].detach().exp().mean()), self.step)

    def save(self) -> None:
        """Write a checkpoint: weights, rates, Adam's moments and the step number."""
        if self.folder is None:
            return
        tensors = self._tensors()
        for name, tensor in self._tensors().items():
            for moment, value in self.optimiser.state.get(tensor, {}).items():
                tensors[f"{name}/{moment}"] = torch.as_tensor(value)
        facts: dict[str, Any] = {"step": self.step, **asdict(self.config)}
        if self.private:
            facts["accountant"] = self.private.accountant.state()
        if self.best:
            facts["best_loss"] = self.best[0]
            tensors |= {f"best/{name}": tensor for name, tensor in self.best[1].tensors().items()}
        save_artefact(self.folder / CHECKPOINT, "meta checkpoint", tensors, facts)

    def resume_if_possible(self) -> None:
        """Go on from the folder's checkpoint, if there is one.

        Raises:
            ArtefactError: if the checkpoint is damaged or of another configuration.
        """
        if self.folder is None or not exists(self.folder / CHECKPOINT):
            return
        tensors, meta = load_artefact(self.folder / CHECKPOINT, "meta checkpoint")
        step, best_loss = meta.pop("step"), meta.pop("best_loss", None)
        spent = meta.pop("accountant", None)
        if self.private:
            self.private.resumed(spent, step, str(self.folder))
        elif spent is not None:
            raise ArtefactError(f"the checkpoint in {self.folder} is of a private training: go on with --private.")
        mine = asdict(self.config)
        meta = {**LATER, "shrink": mine["shrink"], **meta}  # checkpoints from before there were these do not know the words
        if meta != mine:
            changed = sorted(k for k in {*meta, *mine} if meta.get(k) != mine.get(k))
            raise ArtefactError(f"the checkpoint in {self.folder} was made with other settings of {changed}.")
        for name, tensor in self._tensors().items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise ArtefactError(f"the checkpoint in {self.folder} is of other pathways: {name} does not fit.")
        for name, tensor in self._tensors().items():
            tensor.data.copy_(tensors[name])
            prefix = f"{name}/"
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if state:
                self.optimiser.state[tensor] = state
        self.step = step
        if best_loss is not None:
            kept = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
            self.best = (best_loss, MetaInit.from_tensors(kept))

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.weights, RATES: self.log_rates}


def redealt(support: Batch, query: Batch, draw: torch.Generator) -> tuple[Batch, Batch]:
    """The same users with their examples dealt to the two roles anew; labels and numbers per class stay as they are."""
    first = support.labels.shape[1]
    both = Batch.joined(support, query)
    labels = torch.where(both.weights > 0, both.labels, -1).float()  # padding stays where it is
    fixed = labels.argsort(dim=1, stable=True)
    drawn = (labels + torch.rand(labels.shape, generator=draw) * 0.9).argsort(dim=1)
    padded = (labels < 0).gather(1, fixed)
    index = both.index.scatter(1, fixed, both.index.gather(1, torch.where(padded, fixed, drawn)))
    return (
        Batch(both.table, index[:, :first], support.labels, support.weights),
        Batch(both.table, index[:, first:], query.labels, query.weights),
    )
