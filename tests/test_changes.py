"""Earlier examples are left out where they mislead, and only there."""

import pytest
import torch
import worlds

from meta.inner import adapt, measure
from serving import changes
from serving.changes import has_changed
from serving.examples import batch_of, both
from serving.records import Adapter
from users.base import Examples


@pytest.fixture(scope="module", params=["inline", "lora", "side"])
def scenario(request):
    return worlds.digits(request.param).scenario


def told(scenario, earlier, new, on=True):
    """The answer for somebody with everything on, or nothing."""
    pathways, init = scenario.data.pathways, scenario.look.of.init
    gates = torch.full((1, pathways.num_pathways), on)
    weights = {key: value[0] for key, value in adapt(pathways, init, batch_of(pathways, [earlier]), gates).items()}
    return has_changed(pathways, init, Adapter(gates[0], weights, 0.1, len(earlier)), earlier, new)


def confident(scenario, count):
    """Examples of different classes of which the bare model is sure, labelled as it would."""
    model = scenario.data.pathways.model
    pool = torch.cat([user.query.inputs for user in scenario.data.population.train])
    with torch.no_grad():
        logits = model(model.backbone.prepare(pool))
    sure = logits.softmax(1).argmax(0)[:count]
    return Examples(pool[sure], torch.arange(count))


def renamed(examples):
    """The same under other labels."""
    return Examples(examples.inputs, (examples.labels + 1) % 10)


def several(examples, times):
    """Each of them so many times, in a row."""
    return Examples(examples.inputs.repeat_interleave(times, 0), examples.labels.repeat_interleave(times))


@pytest.mark.parametrize("classes, times", [(1, 1), (1, 2), (3, 2), (9, 2)])
def test_examples_of_another_kind_are_left_out(scenario, classes, times):
    shown = confident(scenario, classes)
    assert told(scenario, renamed(several(shown, 4)), several(shown, times))


@pytest.mark.parametrize("classes, times", [(1, 1), (1, 2), (3, 1), (9, 1)])
def test_examples_of_the_same_kind_are_kept(scenario, classes, times):
    shown = renamed(confident(scenario, classes))
    assert not told(scenario, several(shown, 4), several(shown, times))


@pytest.mark.parametrize("on", [True, False])
def test_without_a_personal_adapter_it_counts_whether_earlier_examples_help(scenario, monkeypatch, on):
    shown = renamed(confident(scenario, 3))
    asked = []
    monkeypatch.setattr(changes._Told, "held_out", lambda self, folds, earlier: asked.append((folds, earlier)) or 100 - folds)
    assert not told(scenario, several(shown, 4), several(shown, 2), on)
    assert asked == ([(2, False)] if on else []) + [(5, True), (5, False)]


def test_held_out_losses_are_those_of_adapters_made_one_by_one(scenario):
    pathways, init = scenario.data.pathways, scenario.look.of.init
    new, earlier = several(confident(scenario, 3), 2), renamed(confident(scenario, 4))
    gates = torch.ones(1, pathways.num_pathways, dtype=torch.bool)
    for kept in (None, earlier):
        losses = []
        for fold in range(4):
            rest = torch.tensor([place for place in range(6) if place % 4 != fold])
            fit, asked = Examples(new.inputs[rest], new.labels[rest]), Examples(new.inputs[fold::4], new.labels[fold::4])
            weights = adapt(pathways, init, batch_of(pathways, [both(kept, fit) if kept else fit]), gates)
            losses += [float(measure(pathways, weights, gates, batch_of(pathways, [asked]))[1])] * len(asked)
        found = changes._Told(pathways, init, earlier, new).held_out(4, earlier=kept is not None)
        assert found == pytest.approx(sum(losses) / 6, rel=1e-3)
