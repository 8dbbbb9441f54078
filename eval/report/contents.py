"""The tables of a report, from a summary (:mod:`eval.summary`)."""

from collections.abc import Iterable, Mapping
from typing import Any

from eval.pareto import WORST_COST
from eval.report.tables import NONE, Line, Table, figure_text, short
from eval.summary import KINDS, beside_masks

Summary = Mapping[str, Any]
FLIPPED = {"above": "below", "below": "above"}
COUNTED = {
    None: "what a mask switches on",
    "parameters": "the user's own parameters",
    "flops": "operations",
    "latency": "time",
}
"""What cost is, by what a run counts."""
EXAMPLES = ("labelled examples of the user", "(support first, then validation)")
"""What the support curve counts, and in which order it shows them."""
INFERENCE = ("one user, 1 example", "one user, 64 examples", "64 users, 1 example each")


def tables(summary: Summary) -> list[Table]:
    """Those that have something to say."""
    every = [main_table(summary), mask_table(summary), curve_table(summary), timing_table(summary), failure_table(summary)]
    return [table for table in every if any(len(line.cells) > 1 for line in table.lines)]


def measured(summary: Summary) -> dict[str, Any]:
    """Methods that have rows."""
    return {name: method for name, method in summary["methods"].items() if method["users"]}


def titled(name: str, method: Mapping[str, Any], summary: Summary) -> str:
    """A method's name, with its users and seeds where it was run on fewer than others."""
    every = measured(summary).values()
    most = max(one["users"] for one in every), max(one["seeds"] for one in every)
    if (method["users"], method["seeds"]) == most:
        return name
    return f"{name} ({method['users']} users, {method['seeds']} seed{'s' * (method['seeds'] > 1)})"


def interval_text(found: Mapping[str, Any] | None, verdict: bool = True, digits: int = 3) -> str:
    """``+0.012 [+0.003, +0.021] above``."""
    if found is None:
        return NONE
    if "none" in found:
        return str(found["none"])
    mean, low, high = (f"{found[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    text = f"{mean} [{low}, {high}]"
    return f"{text} {found['verdict']}" if verdict else text


def flipped(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A comparison with its two sides changed."""
    if found is None:
        return None
    turned = {"mean": -found["mean"], "low": -found["high"], "high": -found["low"]}
    return {**found, **turned, "verdict": FLIPPED.get(found["verdict"], found["verdict"])}


def _lines(summary: Summary, cells: Mapping[str, list[str]]) -> list[Line]:
    """Lines under a heading for each kind of method."""
    lines = []
    for kind in KINDS:
        names = [name for name in cells if summary["methods"][name]["kind"] == kind]
        lines += [Line([kind])] * bool(names)
        lines += [Line(cells[name], strong=name == summary["subject"]) for name in names]
    return lines


def main_table(summary: Summary) -> Table:
    """Every method on the whole support, at the summary's cost weight."""
    subject = summary["subject"]
    heads = ["method", "accuracy", *([f"less {subject}"] if subject else []), "gain over base", "bottom decile"]
    heads += ["made worse", "log-likelihood", "ECE", "cost", "active", "labels", "trainable", "stored", "scope"]
    cells = {}
    for name, method in measured(summary).items():
        means, against, gain = method["means"], method["against"], method["gain"] or {}
        row = [titled(name, method, summary), figure_text(means["accuracy"])]
        row += [interval_text(against.get(subject, {}).get("accuracy"))] if subject else []
        row += [interval_text(against.get("base", {}).get("accuracy"), verdict=False)]
        row += [figure_text(gain.get("bottom_decile"), "+.3f"), figure_text(gain.get("worse"), ".0%")]
        row += [figure_text(means["log_likelihood"]), figure_text(means["ece"]), figure_text(means["cost"], ".2f")]
        row += [short(means["active"]), figure_text(means["labels"], ".0f"), short(means["trainable"])]
        cells[name] = [*row, short(means["stored"], "B"), method["scope"]]
    note = (
        f"Methods with a trade-off at cost weight {summary['cost_weight']:g}. Bottom decile: mean gain of the tenth of the "
        "users who gain least. Made worse: share of users with a gain below zero. Cost: "
        f"{COUNTED[summary['counts']]}, as a share of what everything on takes{_bare(summary['counts'])}. Labels: of the "
        "user's own. Trainable, active: parameters; stored: bytes per user. Means of methods with fewer users are of those "
        "users; differences (of accuracy) are of the users whom both have."
    )
    if drawn := [name for name in cells if summary["methods"][name]["draws"] > 1]:
        note += f" Of {' and '.join(drawn)} all is the mean over some draws, but ECE and masks, which are the first draw's."
    return Table("Every method", heads, _lines(summary, cells), note)


def _bare(counts: str | None) -> str:
    """What else is counted where all that runs is."""
    return "" if counts in (None, "parameters") else ", of all that runs; methods without masks count as the bare model"


def mask_table(summary: Summary) -> Table:
    """Methods that choose masks, at every cost weight and at the subject's cost."""
    subject, main = summary["subject"], f"{summary['cost_weight']:g}"
    weights = [f"{weight:g}" for weight in summary["cost_weights"]]
    heads = ["method", "labels", *(f"reward at {weight}" for weight in weights), "hypervolume", "on", "masks", "adaptations"]
    compared = ("reward", f"accuracy at {subject}'s cost", "hypervolume")
    heads += [f"{what}, {subject} less it" for what in compared] if subject else []
    cells = {}
    for name, method in measured(summary).items():
        if not beside_masks(name, method):
            continue
        means = method["means"]
        row = [titled(name, method, summary), figure_text(means["labels"], ".0f")]
        row += [figure_text(method["by_cost_weight"][weight]["reward"]) for weight in weights]
        row += [figure_text(method["hypervolume"], ".4f"), figure_text(means["active_fraction"], ".0%")]
        row += [figure_text(method["distinct_masks"], ".3g"), figure_text(means["adaptations"], ".0f")]
        if subject:
            row += [interval_text(method["subject_less"].get(main)), interval_text(method["at_equal_cost"])]
            row += [interval_text(method["volume_lead"], digits=4)]
        cells[name] = row
    note = (
        f"Reward: accuracy less cost weight times cost. Hypervolume over the cost weights {', '.join(weights)}, reference: "
        f"cost {WORST_COST:g}, accuracy of base; - without a trade-off. On: share of the pathways; masks: different ones among "
        f"the users of a seed (and fold); both, adaptations and differences at cost weight {main}."
    )
    if subject:
        note += (
            f" At {subject}'s cost: the rival's front over the cost weights (base among its points), read at that mean cost; "
            "a rival without a front as it is, if it is not dearer."
        )
    dealt = {"shuffled": "deals out masks that the policy picked for val users", "random": "draws bits of their mean cost"}
    note += "".join(f" {name} {what}." for name, what in dealt.items() if name in cells)
    return Table("Methods that choose pathways", heads, _lines(summary, cells), note)


def curve_table(summary: Summary) -> Table:
    """Gain over base by number of labelled examples, with how many users each number is of."""
    sizes = [str(size) for size in summary["shown"]]
    curves = {name: one for name, one in measured(summary).items() if one["curve"] and name != "base"}
    wholes = {name: one["against"].get("base", {}).get("accuracy", {}) for name, one in curves.items()}
    cells = {}
    for name, method in curves.items():
        row = [figure_text(method["curve"].get(size, {}).get("mean"), "+.3f") for size in sizes]
        cells[name] = [titled(name, method, summary), *row, figure_text(wholes[name].get("mean"), "+.3f")]
    counts = [_least_to_most(one["curve"].get(size) for one in curves.values()) for size in sizes]
    users = [Line(["users", *counts, _least_to_most(wholes.values())])] if curves else []
    examples = " ".join(EXAMPLES)
    note = (
        f"Gain in accuracy over base after so many {examples}; without any it must be zero (of what is personal). Users with "
        "fewer examples drop out of a column, so that columns are of different users: the first line has the smallest and the "
        "largest number of users behind a figure of the column."
    )
    if any(one["label_use"] == "all" for one in curves.values()):
        note += " In the last column, methods that see validation labels as well have all of them."
    heads = ["method", *sizes, f"the support{_mean_support(curves)}"]
    return Table(f"Gain by number of {examples}", heads, users + _lines(summary, cells), note)


def _least_to_most(points: Iterable[Mapping[str, Any] | None]) -> str:
    """The smallest and the largest number of users of some points: ``12 - 80``, or ``80``."""
    users = sorted({point["users"] for point in points if point})
    return " - ".join(map(str, dict.fromkeys([users[0], users[-1]]))) if users else NONE


def _mean_support(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """How many examples the support has in the mean, of the methods that use it and nothing else; empty if there are none."""
    using = [one for one in methods.values() if one["label_use"] == "support" and one["scope"] != "nobody"]
    most = max(using, key=lambda one: one["users"], default=None)
    return f" ({most['means']['labels']:.0f} in the mean)" if most else ""


def timing_table(summary: Summary) -> Table:
    """Seconds, memory and operations."""
    timing = summary["timing"] or {"methods": {}}
    heads = ["method", "fit, s", "personalise, s", "peak memory", *(f"inference, ms: {asked}" for asked in INFERENCE)]
    cells = {}
    for name in summary["methods"]:
        one = timing["methods"].get(name)
        if one:
            row = [name, figure_text(one.get("fit_seconds"), ".3g"), range_text(one.get("personalise_seconds"))]
            row += [short(one.get("personalise_peak_bytes"), "B")]
            row += [range_text(one.get("inference_ms", {}).get(asked)) for asked in INFERENCE]
            cells[name] = [*row, short(one.get("flops_per_example"))]
    note = (
        "Median (quartiles) of runs in turn, on the machine that wrote the folder: "
        f"{timing.get('threads', '?')} thread(s), {timing.get('repeats', '?')} repeats, {timing.get('users', '?')} users."
    )
    note += " Predictions for one user, and operations, are the first test user's, under their own mask."
    note += " Peak memory: of tensors, beyond what was held before. Fitting: without what other methods had made before (the "
    note += "policy, a co-training)."
    if loaded := timing.get("loaded"):
        note += (
            f" Batches of {timing['users']} different users: of methods that train through the backbone {loaded} users' "
            "weights are loaded in turn; where there are fewer test users, they repeat."
        )
    if timing.get("tokens"):
        note += f" Texts that are predicted have {timing['tokens']} tokens each."
    if half := [name for name in cells if summary["methods"][name]["settings"].get("low_precision")]:
        note += f" Products in bfloat16: {', '.join(half)}."
    note += "".join(_timed_later(timing["methods"]["base"], later) for later in timing.get("later", []))
    return Table("Time and memory", [*heads, "operations per example"], _lines(summary, cells), note)


def _timed_later(base: Mapping[str, Any], later: Mapping[str, Any]) -> str:
    """A sentence on methods that were timed after the others, with how fast ``base`` was in the same turns."""
    before, then = (one["inference_ms"][INFERENCE[0]]["median"] for one in (base, later["base"]))
    return (
        f" Timed later: {', '.join(later['methods'])}; in the same turns base took {then / before:.2f} times as long as before "
        f"({INFERENCE[0]})."
    )


def range_text(found: Mapping[str, float] | None) -> str:
    """Median and quartiles: ``0.012 (0.010 - 0.015)``."""
    return NONE if found is None else f"{found['median']:.3g} ({found['low']:.3g} - {found['high']:.3g})"


def failure_table(summary: Summary) -> Table:
    """What failed for whom, and what was refused."""
    lines = []
    for name, method in summary["methods"].items():
        for one in method["failed"]:
            more = one["number_of_users"] - len(one["users"])
            users = ", ".join(one["users"]) + (f" and {more} more" if more else "")
            lines.append(Line([name, one["reason"], str(one["rows"]), users]))
    lines += [Line([name, f"left out: {reason}", NONE, NONE]) for name, reason in summary["refused"].items()]
    for name, users in summary["smaller"].items():
        lines.append(
            Line([name, f"too little memory: measured as few as {users} at a time, with the same results", NONE, NONE])
        )
    note = "Rows that failed are left out of all means; comparisons use the users whom both methods have."
    return Table("What did not run", ["method", "reason", "rows", "users"], lines, note)
