"""Fine-tuning through the backbone: Adam on each user's support, one user after the other, from the same start.

Shapes: U users, N examples per user, C classes.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import skip_init

from backbones.base import PopulationModel
from eval.group import Group
from eval.methods.base import Fitted, Method, Predictor, Sizes
from eval.world import World

State = dict[str, Tensor]
"""What one user has of their own, by parameter or buffer name."""


def adam(parameters: Iterable[Tensor], rate: float) -> torch.optim.Optimizer:
    """Adam in one pass over memory (``fused``), on MiniLM seven times faster than the default.

    The fused step goes through memory as it lies, so it is wrong, silently, for a tensor with gaps (a slice of columns).
    Such tensors take the default step.
    """
    tuned = list(parameters)
    return torch.optim.Adam(tuned, lr=rate, fused=all(torch.empty_like(p).stride() == p.stride() for p in tuned))


class Tunable(nn.Module):
    """A copy of the population model whose parts may be trained: inputs ``[N, ...]`` to logits ``[N, C]``.

    Nothing requires gradients until a method says so. The backbone stays in evaluation mode whatever happens.
    """

    def __init__(self, model: PopulationModel) -> None:
        super().__init__()
        self.backbone = deepcopy(model.backbone)
        self.classifier = skip_init(nn.Linear, model.weight.shape[1], model.num_classes)  # draws no random numbers
        self.classifier.load_state_dict({"weight": model.weight, "bias": model.bias})
        self.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits. Texts of about a length go through the backbone together: a long one makes all beside it as dear."""
        backbone = self.backbone
        pieces = backbone.pieces(inputs)
        if len(pieces) == 1:
            return self.classifier(self.features(inputs))
        features = torch.cat([self.features(backbone.trimmed(inputs[piece])) for piece in pieces])
        return self.classifier(features[torch.cat(pieces).argsort()])

    def features(self, inputs: Tensor) -> Tensor:
        """Features ``[N, F]`` of inputs ``[N, ...]`` that go through the backbone together."""
        return self.backbone(inputs)


@dataclass(frozen=True)
class FineTuned(Method):
    """Abstract: what is trained, and where it is put in, is the subclass's.

    Attributes:
        rate: Adam's learning rate. steps: gradient steps per user. batch: examples per step (all, where a user has no more).
        low_precision: products in bfloat16 (autocast); weights, sums and Adam's moments stay float32.
    """

    rate: float = 1e-3
    steps: int = 20
    batch: int = 32
    low_precision: bool = False

    length: ClassVar[str | None] = "steps"
    together: ClassVar[int] = 8
    through_backbone: ClassVar[bool] = True

    @abstractmethod
    def tunable(self, world: World, fitted: Fitted) -> Tunable:
        """A model of its own with everything put in; what requires gradients is trained, and is each user's own."""

    def begin(self, model: Tunable, inputs: Tensor, labels: Tensor, offset: Tensor) -> None:
        """Before a user's first step, at the common start: choose by the user's examples what is trained."""

    def penalty(self, model: Tunable) -> Tensor | float:
        """Added to the loss."""
        return 0.0

    def stepped(self, model: Tunable, step: int) -> None:
        """After the optimiser's step number ``step``, from 0, gradients still there."""

    def own(self, model: Tunable) -> State:
        """What must be kept for the user whom the model was just trained for: by default all that was trained."""
        return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

    def put(self, model: Tunable, state: State) -> None:
        """Make ``model`` a user's, given what :meth:`own` kept."""
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name in state:
                    value.copy_(state[name])

    def size(self, state: State) -> Sizes:
        """What a user's state takes."""
        count = sum(value.numel() for value in state.values())
        return Sizes(count, count, 4 * count)

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`."""
        model = self.tunable(world, fitted)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        states = []
        for user in range(len(shown)):
            model.load_state_dict(start)
            states.append(self._tuned(model, world, shown, user))
        return TunedPredictor(self, model, states)

    def _tuned(self, model: Tunable, world: World, shown: Group, user: int) -> State:
        """Train the model, which stands at the common start, on one user's examples."""
        inputs, labels, offset = shown.inputs(user), shown.labels(user), shown.offset(user)
        offset = torch.zeros(len(labels), world.model.num_classes) if offset is None else offset
        self.begin(model, inputs, labels, offset)
        optimiser = adam((p for p in model.parameters() if p.requires_grad), self.rate)
        draw = world.generator(shown.ids[user], "batches")
        for step in range(self.steps):
            some = torch.randperm(len(labels), generator=draw)[: self.batch]
            optimiser.zero_grad()
            with torch.enable_grad():
                logits = self.run(model, inputs[some]) + offset[some]
                (cross_entropy(logits, labels[some]) + self.penalty(model)).backward()
            optimiser.step()
            self.stepped(model, step)
        return self.own(model)

    def run(self, model: Tunable, inputs: Tensor) -> Tensor:
        """Logits ``[N, C]`` float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low_precision):
            return model(inputs).float()


class TunedPredictor(Predictor):
    """U users' models, of which one at a time is loaded into the same modules.

    Args:
        method: that trained them. model: the modules. states: per user.
    """

    adaptations = 1

    def __init__(self, method: FineTuned, model: Tunable, states: Sequence[State]) -> None:
        self.method, self.model, self.states = method, model, states

    def logits(self, asked: Group) -> Tensor:
        """See :meth:`Predictor.logits`."""
        found = asked.batch.labels.new_zeros((*asked.batch.labels.shape, self.model.classifier.out_features)).float()
        for user in range(len(asked)):
            logits, offset = self._of(user, asked.inputs(user)), asked.offset(user)
            found[user, : len(logits)] = logits if offset is None else logits + offset
        return found

    def serve(self, inputs: Tensor) -> Tensor:
        """See :meth:`Predictor.serve`."""
        return torch.stack([self._of(user, inputs[user]) for user in range(len(self.states))])

    @torch.no_grad()
    def _of(self, user: int, inputs: Tensor) -> Tensor:
        self.method.put(self.model, self.states[user])
        return self.method.run(self.model, inputs)

    @property
    def sizes(self) -> Sequence[Sizes]:
        """See :attr:`Predictor.sizes`."""
        return [self.method.size(state) for state in self.states]


@dataclass(frozen=True)
class FullFineTuning(FineTuned):
    """Everything is trained, embeddings of words and positions too: the dear rival. A user's model is a model.

    Source: as in Devlin et al. 2019, "BERT: Pre-training of deep bidirectional transformers for language understanding".

    Users come one by one, since each takes the memory of a model. Where batch normalisation is folded, its scale and shift
    move with the convolution that took them in.
    """

    rate: float = 3e-4

    together: ClassVar[int] = 1
    space: ClassVar = {"rate": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), "steps": (5, 10, 20, 40)}

    def tunable(self, world: World, fitted: Fitted) -> Tunable:
        """See :meth:`FineTuned.tunable`."""
        model = Tunable(world.model)
        model.requires_grad_(True)
        return model
