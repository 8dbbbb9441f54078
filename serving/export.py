"""A user's adapter as a plain PEFT checkpoint, which nothing of ours is needed to load, and back.

The folder holds what PEFT writes (``adapter_config.json``, ``adapter_model.safetensors``), the classifier with the user's head
added (``classifier.safetensors``: ``weight [C, F]``, ``bias [C]``), what PEFT has no word for (``dsa.json``), and a README
that says how to use them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from backbones.artefacts import ArtefactError, write_atomically
from backbones.bert import TextBackbone
from backbones.images import MEAN, STD
from backbones.lora import LoraPathways
from backbones.pathways import Pathways, Weights
from serving.records import Adapter

VERSION = 1
FACTS = ("version", "mask", "pathways", "cost_weight", "labels", "model")
NOTHING = "dummy-target-modules"
"""PEFT's own word for an adapter without any layer: an empty list is refused, and other ways to say so mean all layers."""


def export_peft(pathways: Pathways, adapter: Adapter, folder: str | Path) -> None:
    """Write one user's adapter, scaled by nothing (``lora_alpha = r``), its layers named in full.

    Args:
        pathways: of the placement ``lora``, along one of Hugging Face's encoders or torchvision's ResNets.
        adapter: of one user along them.
        folder: made if it is not there.

    Raises:
        ValueError: for other pathways, or a backbone that no other library knows.
        FileExistsError: if the folder holds something already.
    """
    if not isinstance(pathways, LoraPathways):
        raise ValueError(
            f"PEFT knows no {type(pathways).__name__}: only updates of a block's own weights become its checkpoints. Train the "
            "run with --placement lora."
        )
    layers, target = _layers(pathways, adapter.gates), Path(folder)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; give a new folder.")
    target.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key, path in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = adapter.weights[f"{key}.down"].contiguous()
        up = adapter.weights[f"{key}.up"]
        of_conv = adapter.weights[f"{key}.down"].dim() == 4
        tensors[f"base_model.model.{path}.lora_B.weight"] = (up[:, :, None, None] if of_conv else up).contiguous()
    config = {
        "peft_type": "LORA",
        "r": pathways.rank,
        "lora_alpha": pathways.rank,
        "target_modules": [*layers.values()] or NOTHING,
        "bias": "none",
        "inference_mode": True,
    }
    facts = {
        "version": VERSION,
        "mask": [int(bit) for bit in adapter.gates],
        "pathways": [*pathways.names],
        "cost_weight": adapter.cost_weight,
        "labels": adapter.labels,
        "model": pathways.model.fingerprint(),
    }
    write_atomically(target / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write_atomically(target / "classifier.safetensors", save(_classifier(pathways, adapter), {"format": "pt"}))
    write_atomically(target / "adapter_config.json", json.dumps(config, indent=1).encode())
    write_atomically(target / "dsa.json", json.dumps(facts, indent=1).encode())
    write_atomically(target / "README.md", _readme(pathways).encode())


def import_peft(pathways: LoraPathways, folder: str | Path) -> Adapter:
    """The adapter that :func:`export_peft` wrote, or PEFT after training on; the head is what the classifier differs by.

    Raises:
        ArtefactError: if files are missing or damaged, or belong to another model or other pathways.
    """
    source = Path(folder)
    try:
        facts = json.loads((source / "dsa.json").read_text())
        config = json.loads((source / "adapter_config.json").read_text())
        tensors, classifier = (load((source / f"{name}.safetensors").read_bytes()) for name in ("adapter_model", "classifier"))
    except Exception as error:  # safetensors has errors of its own
        raise ArtefactError(f"{source} holds no exported adapter: {error}") from error
    _check(facts, config, pathways, source)
    gates = torch.tensor(facts["mask"], dtype=torch.bool)
    layers = _layers(pathways, gates)
    known = {f"base_model.model.{path}.{name}.weight" for path in layers.values() for name in ("lora_A", "lora_B")}
    if further := sorted({*tensors} - known):
        raise ArtefactError(
            f"{source} holds {further[0]}, which has no place among these pathways: train on what was exported alone."
        )
    weights: Weights = {key: w.clone() for key, w in pathways.start(0).items()}
    for key, path in layers.items():
        for kind, name in (("down", "lora_A"), ("up", "lora_B")):
            found = tensors.get(f"base_model.model.{path}.{name}.weight")
            shape = weights[f"{key}.{kind}"].shape
            if found is None or found.numel() != shape.numel():
                raise ArtefactError(f"{source} has no {name} of {path} with {tuple(shape)} numbers: it is of other pathways.")
            weights[f"{key}.{kind}"] = found.reshape(shape).float()
    if {name: tuple(w.shape) for name, w in classifier.items()} != {
        "weight": tuple(pathways.model.weight.shape),
        "bias": tuple(pathways.model.bias.shape),
    }:
        raise ArtefactError(f"the classifier in {source} is of other classes or features: use the model it was made for.")
    if gates[-1]:
        weights["head.weight"] = (classifier["weight"] - pathways.model.weight).T.contiguous()
        weights["head.bias"] = classifier["bias"] - pathways.model.bias
    return Adapter(gates, weights, float(facts["cost_weight"]), int(facts["labels"]))


def _check(facts: dict[str, Any], config: dict[str, Any], pathways: LoraPathways, source: Path) -> None:
    for there, name, words in ((facts, "dsa.json", FACTS), (config, "adapter_config.json", ("r", "lora_alpha"))):
        if missing := [word for word in words if word not in there]:
            raise ArtefactError(f"{name} in {source} does not say {missing[0]!r}: export it anew.")
    wanted = {"version": VERSION, "pathways": [*pathways.names], "model": pathways.model.fingerprint()}
    for name, value in wanted.items():
        if facts.get(name) != value:
            raise ArtefactError(
                f"{source} is of another {name} ({facts.get(name)}, here {value}): take the one it was made for."
            )
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    beyond = [name for name in ("use_dora", "alpha_pattern", "rank_pattern", "modules_to_save") if config.get(name)]
    if config["r"] != pathways.rank or scaling != 1 or beyond or config.get("bias", "none") != "none":
        raise ArtefactError(f"{source} is no plain LoRA of rank {pathways.rank} with lora_alpha equal to it: export it anew.")


def _layers(pathways: LoraPathways, gates: Tensor) -> dict[str, str]:
    """Of the blocks that are on: our name of a layer, and its name in the original model."""
    backbone = pathways.model.backbone
    return {
        f"{name}.{layer}": backbone.origin(p, layer)
        for p, name in enumerate(pathways.names[:-1])
        for layer in (pathways.targets[p] if gates[p] else ())
    }


def _classifier(pathways: LoraPathways, adapter: Adapter) -> dict[str, Tensor]:
    model, on = pathways.model, bool(adapter.gates[-1])
    weight = model.weight + adapter.weights["head.weight"].T if on else model.weight
    bias = model.bias + adapter.weights["head.bias"] if on else model.bias
    return {"weight": weight.contiguous(), "bias": bias.contiguous()}


def _numbers(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.flatten().tolist()]


def _readme(pathways: LoraPathways) -> str:
    backbone = pathways.model.backbone
    use = _with_texts(backbone) if isinstance(backbone, TextBackbone) else _with_images(*backbone.reference_shape[-2:])
    return (
        "One user's adapter, for PEFT. With the model that it was made for:\n\n```python\n"
        f'{use}classifier = load_file("classifier.safetensors")  # safetensors.torch\n'
        'logits = features @ classifier["weight"].T + classifier["bias"]\n```\n'
    )


def _with_texts(backbone: TextBackbone) -> str:
    return (
        "model = PeftModel.from_pretrained(AutoModel.from_pretrained(SOURCE), FOLDER).eval()\n"
        f'batch = tokenizer(texts, padding=True, truncation=True, max_length={backbone.max_length}, return_tensors="pt")\n'
        'mask = batch["attention_mask"][..., None]\n'
        "features = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)\n"
    )


def _with_images(height: int, width: int) -> str:
    return (
        "base = torchvision.models.NAME(weights=WEIGHTS)\n"
        "base.fc = torch.nn.Identity()\n"
        "# Whole pictures, squeezed, as in training; torchvision's own transforms would cut out the middle.\n"
        f'pixels = numpy.stack([numpy.asarray(p.convert("RGB").resize(({width}, {height}), 2)) for p in pictures])\n'
        "images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255\n"
        f"images = (images - torch.tensor({_numbers(MEAN)}).view(3, 1, 1)) / torch.tensor({_numbers(STD)}).view(3, 1, 1)\n"
        "features = PeftModel.from_pretrained(base, FOLDER).eval()(images)\n"
    )
