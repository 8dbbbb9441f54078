"""Meta-initialisations learned or loaded: for a population, by a configuration, in a folder."""

import os
import secrets
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch

from backbones.artefacts import cache_key, exists, load_artefact, load_or_make, write_atomically
from backbones.base import hash_tensors
from backbones.pathways import Weights
from meta.inner import MetaInit
from meta.private import Privacy, PrivateRounds, check_covered
from meta.shrinkage import FACTORS, PRIORS, PROMISING, REPEATS, SCALES, SHARPNESS, SIZES, USERS, shrunk
from meta.start import CONSTANTS, fitted_start
from meta.store import KIND, UNSAID, init_facts
from meta.trainer import CHECKPOINT, LATER, Log, Masks, MetaConfig, MetaTrainer
from users.batch import Prepared

PUBLIC_USERS, PUBLIC_RATE = 16, 1e-2
"""Val users per step where these teach the start, and both of Adam's rates."""
TAUGHT = "what val users teach"


def trainer_for(
    data: Prepared,
    config: MetaConfig,
    folder: Path,
    start: MetaInit | None = None,
    masks: Masks | None = None,
    privacy: Privacy | None = None,
) -> MetaTrainer:
    """A trainer on a population's train users, at the checkpoint in ``folder`` if there is one.

    What val users teach first is kept beside ``folder``.
    """
    private = None
    if privacy:
        check_covered(data.population, privacy, config.algorithm)
        private = PrivateRounds(privacy, len(data.population.train), config.users, config.steps)
    support, query = (data.part("train", role) for role in ("support", "query"))
    val = (data.part("val", "support"), data.part("val", "query")) if config.keep == "best" else None
    weights = None
    if (config.public_steps or config.start_steps) and start is None and not exists(folder / CHECKPOINT):
        start, weights = begun(data, config, folder.parent)
    trainer = MetaTrainer(data.pathways, support, query, config, folder, val, start, masks, weights, private)
    trainer.resume_if_possible()
    return trainer


def begun(data: Prepared, config: MetaConfig, folder: Path) -> tuple[MetaInit | None, Weights | None]:
    """Where training begins, if not at random: at what val users teach, or at weights that are fitted to examples."""
    if config.public_steps:
        return public_start(data, config, config.public_steps, folder), None
    return None, _fitted(data, config)


def _fitted(data: Prepared, config: MetaConfig) -> Weights | None:
    """Weights that are fitted to the population model's examples, where that is asked for."""
    if not config.start_steps:
        return None
    return fitted_start(data, config.start_steps, config.seed, config.start_copies, config.start_augment)


def public_start(data: Prepared, config: MetaConfig, steps: int, folder: Path) -> MetaInit:
    """What val users, who are public, teach; learned or loaded from ``folder``. Its files owe nothing to train users.

    Args:
        data: whose val users.
        config: how train users teach afterwards: the algorithm and the inner loop, where it starts, the seed.
        steps: outer steps, at least 1.
        folder: where it is kept.

    Raises:
        ValueError: for fewer steps.
    """
    if steps < 1:
        raise ValueError("val users teach nothing in no steps: give public_steps of at least 1.")
    learn = replace(config, public_steps=0, steps=steps, users=min(PUBLIC_USERS, len(data.population.val)))
    learn = replace(learn, outer_rate=PUBLIC_RATE, rate_of_rates=PUBLIC_RATE, resample=True)
    facts = {name: fact for name, fact in init_facts(data).items() if name != "train_users"}
    facts |= {"val_users": data.population.contents("val"), **asdict(learn)}
    if learn.start_steps:
        facts["fitted_start"] = CONSTANTS

    def train() -> tuple[dict, dict]:
        support, query = (data.part("val", role) for role in ("support", "query"))
        return MetaTrainer(data.pathways, support, query, learn, weights=_fitted(data, learn)).run().tensors(), facts

    return MetaInit.from_tensors(load_or_make(folder / f"public-{cache_key(**facts)}", TAUGHT, train)[0])


def meta_initialisation(
    data: Prepared, config: MetaConfig, folder: Path, log: Log | None = None, privacy: Privacy | None = None
) -> MetaInit:
    """The meta-initialisation for a population, learned or loaded from ``folder``; learning goes on after a kill."""
    return MetaInit.from_tensors(load_artefact(learned_init(data, config, folder, log, privacy), KIND)[0])


def learned_init(
    data: Prepared, config: MetaConfig, folder: Path, log: Log | None = None, privacy: Privacy | None = None
) -> Path:
    """As :func:`meta_initialisation`: where it is kept, without suffix. A private one says what it has spent."""
    facts = init_facts(data)
    if config.keep == "best" or config.shrink or config.public_steps:
        # A fingerprint holds everybody's items, which is no secret of a start that train users teach openly.
        shown = privacy or config.public_steps
        facts["val_users"] = data.population.contents("val") if shown else data.population.fingerprint("val")
    if config.public_steps:
        facts["public"] = [PUBLIC_USERS, PUBLIC_RATE]
    if config.start_steps:
        facts["fitted_start"] = CONSTANTS
    if config.shrink:
        facts["shrinkage"] = [USERS, SIZES, FACTORS, SCALES, PRIORS, SHARPNESS, REPEATS, PROMISING]
        return _shrunk(data, replace(config, shrink=False), folder, facts, log, privacy)
    settings = {k: v for k, v in asdict(config).items() if k != "shrink" and (k not in LATER or v != LATER[k])}
    promised = {"privacy": asdict(privacy), "salt": _salt(folder)} if privacy else {}
    path = folder / f"meta-{cache_key(**facts, **settings, **promised)}"
    unfinished = path.with_name(f"{path.name}-unfinished")

    def train() -> tuple[dict, dict]:
        trainer = trainer_for(data, config, unfinished, privacy=privacy)
        found = trainer.run(log).tensors()
        if not trainer.private:
            return found, {**facts, **settings}
        told = {"privacy": {**asdict(trainer.private.privacy), "noise_seed": None}, **UNSAID}
        return found, {**facts, **settings, **told, "accountant": trainer.private.accountant.state()}

    load_or_make(path, KIND, train)
    rmtree(unfinished, ignore_errors=True)
    return path


def _salt(folder: Path) -> str:
    """A secret of the folder, so that names in it do not tell of whose data they are."""
    path = folder / "salt"
    if not path.exists():
        secret = secrets.token_hex(16)
        own = path.with_name(f"salt-{secret[:8]}")
        write_atomically(own, secret.encode(), mode=0o600)
        with suppress(FileExistsError):  # of two programs that begin together the first one's is both's
            os.link(own, path)
        own.unlink()
    return path.read_text()


def _shrunk(
    data: Prepared, config: MetaConfig, folder: Path, facts: dict[str, Any], log: Log | None, privacy: Privacy | None
) -> Path:
    """What was meta-trained by ``config``, shrunk by val users; kept apart from it."""
    tensors, said = load_artefact(learned_init(data, config, folder, log, privacy), KIND)
    trained = MetaInit.from_tensors(tensors)
    kept = {name: said[name] for name in (*UNSAID, "privacy", "accountant") if name in said and privacy}

    def shrink() -> tuple[dict, dict]:
        users = torch.arange(min(USERS, len(data.population.val)))
        support, query = (data.rows("val", role, users) for role in ("support", "query"))
        found = shrunk(data.pathways, trained, support, query, dense=config.all_on == 1)
        return found.tensors(), {**facts, **asdict(config), "shrink": True, **kept}

    salt = {"salt": _salt(folder)} if privacy else {}
    path = folder / f"shrunk-{cache_key(**facts, start=hash_tensors(tensors), **salt)}"
    load_or_make(path, KIND, shrink)
    return path
