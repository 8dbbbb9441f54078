"""A gating policy on another backbone or population: loaded for another number of pathways.

The scorer is shared by all pathways, so no weight of a ``GatingPolicy`` depends on how many there are; and every scenario
standardises the statistics on train users of its own, so that they mean much the same everywhere.
"""

from dataclasses import replace
from pathlib import Path

from agents.checkpoint import POLICY
from agents.policies import WAVES, GatingPolicy
from backbones.artefacts import ArtefactError, load_artefact
from envs.rules import Rules
from envs.scenario import Scenario


def transferred_policy(path: Path, scenario: Scenario) -> GatingPolicy:
    """The policy saved in ``path`` (without suffix), built for the observations of another scenario.

    Raises:
        ArtefactError: if it is damaged, if it is tied to the pathways it was trained on, or if the scenario's embedding or
            statistics have other widths than it reads; names what differs.
    """
    tensors, meta = load_artefact(path, POLICY)
    if meta["policy"] != "GatingPolicy":
        raise ArtefactError(
            f"the policy in {path} is a {meta['policy']}, whose weights are tied to the number of pathways; "
            "only a GatingPolicy serves any number of them: train one with -P policy:GatingPolicy."
        )
    if meta["policy_kwargs"].get("start") is not None:
        raise ArtefactError(
            f"the policy in {path} departs from a mask of its own {len(meta['pathways'])} pathways, which says nothing of "
            "others: train one with -P warm_start:false."
        )
    rules = Rules.from_json(meta["rules"])
    score, value = (tensors[f"mlp_extractor.{net}.0.weight"].shape[1] for net in ("score", "value"))
    statistics = score - value - 2 * WAVES - rules.layerwise
    there = {"embedding": value - 2 * statistics - rules.weight.varies, "statistics per pathway": statistics}
    here = {"embedding": scenario.embeddings.shape[1], "statistics per pathway": scenario.statistics.shape[2]}
    if different := [f"{name} {there[name]} wide, here {here[name]}" for name in here if there[name] != here[name]]:
        raise ArtefactError(
            f"the policy in {path} does not fit the observations of {scenario.name}: {'; '.join(different)}. Train another one."
        )
    core = rules.core(scenario, slots=1)
    policy = GatingPolicy(core.observation_space, core.action_space, lambda _: 0.0, **meta["policy_kwargs"])
    policy.load_state_dict(tensors)
    policy.set_training_mode(False)
    return policy


def trained_rules(path: Path) -> Rules:
    """The rules that the policy in ``path`` was trained by; where its cost weight was moved, with the one it ended at."""
    meta = load_artefact(path, POLICY)[1]
    return replace(Rules.from_json(meta["rules"]), cost_weight=meta["cost_weight"])
