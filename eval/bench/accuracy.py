"""That what is quick is also right: accuracies beside the usual way's, and rewards in bfloat16 beside float32."""

import numpy as np

from envs.oracles import LiveOracle
from envs.scenario import Scenario
from eval.bench.ours import live_of
from eval.bench.rival import usual_accuracy
from eval.bench.usual import GatedLora


def in_bfloat16(live: LiveOracle) -> LiveOracle:
    """The same oracle with matrix products and convolutions in bfloat16."""
    return LiveOracle(live.data, live.init, live.chunk, precision="bfloat16")


def compare_accuracy(scenario: Scenario, lora: GatedLora, rate: float, users: int) -> dict[str, float]:
    """Mean query accuracy of (at most so many) test users: the model as it was, ours and the usual way with all on."""
    who = scenario.users("test")[:users]
    masks = np.zeros((2, len(who), len(scenario.pathways)), dtype=bool)
    masks[1] = True
    live = live_of(scenario)
    off, on = (float(live.evaluate(who, each, "query").accuracy.mean()) for each in masks)
    return {"all_off": off, "ours": on, "usual": usual_accuracy(scenario, lora, who.tolist(), rate)}


def compare_precisions(scenario: Scenario, masks: int) -> dict[str, float]:
    """Rewards in bfloat16 less those in float32, for every train user under some random masks.

    ``error_of_a_reward`` is what sampling the user's few validation examples alone does to it: the mean binomial standard
    error.
    """
    live, who = live_of(scenario), np.repeat(scenario.users("train"), masks)
    plans = np.random.default_rng(0).random((len(who), len(scenario.pathways))) < 0.5
    exact, rough = (oracle.evaluate(who, plans) for oracle in (live, in_bfloat16(live)))
    difference = rough.accuracy - exact.accuracy  # the cost is the same
    counts = scenario.label_counts["validation"][who]
    return {
        "pairs": len(who),
        "mean": float(difference.mean()),
        "half_width": float(1.96 * difference.std() / len(who) ** 0.5),
        "mean_absolute": float(np.abs(difference).mean()),
        "error_of_a_reward": float(np.sqrt(exact.accuracy * (1 - exact.accuracy) / counts).mean()),
    }
