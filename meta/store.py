"""Meta-initialisations on disk, with what they were made for, so that none is used for anything else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbones.artefacts import ArtefactError, load_artefact, save_artefact
from meta.inner import MetaInit
from users.batch import Prepared

KIND = "meta-initialisation"
NAMES = {"model": "another population model", "train_users": "other train users", "placement": "another placement"}
"""How a fact that differs is put to the reader."""
UNSAID = {"train_users": "unsaid: learned under differential privacy"}
"""What a private start says of its train users instead of their hash, against which a guess at their data could be checked."""
USUAL = {"gates": "adapters", "rate_scale": 1}
"""Facts that are said only where they are others."""
TAKEN_OUT = {"train_users": "unsaid: users were taken out of it"}
"""What a patched start says: who stays is known when their data is read again."""


def init_facts(data: Prepared) -> dict[str, Any]:
    """What a meta-initialisation for this population and these pathways depends on, besides how it is learned."""
    facts = {
        "model": data.pathways.model.fingerprint(),
        "train_users": data.population.fingerprint("train"),
        "rank": data.pathways.rank,
        "placement": type(data.pathways).__name__,
    }
    if data.pathways.gates != "adapters":
        facts["gates"] = data.pathways.gates
    if data.pathways.rate_scale != 1:
        facts["rate_scale"] = data.pathways.rate_scale
    return facts


def save_init(path: Path, init: MetaInit, facts: Mapping[str, Any]) -> None:
    """Save a meta-initialisation as ``path`` (without suffix), with JSON-able ``facts``, those of :func:`init_facts` first."""
    save_artefact(path, KIND, init.tensors(), facts)


def load_init(path: Path, facts: Mapping[str, Any]) -> MetaInit:
    """The meta-initialisation at ``path`` (without suffix), if it was made for what ``facts`` say.

    Raises:
        ArtefactError: if it is missing, damaged, or was made for something else; says what differs.
    """
    tensors, found = load_artefact(path, KIND)
    unsaid = [said[name] for said in (UNSAID, TAKEN_OUT) for name in said]
    facts, found = {**USUAL, **facts}, {**USUAL, **found}
    told = [name for name in facts if found.get(name) not in unsaid]
    wrong = [_difference(name, facts[name], found.get(name)) for name in told if found.get(name) != facts[name]]
    if wrong:
        raise ArtefactError(
            f"the meta-initialisation {path} is of {' and '.join(wrong)}; give one that was made for this population and "
            "these pathways, or none to have it learned."
        )
    return MetaInit.from_tensors(tensors)


def plain(path: Path) -> Path:
    """A path without the suffix of one of an artefact's files."""
    return path.with_suffix("") if path.suffix in (".json", ".safetensors") else path


def _difference(name: str, wanted: Any, found: Any) -> str:
    return f"{NAMES.get(name, f'another {name}')} ({name} {'not stated' if found is None else found}, here {wanted})"
