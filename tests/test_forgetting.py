"""Who is forgotten is gone: from files, from memory, from answers; and who comes back starts where everybody starts."""

import numpy as np
import pytest
import torch
import worlds

from backbones.artefacts import cache_root
from envs.rules import Rules
from serving import Personaliser, UnknownUserError
from serving.examples import Shelf
from serving.records import PRECISIONS
from users.base import Examples

RUN = 16
"""Bytes in a row that must not be left."""


class EverythingOn:
    def predict(self, observation, deterministic):
        return np.ones(observation["pathways"].shape[:2], dtype=bool), None


@pytest.fixture(scope="module")
def scenario():
    return worlds.digits("side").scenario


def serve(scenario, folder, **settings):
    folder.mkdir(exist_ok=True)
    return Personaliser(scenario, EverythingOn(), Rules(0.1), folder / "users.db", **settings)


def runs(content: bytes) -> set[bytes]:
    return {content[place : place + RUN] for place in range(len(content) - RUN + 1)}


def on_disk(folder) -> bytes:
    return b"\0".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def told(user):
    """Of one user: support examples, and different ones for an update."""
    return (user.support.inputs, user.support.labels), (user.query.inputs[:4], user.query.labels[:4])


def content_of(folder) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def lively(service, name, user):
    """Everything that leaves traces: enrolling, answering, changing, enrolling again. Returns the records that there were."""
    support, more = told(user)
    records = []
    for change, shown in ((service.enroll, support), (service.update, more), (service.enroll, support)):
        change(name, *shown)
        service.predict([name] * 4, more[0])
        records.append(service._store.get(name))
    return records


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_of_the_forgotten_is_left_in_any_file_or_in_memory(scenario, tmp_path, precision):
    """No run of 16 bytes that was there because of her: neither record, nor kept examples, nor adapter, nor the id."""
    ann, bob = scenario.data.population.train[:2]
    with serve(scenario, tmp_path / "with", keep=100, precision=precision) as service:
        service.enroll("bob", *told(bob)[0])
        records = lively(service, "ann-the-forgotten", ann)
        weights, _ = service._slots.take(["ann-the-forgotten"])
        there = on_disk(tmp_path / "with")
        assert b"ann-the-forgotten" in there
        assert service.forget("ann-the-forgotten") == 1
        with pytest.raises(UnknownUserError):
            service.predict(["ann-the-forgotten"], told(ann)[0][0][:1])
        with pytest.raises(UnknownUserError):
            service.describe("ann-the-forgotten")
        resident = {value.numpy().tobytes() for slot in service._slots.weights.values() for value in slot if value.any()}
        assert not resident & {value[0].numpy().tobytes() for value in weights.values()}
        left = on_disk(tmp_path / "with")
    assert left and b"ann-the-forgotten" not in left and b"ann-the-forgotten" not in on_disk(tmp_path / "with")
    with serve(scenario, tmp_path / "without", keep=100, precision=precision) as service:
        service.enroll("bob", *told(bob)[0])
        others = on_disk(tmp_path / "without")
    hers = set().union(*map(runs, records)) - runs(others)  # zeros and the like are everybody's
    examples = runs(Shelf(100).pack(Examples(*told(ann)[0]))) - runs(others)
    assert len(hers & runs(there)) > 100 and len(examples & runs(there)) > 100, "they were there"
    assert not hers & runs(left) and not examples & runs(left)


def test_who_comes_back_gets_the_very_bytes_of_somebody_who_was_never_there(scenario, tmp_path):
    """She starts from the meta-initialisation: nothing of the earlier adapter, mask or memory is in the new ones."""
    ann, bob = scenario.data.population.train[:2]
    with serve(scenario, tmp_path / "back", keep=100) as service:
        lively(service, "ann", bob)  # quite another person then
        service.forget("ann")
        service.enroll("ann", *told(ann)[0])
        again, logits = service._store.get("ann"), service.predict(["ann"] * 4, told(ann)[1][0])
    with serve(scenario, tmp_path / "new", keep=100) as service:
        service.enroll("ann", *told(ann)[0])
        assert service._store.get("ann") == again
        assert torch.equal(service.predict(["ann"] * 4, told(ann)[1][0]), logits)


def test_serving_writes_nothing_anywhere_else(scenario, tmp_path, monkeypatch):
    """Neither caches of observations nor of answers know of somebody who was enrolled."""
    user = scenario.data.population.train[3]
    known, cached = scenario.look.known.copy(), content_of(cache_root())
    monkeypatch.chdir(tmp_path)
    with serve(scenario, tmp_path / "store", keep=10) as service:
        lively(service, "ann", user)
    assert content_of(cache_root()) == cached and cached
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert {path.name.split("-")[0] for path in (tmp_path / "store").iterdir()} == {"users.db"}
    np.testing.assert_array_equal(scenario.look.known, known)
