"""Every way of personalising by name. To add one: a file with a :class:`eval.methods.base.Method`, and a line here.

Other distributions add theirs by an entry point of the group ``dsa.methods``, whose value is the class.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from backbones.registry import Registry, did_you_mean
from eval.methods.base import Method

METHODS: Registry[str | type[Method]] = Registry("method")
"""Names to ``"module:Class"``, imported when first asked for."""


def _register(module: str, **classes: str) -> None:
    for name, kind in classes.items():
        METHODS.register(name, f"eval.methods.{module}:{kind}")


_register("unchanged", base="Base")
_register("finetune", full_finetune="FullFineTuning")
_register("lora", lora="LoRA")
_register("adalora", adalora="AdaLoRA")
_register("shira", shira="SHiRA")
_register("ia3", ia3="IA3")
_register("prefix", prefix="Prefix")
_register("bias", bitfit="BitFit", norm_affine="NormAffine")
_register("bottleneck", bottleneck="Bottleneck")
_register("dcft", dcft="Dcft")
_register("simple", intercept="Intercept", item_covariance="ItemCovariance")
_register("head", head="Head")
_register("prototypes", prototypes="Prototypes")
_register("joint", joint="Joint")
_register("feddpa", feddpa="FedDPA")
_register("pathway", all_on="AllOn")
_register("meta_learned", meta_maml="MetaMaml", meta_fomaml="MetaFomaml", meta_anil="MetaAnil", meta_reptile="MetaReptile")
_register("one_mask", best_static="BestStatic", adapterdrop="AdapterDrop")
_register("scores", gradient_norm="GradientNorm", relative_gradient="RelativeGradient", importance="Importance")
_register("all_labels", all_on_all_labels="AllOnAllLabels", validation_search="ValidationSearch")
_register("per_pcs", per_pcs="PerPcs")
_register("hard_concrete", hard_concrete="HardConcrete")
_register("gumbel", gumbel="Gumbel")
_register("self_critical", self_critical="SelfCritical")
_register("searches", random_search="RandomSearch", greedy="GreedySearch")
_register("bayesian", bayesian="BayesianSearch")
_register("ppo", ppo="Gating")
_register("dealt", random="RandomBits", shuffled="Shuffled")
_register("cotrained", cotrained="CoTrainedGating", cotrained_static="CoTrainedStatic", cotrained_all_on="CoTrainedAllOn")


def split_names(text: str) -> list[str]:
    """``"a, b,a,"`` as ``["a", "b"]``."""
    return [*dict.fromkeys(name.strip() for name in text.split(",") if name.strip())]


def method_class(name: str) -> type[Method]:
    """The class behind a name.

    Raises:
        ValueError: for an unknown name, with a suggestion.
        ModuleNotFoundError: for a method that needs a distribution which is not installed, with the cure.
    """
    kind = METHODS.get(name)
    if isinstance(kind, str):
        module, _, attribute = kind.partition(":")
        kind = getattr(import_module(module), attribute)
    assert not isinstance(kind, str)
    for distribution in kind.needs:
        if find_spec(distribution) is None:
            raise ModuleNotFoundError(
                f"the method {name!r} needs {distribution}: pip install -e '.[eval]', or leave it out with --methods."
            )
    return kind


def make_method(name: str, **settings: Any) -> Method:
    """A method with some hyperparameters changed. Raises ``ValueError`` for a hyperparameter that it does not have."""
    kind = method_class(name)
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    for setting in settings:
        if setting not in known:
            raise ValueError(f"method {name!r} has no hyperparameter {setting!r}. {did_you_mean(setting, known)}")
    return kind(**settings)
