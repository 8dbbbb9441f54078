"""The conformance suite finds what it is there to find: one sound method, and the same with one defect each."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from backbones.pathways import population_logits
from eval.conformance import check_method
from eval.conformance_case import shared_state
from eval.methods import METHODS
from eval.methods.base import Fitted, Method, Predictor, Sizes


class Shifted(Predictor):
    """The population model plus a constant per user and class."""

    def __init__(self, world, shifts):
        self.world, self.shifts = world, shifts

    def logits(self, asked):
        return population_logits(self.world.model, asked.batch.frozen) + self.shifts[:, None]

    @torch.no_grad()
    def serve(self, inputs):
        return self.world.model(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2]) + self.shifts[:, None]

    @property
    def sizes(self):
        return [Sizes(10, 10, 40)] * len(self.shifts)


@dataclass(frozen=True)
class Sound(Method):
    """How often a user shows each class, times a scale, compared with train users."""

    scale: float = 1.0
    steps: int = 20

    space: ClassVar = {"scale": (0.5, 1.0, 2.0)}
    length: ClassVar = "steps"

    def fit(self, world, cost_weight):
        return Fitted({"usual": shares(world.group("train", "support").batch).mean(0)}, {"scale": self.scale})

    def shifts(self, world, fitted, shown, cost_weight):
        draws = torch.stack([torch.randn(1, generator=world.generator(user)) for user in shown.ids])
        return fitted.facts["scale"] * (shares(shown.batch) - fitted.tensors["usual"]) + draws

    def adapt(self, world, fitted, shown, cost_weight):
        return Shifted(world, self.shifts(world, fitted, shown, cost_weight))


def shares(batch):
    """Of each class among a user's examples, ``[U, C]``."""
    return (torch.nn.functional.one_hot(batch.labels, 10) * batch.weights[..., None]).sum(1)


DEFECTS = {}


def defect(reason):
    """Registers a method with a defect, and how it must be named."""

    def add(kind):
        DEFECTS[kind.__name__] = (dataclass(frozen=True)(kind), reason)
        return kind

    return add


@defect("personalise changes torch's global random numbers")
class GlobalDraws(Sound):
    """Draws where everybody draws."""

    def shifts(self, world, fitted, shown, cost_weight):
        return super().shifts(world, fitted, shown, cost_weight) + 0 * torch.rand(1)


@defect("fit changes NumPy's global random numbers")
class NumpyDraws(Sound):
    """Draws from NumPy's own numbers. (Seeding them would go unseen where they had that seed before.)"""

    def fit(self, world, cost_weight):
        np.random.random()
        return super().fit(world, cost_weight)


@defect("personalise changes whether gradients are on")
class Switches(Sound):
    """Leaves gradients off."""

    def shifts(self, world, fitted, shown, cost_weight):
        torch.set_grad_enabled(False)
        return super().shifts(world, fitted, shown, cost_weight)


@defect("a second fit learns something else")
class Counting(Sound):
    """Learns something else every time."""

    fits: ClassVar = []

    def fit(self, world, cost_weight):
        self.fits.append(1)
        return Fitted(super().fit(world, cost_weight).tensors, {"scale": self.scale, "fits": len(self.fits)})


@defect("a second personalise predicts something else")
class Tiring(Sound):
    """Predicts something else every time."""

    calls: ClassVar = []

    def shifts(self, world, fitted, shown, cost_weight):
        self.calls.append(1)
        return super().shifts(world, fitted, shown, cost_weight) + len(self.calls)


@defect("with other test users fit learns another thing")
class LooksAtTest(Sound):
    """Counts test users' labels too."""

    def fit(self, world, cost_weight):
        labels = torch.cat([user.query.labels for user in world.data.population.test])
        return Fitted({"usual": torch.bincount(labels, minlength=10) / len(labels)}, {"scale": self.scale})


@defect("with other test users fit learns another thing")
class ObservesTest(Sound):
    """Standardises with test users' embeddings."""

    def fit(self, world, cost_weight):
        mean = torch.from_numpy(np.asarray(world.scenario.embeddings)).mean(0)
        return Fitted({**super().fit(world, cost_weight).tensors, "mean": mean}, {"scale": self.scale})


@defect("fit asks for test users")
class AsksForTest(Sound):
    """Asks the world for them."""

    def fit(self, world, cost_weight):
        return Fitted({"usual": shares(world.group("test", "support").batch).mean(0)}, {"scale": self.scale})


@defect("fit asks for test users")
class AsksTheOracle(Sound):
    """Asks what a mask is worth for them."""

    def fit(self, world, cost_weight):
        test = np.array(world.data.population.indices("test"))
        world.scenario.oracle.evaluate(test, np.zeros((len(test), world.pathways.num_pathways), dtype=bool))
        return super().fit(world, cost_weight)


@defect("another cost weight changes what fit learns")
class TradesInSecret(Sound):
    """Learns by the cost weight."""

    def fit(self, world, cost_weight):
        return Fitted(super().fit(world, cost_weight).tensors, {"scale": self.scale * cost_weight})


@defect("another cost weight changes what it predicts")
class PredictsByWeight(Sound):
    """Predicts by the cost weight."""

    def shifts(self, world, fitted, shown, cost_weight):
        return super().shifts(world, fitted, shown, cost_weight) * cost_weight


@defect("come back from JSON as something else")
class Tuples(Sound):
    """Learns a tuple."""

    def fit(self, world, cost_weight):
        return Fitted(super().fit(world, cost_weight).tensors, {"scale": self.scale, "shape": (1, 2)})


@defect("written and read again, predicts another thing")
class Remembers(Sound):
    """Keeps what it needs to itself."""

    def fit(self, world, cost_weight):
        object.__setattr__(self, "kept", 5.0)
        return super().fit(world, cost_weight)

    def shifts(self, world, fitted, shown, cost_weight):
        return super().shifts(world, fitted, shown, cost_weight) + getattr(self, "kept", 0.0)


@defect("apart alone than in a group")
class NormalisesOverUsers(Sound):
    """Centres over whoever is there."""

    def shifts(self, world, fitted, shown, cost_weight):
        found = super().shifts(world, fitted, shown, cost_weight)
        return found - found.mean(0)


@defect("apart in another order of users")
class CountsPlaces(Sound):
    """Gives the first of several users more: whoever is alone is neither first nor last."""

    def shifts(self, world, fitted, shown, cost_weight):
        found = super().shifts(world, fitted, shown, cost_weight)
        order = torch.tensor([float(list(shown.ids) == sorted(shown.ids))])
        return found + (1 - order)


@defect("change with the labels of other users")
class ComparesLabels(Sound):
    """Notices when another user's labels differ from what it saw before."""

    seen: ClassVar = {}

    def shifts(self, world, fitted, shown, cost_weight):
        found = super().shifts(world, fitted, shown, cost_weight)
        labels = {user: shares(shown.rows([row]).batch) for row, user in enumerate(shown.ids)}
        new = [user for user, share in labels.items() if not torch.allclose(self.seen.setdefault(user, share), share)]
        return found + len(new)


@defect("apart alone than among users with more examples")
class CountsPadding(Sound):
    """Divides by the width of the batch."""

    def shifts(self, world, fitted, shown, cost_weight):
        found = super().shifts(world, fitted, shown, cost_weight)
        return found + shown.batch.labels.shape[1]


@defect("logits are NaN or infinite")
class NeedsTwo(Sound):
    """Takes a standard deviation over examples."""

    def shifts(self, world, fitted, shown, cost_weight):
        spread = ((shown.batch.weights > 0).sum(1, keepdim=True) - 1).float()
        return super().shifts(world, fitted, shown, cost_weight) + spread / spread


@defect("without any example it predicts something else")
class OwnEmptyHanded(Sound):
    """Shifts those who show nothing too."""

    def personalise(self, world, fitted, shown, cost_weight):
        return self.adapt(world, fitted, shown, cost_weight)


@defect("the scope is 'nobody', but what is shown makes a difference")
class NotNobody(Sound):
    """Is personal all the same."""

    scope: ClassVar = "nobody"


@defect("serve and logits are")
class ServesOthers(Sound):
    """Serves the population model."""

    def adapt(self, world, fitted, shown, cost_weight):
        predictor = super().adapt(world, fitted, shown, cost_weight)
        predictor.serve = lambda inputs: world.model(inputs.flatten(0, 1)).detach().unflatten(0, inputs.shape[:2])
        return predictor


@defect("logits carry a graph")
class Graphs(Sound):
    """Forgets to detach."""

    def shifts(self, world, fitted, shown, cost_weight):
        return super().shifts(world, fitted, shown, cost_weight).requires_grad_()


@defect("it changes the population model's weights")
class Trains(Sound):
    """Moves the shared backbone by too little to be seen elsewhere."""

    def shifts(self, world, fitted, shown, cost_weight):
        next(world.model.backbone.parameters()).data.add_(1e-7)
        return super().shifts(world, fitted, shown, cost_weight)


@defect("it changes which of its parameters require gradients")
class Thaws(Sound):
    """Unfreezes the shared backbone."""

    def shifts(self, world, fitted, shown, cost_weight):
        world.model.requires_grad_(True)
        return super().shifts(world, fitted, shown, cost_weight)


@defect("it changes hooks of its modules")
class Hooks(Sound):
    """Leaves a hook behind."""

    def shifts(self, world, fitted, shown, cost_weight):
        world.model.register_forward_hook(lambda *_: None)
        return super().shifts(world, fitted, shown, cost_weight)


class Sized(Shifted):
    """With wrong sizes."""

    size = Sizes(10, 10, 1)

    @property
    def sizes(self):
        return [self.size] * len(self.shifts)


@defect("stores less than a bit per trained parameter")
class StoresNothing(Sound):
    """Trains ten parameters and keeps one byte."""

    def adapt(self, world, fitted, shown, cost_weight):
        return Sized(world, self.shifts(world, fitted, shown, cost_weight))


@defect("masks are")
class FloatMasks(Sound):
    """Has soft masks."""

    def adapt(self, world, fitted, shown, cost_weight):
        predictor = super().adapt(world, fitted, shown, cost_weight)
        predictor.masks = torch.ones(len(shown), world.pathways.num_pathways)
        return predictor


@defect("it refuses with 'no.'")
class Curt(Sound):
    """Gives no reason."""

    def refuses(self, world):
        return "no."


@defect(r"space has 'scael', which is no field")
class Misspelt(Sound):
    """Cannot be tuned."""

    space: ClassVar = {"scael": (0.5, 1.0)}


@defect(r"scale='high' is of another type than the default 1.0")
class Mistyped(Sound):
    """Has a text among its numbers."""

    space: ClassVar = {"scale": (0.5, "high")}


@defect(r"scale=-1.0 of its space is refused: too low")
class Refusing(Sound):
    """Does not take its own values."""

    space: ClassVar = {"scale": (-1.0, 1.0)}

    def __post_init__(self):
        if self.scale < 0:
            raise ValueError("too low")


@defect("length is 'scale', whose default is 1.0")
class Lengthy(Sound):
    """Trains for a scale."""

    length: ClassVar = "scale"


@defect("scope is 'everybody'")
class Everybody(Sound):
    """Invents a word."""

    scope: ClassVar = "everybody"


@defect("draws is 10, but there is no field draw")
class Drawn(Sound):
    """Cannot be drawn again."""

    draws: ClassVar = 10


@defect("it has no docstring")
class Mute(Sound):
    pass


@dataclass(frozen=True)
class BreaksServing(Sound):
    """Fails where it should serve, which is not the same as not being able to."""

    def adapt(self, world, fitted, shown, cost_weight):
        predictor = super().adapt(world, fitted, shown, cost_weight)

        def serve(inputs):
            raise ValueError("serve broke, and says so at length")

        predictor.serve = serve
        return predictor


@pytest.fixture
def registered():
    names = {"sound": Sound, **{name: kind for name, (kind, _) in DEFECTS.items()}}
    for name, kind in names.items():
        METHODS.register(name, kind)
    yield
    for name in names:
        METHODS.unregister(name)


@pytest.fixture
def restored(side_world):
    """The world's model as it was, and gradients on."""
    model = side_world.model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    model.load_state_dict(state)
    model.requires_grad_(False)
    model._forward_hooks.clear()
    torch.set_grad_enabled(True)


def test_a_sound_method_passes_and_leaves_everything_as_it_was(registered, side_world):
    before = shared_state(side_world)
    assert check_method("sound", side_world, scale=2.0) is None
    assert shared_state(side_world) == before


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_named_with_its_cure(registered, restored, side_world, name):
    with pytest.raises(AssertionError) as caught:
        check_method(name, side_world)
    told = str(caught.value)
    assert DEFECTS[name][1] in told
    assert told.startswith(f"method {name!r}")
    assert "Cure: " in told


def test_an_error_of_serve_is_not_taken_for_a_refusal(registered, restored, side_world):
    METHODS.register("breaks_serving", BreaksServing)
    try:
        with pytest.raises(ValueError, match="serve broke"):
            check_method("breaks_serving", side_world)
    finally:
        METHODS.unregister("breaks_serving")
