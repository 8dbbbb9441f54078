"""Many users' low-rank updates in one batch: ours against PEFT's two ways, and against a batch of one user's."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm

from backbones import make_backbone
from backbones.base import Backbone, PopulationModel
from backbones.lora import LoraPathways
from backbones.pathways import Weights
from eval.bench.clock import Spread, alternating_calls

USERS, TOKENS, RANK, CLASSES = 256, 8, 8, 2


def measure_loras(users: int = USERS, repeats: int = 7, backbone: Backbone | None = None) -> dict[str, Any]:
    """Milliseconds of a batch of one short text per user through MiniLM (or another encoder), by way of serving it. JSON-able.

    Ways: ``ours``; ``one user`` (as many texts of one user), ``bare`` (no updates, or one user's merged into the weights);
    ``peft adapter_names``, ``peft set_adapter`` (one user after the other).

    Raises:
        RuntimeError: if PEFT, given the same numbers, answers otherwise.
    """
    torch.manual_seed(0)
    if backbone is None:
        made = make_backbone("minilm")
        backbone = made.backbone if isinstance(made, PopulationModel) else made
    model = PopulationModel(backbone, torch.randn(CLASSES, backbone.feature_width), torch.randn(CLASSES))
    plain = deepcopy(model)  # before our hooks are on it
    pathways = LoraPathways(model, RANK)
    weights = {key: w + 0.02 * torch.randn(users, *w.shape) for key, w in pathways.start(0).items()}
    gates = torch.ones(users, pathways.num_pathways, dtype=torch.bool)
    gates[:, -1] = False  # PEFT's adapters have no head
    inputs = torch.randint(5, 20, (users, 1, TOKENS))
    peft = with_adapters(plain, pathways, weights)
    names = [f"user{u}" for u in range(users)]
    mine = {key: w[:1] for key, w in weights.items()}

    def one_by_one() -> Tensor:
        found = []
        for user, name in enumerate(names):
            peft.set_adapter(name)
            found.append(peft(inputs[user]))
        return torch.cat(found)

    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: pathways.forward(inputs, weights, gates)[:, 0],
        "one user": lambda: pathways.forward(inputs.transpose(0, 1), mine, gates[:1])[0],
        "bare": lambda: model(inputs[:, 0]),
        "peft adapter_names": lambda: peft(inputs[:, 0], adapter_names=names),
        "peft set_adapter": one_by_one,
    }
    with torch.no_grad():
        ours = ways["ours"]()
        for name in ("peft adapter_names", "peft set_adapter"):
            if not torch.allclose(ways[name](), ours, rtol=1e-3, atol=1e-3):
                raise RuntimeError(f"{name} answers otherwise with the same numbers: what is compared is not the same.")
        found = alternating_calls(ways, repeats)
    return {"users": users, "tokens": TOKENS, "rank": RANK, "milliseconds": {name: asdict(s) for name, s in found.items()}}


def with_adapters(model: PopulationModel, pathways: LoraPathways, weights: Weights) -> Any:
    """The model under PEFT with an adapter ``user<u>`` for each of the stacked weights; it is changed in place."""
    paths = {
        f"backbone.blocks.{p}.{inside}": f"{name}.{inside}"
        for p, name in enumerate(pathways.names[:-1])
        for inside in pathways.targets[p]
    }
    config = LoraConfig(r=pathways.rank, lora_alpha=pathways.rank, target_modules=[*paths])
    users = len(next(iter(weights.values())))
    wrapped: Any = get_peft_model(model, config, adapter_name="user0")
    for user in tqdm(range(1, users), desc="adapters for PEFT", unit="user"):
        wrapped.add_adapter(f"user{user}", config)
    for path, key in paths.items():
        layer = wrapped.base_model.model.get_submodule(path)
        for user in range(users):
            layer.lora_A[f"user{user}"].weight.data = weights[f"{key}.down"][user]
            layer.lora_B[f"user{user}"].weight.data = weights[f"{key}.up"][user]
    return wrapped.eval()


def loras_table(found: dict[str, Any]) -> str:
    """The ways as Markdown, ours as a ratio to each."""
    spreads = {name: Spread(**one) for name, one in found["milliseconds"].items()}
    ours = spreads["ours"].median
    lines = [
        f"{found['users']} different users, one text of {found['tokens']} tokens each, through MiniLM with updates of rank "
        f"{found['rank']} in all dense layers; medians (least - most).",
        "",
        "| way | ms | ours takes |",
        "| --- | --- | --- |",
    ]
    for name, spread in spreads.items():
        ratio = f"{ours / spread.median:.2f} of it" if name in ("one user", "bare") else f"1 / {spread.median / ours:.1f} of it"
        lines.append(f"| {name} | {spread.text(1)} | {'-' if name == 'ours' else ratio} |")
    return "\n".join(lines)
