"""What :mod:`eval.bench.env` measured, as text."""

from typing import Any

from eval.bench.clock import Spread

TITLES = {
    "usual": "the usual way: PEFT LoRA, `DummyVecEnv`",
    "unbatched": "ours, one user at a time",
    "live": "ours, live: all pairs new",
    "live_bfloat16": "ours, live, in bfloat16",
    "cached": "ours, live with cache: all pairs seen before",
    "tabular": "`dsa/Tabular-v0`",
}
TIMES = {
    "usual_extrapolated": "the usual way (extrapolated)",
    "unbatched_extrapolated": "ours, one user at a time (extrapolated)",
    "live": "ours, live, cache empty at the start",
    "tabular": "`dsa/Tabular-v0`",
}
LEAST_RATIO = {"inline": 3.0, "side": 100.0}
"""Of live to the usual way, in steps per second, by placement."""
LEAST_UNBATCHED, LEAST_TRAINING, LEAST_TABULAR = 3.0, 20.0, 50_000.0


def env_table(found: dict[str, Any]) -> str:
    """Everything that :func:`eval.bench.env.measure_env` found, by environment, and what was left out and why."""
    peak = found["peak"]
    lead = (
        f"{found['machine']}. Its own best product of two matrices: {peak['float32'] / 1e9:,.0f} billion operations per second "
        f"in float32, {peak['bfloat16'] / 1e9:,.0f} in bfloat16. Steps are those of single users; median (least - most) of the "
        "repeats."
    )
    parts = [_env_part(env_id, part, peak["float32"]) for env_id, part in found["environments"].items()]
    parts += [f"`{env_id}` was left out: its data, model or table were not at hand." for env_id in found["left_out"]]
    return "\n\n".join([lead, *parts])


def _env_part(env_id: str, part: dict[str, Any], peak: float) -> str:
    taken = part["rival_steps"]
    head = (
        f"**`{env_id}`**: pathways {part['placement']}, {part['users']} users, {part['gradient_steps']} gradient steps each, "
        f"{part['repeats']} repeats in turning order; the usual way took {taken['usual']} steps, ours one user at a "
        f"time {taken['unbatched']}."
    )
    blocks = [_rates(part, peak), _training(part["training"]), _accuracy(part), _precision(part["bfloat16"]), _claims(part)]
    return "\n\n".join([head, *blocks])


def _rates(part: dict[str, Any], peak: float) -> str:
    rates = {name: Spread(**values) for name, values in part["steps_per_second"].items()}
    lines = [
        "| way | steps per second | times the usual way | billion operations per second (share of the peak) |",
        "| --- | --- | --- | --- |",
    ]
    for name, spread in rates.items():
        ratio = spread.median / rates["usual"].median
        work = part["flops_per_step"].get(name, 0) * spread.median
        share = f"{work / 1e9:.1f} ({work / peak:.0%})" if work else ""
        lines.append(f"| {TITLES[name]} | {spread.text(1 if spread.median < 100 else 0)} | {ratio:,.1f} | {share} |")
    return "\n".join(lines)


def _training(training: dict[str, float]) -> str:
    lines = [f"| a policy trained in {training['steps']:,.0f} steps | seconds |", "| --- | --- |"]
    lines += [f"| {title} | {training[name]:,.1f} |" for name, title in TIMES.items() if name in training]
    note = f"Extrapolated from {training['rival_steps']:,.0f} steps under masks that our own run had asked for."
    return "\n".join([*lines, "", note])


def _accuracy(part: dict[str, Any]) -> str:
    accuracy = part["accuracy"]
    return (
        f"Accuracy of test users, everything on: the usual way {accuracy['usual']:.3f} (learning rate "
        f"{part['usual_learning_rate']:g}, chosen on val users), ours {accuracy['ours']:.3f}; the model as it was "
        f"{accuracy['all_off']:.3f}."
    )


def _precision(found: dict[str, float]) -> str:
    low, high = found["mean"] - found["half_width"], found["mean"] + found["half_width"]
    return (
        f"Reward in bfloat16 less that in float32, {found['pairs']:.0f} pairs: {found['mean']:+.4f} [{low:+.4f}, {high:+.4f}]; "
        f"in absolute terms {found['mean_absolute']:.4f}. Few validation examples alone give one reward a standard error of "
        f"{found['error_of_a_reward']:.4f}."
    )


def claims(part: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What was asked for, in words, as measured, and the least it must be."""
    rate = {name: values["median"] for name, values in part["steps_per_second"].items()}
    training = part["training"]
    found = [
        ("live against the usual way", rate["live"] / rate["usual"], LEAST_RATIO[part["placement"]]),
        ("live against one user at a time", rate["live"] / rate["unbatched"], LEAST_UNBATCHED),
        ("trained policy, usual way against live", training["usual_extrapolated"] / training["live"], LEAST_TRAINING),
    ]
    if "tabular" in rate:
        sooner = training["usual_extrapolated"] / training["tabular"]
        found.append(("trained policy, usual way against tabular", sooner, LEAST_TRAINING))
        found.append(("tabular steps per second", rate["tabular"], LEAST_TABULAR))
    return found


def _claims(part: dict[str, Any]) -> str:
    lines = ["| asked for | measured | at least | |", "| --- | --- | --- | --- |"]
    for words, value, least in claims(part):
        lines.append(f"| {words} | {value:,.1f} | {least:,.0f} | {'met' if value >= least else '**missed**'} |")
    return "\n".join(lines)
