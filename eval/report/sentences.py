"""What the verdicts say in plain sentences: where the subject wins, ties, loses, and to what."""

from collections.abc import Callable, Mapping
from typing import Any

from eval.report.contents import Summary, flipped, interval_text, measured, tables
from eval.report.tables import code, figure_text
from eval.statistics import NO_DIFFERENCE
from eval.summary import KINDS, SUBJECT

SAID = (("above", "is above"), (NO_DIFFERENCE, "shows no difference from"), ("below", "is below"))
Comparisons = Mapping[str, Mapping[str, Any]]


def lead(summary: Summary) -> str:
    """On whom, how it was tested, and the command."""
    every = measured(summary).values()
    users, seeds = max(one["users"] for one in every), max(one["seeds"] for one in every)
    unit = (
        "every seed draws users anew, who are resampled within seeds (the examples that they share stay as they are)"
        if summary["simulated"]
        else "real people, averaged over seeds"
    )
    folds = f" in {summary['folds']} folds" if summary["folds"] else ""
    return (
        f"{code(summary['env'])} ({code(summary['population'])}): {seeds} seed{'s' * (seeds > 1)}, {users} test users"
        f"{' in all' * bool(summary['simulated'] and seeds > 1)}{folds}; {unit}. Paired differences with 95 % bootstrap "
        "intervals, one by one; verdicts (above, below, no difference shown) are corrected for the number of comparisons "
        "(sign-flip tests, of hypervolumes and at equal cost by bootstrap with Student's tails; Holm over the methods of a "
        "column, rewards over all cost weights too); those of a column hold together with 95 %. Methods with fewer users or "
        f"seeds are compared on those.{_choosers(summary)} Made by "
        f"{code(summary['command'])}, in {_duration(summary['seconds'])} of one core."
    )


def _choosers(summary: Summary) -> str:
    """Who is not among the test users, and why."""
    whose = " and ".join(map(code, summary.get("choosers", ())))
    return f" Not among them: people who chose hyperparameters, as val users of {whose}." if whose else ""


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes} minute{'s' * (minutes > 1)}"


def sentences(summary: Summary) -> list[str]:
    """Bullet points without the bullets; parts between backticks are names."""
    subject, notes = summary["subject"], _defects(measured(summary)) + _left_out(summary)
    if subject is None:
        why = "failed for everybody" if SUBJECT in summary["methods"] else "was not run"
        return [f"{code(SUBJECT)} {why}: there is nothing to compare the others with.", *notes]
    methods = {name: one for name, one in measured(summary).items() if name != subject}
    mine, main = summary["methods"][subject], f"{summary['cost_weight']:g}"
    masks = {name: one for name, one in methods.items() if one["kind"] == KINDS[3]}
    dense = {name: one for name, one in methods.items() if one["kind"] != KINDS[3]}
    found = _by_labels(f"Reward at cost weight {main}, methods that choose pathways", subject, masks, _reward(main))
    found += _by_labels(
        f"Accuracy at the mean cost of {code(subject)} ({mine['means']['cost']:.2f})", subject, masks, _equal_cost
    )
    found += _dearer(subject, masks)
    found += _by_labels("Hypervolume over the cost weights", subject, masks, lambda one: one["volume_lead"], 4)
    found += _by_labels("Accuracy at whatever cost, methods that choose no pathways", subject, dense, _accuracy(subject))
    found += _best_dense(subject, mine, dense)
    found += _spread_sentence(subject, mine)
    return found + notes


def _reward(weight: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda method: method["subject_less"].get(weight)


def _accuracy(subject: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda method: flipped(method["against"].get(subject, {}).get("accuracy"))


def _equal_cost(method: Mapping[str, Any]) -> Any:
    found = method["at_equal_cost"]
    return None if found is None or "none" in found else found


def _by_labels(
    what: str, subject: str, methods: Comparisons, ask: Callable[[Mapping[str, Any]], Any], digits: int = 3
) -> list[str]:
    """A sentence on methods with no more labels than the subject, and one on those that see more."""
    out = []
    for use, words in (("support", what), ("all", f"{what}, with validation labels as well")):
        found = {name: ask(one) for name, one in methods.items() if one["label_use"] == use}
        said = _verdicts({name: one for name, one in found.items() if one is not None}, digits)
        out += [f"{words}: {code(subject)} {said}."] * bool(said)
    return out


def _verdicts(found: Comparisons, digits: int) -> str:
    """``is above `a` (+0.012), `b` (+0.010); shows no difference from `c` (+0.001)``."""
    parts = []
    for verdict, words in SAID:
        named = sorted((name for name in found if found[name]["verdict"] == verdict), key=lambda name: -found[name]["mean"])
        if named:
            parts.append(f"{words} " + ", ".join(f"{code(name)} ({found[name]['mean']:+.{digits}f})" for name in named))
    return "; ".join(parts)


def _dearer(subject: str, masks: Comparisons) -> list[str]:
    """Rivals without a point at the subject's cost."""
    named = [name for name, one in masks.items() if "none" in (one["at_equal_cost"] or {})]
    if not named:
        return []
    return [f"Not comparable at the cost of {code(subject)}: " + ", ".join(map(code, named)) + " (see the table)."]


def _best_dense(subject: str, mine: Mapping[str, Any], dense: Comparisons) -> list[str]:
    """How far the subject is from the most accurate method without masks, and with how much."""
    pairs = {
        name: flipped(one["against"].get(subject, {}).get("accuracy"))
        for name, one in dense.items()
        if one["label_use"] == "support" and one["kind"] != KINDS[0]
    }
    found = {name: one for name, one in pairs.items() if one is not None}
    if not found:
        return []
    best = min(found, key=lambda name: found[name]["mean"])
    return [
        f"The best method without masks at equal labels is {code(best)}: {code(subject)} less it is "
        f"{interval_text(found[best], verdict=False)}, {found[best]['verdict']}, with "
        f"{figure_text(mine['means']['active_fraction'], '.0%')} of the pathways on (cost {mine['means']['cost']:.2f} against "
        f"{dense[best]['means']['cost']:.2f})."
    ]


def _spread_sentence(subject: str, mine: Mapping[str, Any]) -> list[str]:
    gain, over = mine["gain"], mine["against"].get("base", {}).get("accuracy")
    if gain is None or over is None:
        return []
    count = mine["distinct_masks"] or 0  # a mean over seeds and folds; 0: no masks at all
    masks = f" It uses {count:.3g} different masks." if count > 1 else " It uses one mask for all." * (count == 1)
    return [
        f"{code(subject)} brings {interval_text(over, verdict=False)} over `base`; the tenth of the users who gain least get "
        f"{gain['bottom_decile']:+.3f}, {gain['worse']:.0%} are made worse.{masks}"
    ]


def _defects(methods: Comparisons) -> list[str]:
    """Methods that are not ``base`` when they are shown nothing."""
    started = {name: one["curve"].get("0") for name, one in methods.items() if one["scope"] != "nobody"}
    named = [name for name, one in started.items() if one and max(map(abs, (one["mean"], one["low"], one["high"]))) > 1e-9]
    return [f"Not equal to `base` without any example, which is a defect: {', '.join(map(code, named))}."] * bool(named)


def _left_out(summary: Summary) -> list[str]:
    failed = [name for name, one in summary["methods"].items() if one["failed"]]
    never = [name for name, one in summary["methods"].items() if not one["users"]]
    out = [f"Failed for some users: {', '.join(map(code, failed))} (see below)."] * bool(failed)
    return out + [f"Without any result: {', '.join(map(code, never))}."] * bool(never)


def markdown(summary: Summary) -> str:
    """The whole as Markdown, for a page: lead, sentences, tables."""
    bullets = "\n".join(f"- {sentence}" for sentence in sentences(summary))
    return "\n\n".join([lead(summary), bullets, *(table.to_markdown() for table in tables(summary))])
