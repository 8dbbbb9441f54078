"""What to say of a population before anything long begins: who is in it, and what its features will take."""

from users.base import ROLES, SPLITS, Population

FLOAT = 4
"""Bytes of a float32."""


def describe(population: Population) -> str:
    """Lines for the reader: users per split, examples, items, classes, and everything the loader has to say."""
    users = ", ".join(f"{len(getattr(population, split)):,} {split}" for split in SPLITS)
    examples = sum(int(population.sizes(role).sum()) for role in ROLES)
    fitting = 0 if population.fitting is None else len(population.fitting)
    names = population.class_names
    classes = ": " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else ""
    items = "" if population.items is None else f", {len(population.items):,} distinct items"
    return "\n".join(
        [
            f"population {population.name}: {users} users",
            f"{examples:,} examples of these users, {fitting:,} that fit the population model{items}",
            f"{population.num_classes} classes{classes}",
            *population.notes,
        ]
    )


def cost_estimate(items: int, floats_per_item: int, items_per_second: float) -> str:
    """One line: what the frozen features of ``items`` will take on disk, and how long at the speed that was measured."""
    seconds = items / items_per_second
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    size = items * floats_per_item * FLOAT
    disk = f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
    return f"features of {items:,} items: about {disk} on disk and {time} at {items_per_second:,.0f} items/s"
