"""Earlier examples are left out where they mislead, and only there."""

import pytest
import torch
import worlds

from meta.inner import adapt
from serving.changes import has_changed
from serving.examples import batch_of
from serving.records import Adapter
from users.base import Examples


@pytest.fixture(scope="module", params=["inline", "lora", "side"])
def scenario(request):
    return worlds.digits(request.param).scenario


def told(scenario, earlier, new):
    """The answer for somebody with everything on."""
    pathways, init = scenario.data.pathways, scenario.look.of.init
    gates = torch.ones(1, pathways.num_pathways, dtype=torch.bool)
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
