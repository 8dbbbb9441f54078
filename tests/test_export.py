"""Adapters as PEFT checkpoints: loaded by PEFT into the original models, and back."""

import itertools
import json

import numpy
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load, load_file, save

from backbones.artefacts import ArtefactError
from backbones.base import PopulationModel
from backbones.bert import TextBackbone
from backbones.lora import LoraPathways
from backbones.pathways import make_pathways
from backbones.resnet import small_resnet, torchvision_resnet
from serving.export import export_peft, import_peft
from serving.personaliser import Personaliser
from serving.records import Adapter
from serving.store import UnknownUserError
from tests import worlds
from tests.test_bert import TEXTS, make_model, make_tokenizer
from tests.test_serving import RULES, BySign

peft = pytest.importorskip("peft")


class Original:
    """Another library's model, ours made of it, inputs for both, and how the original gets features."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        torch.manual_seed(0)
        if kind.startswith("resnet"):
            network = getattr(torchvision.models, kind)(weights=None, num_classes=3).eval()
            for module in network.modules():
                if isinstance(module, torch.nn.BatchNorm2d):  # as if it had been trained
                    module.running_mean.uniform_(-0.2, 0.2)
                    module.running_var.uniform_(0.5, 2.0)
                    module.weight.data.uniform_(0.5, 1.5)
            self.state, weights = network.state_dict(), folder / "weights.pth"
            torch.save(torchvision.models.get_model(kind, weights=None).state_dict() | self._but_last(self.state), weights)
            backbone = torchvision_resnet(kind, weights).backbone
            self.inputs = torch.rand(2, 3, 64, 64)
        else:
            backbone = self._text(kind)
        self.model = PopulationModel(backbone, torch.randn(3, backbone.feature_width), torch.randn(3))
        self.pathways = LoraPathways(self.model, 4)

    @staticmethod
    def _but_last(state):
        return {name: value for name, value in state.items() if not name.startswith("fc.")}

    def _text(self, kind):
        self.encoder, tokenizer = make_model(kind), make_tokenizer()
        self.encoder.save_pretrained(self.folder / "encoder")
        backbone = TextBackbone(self.encoder, tokenizer)
        self.inputs = backbone.prepare(TEXTS)
        self.batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        return backbone

    def features(self, exported):
        """By PEFT and the original library alone."""
        if self.kind.startswith("resnet"):
            base = getattr(torchvision.models, self.kind)(weights=None, num_classes=3)
            base.load_state_dict(self.state)
            base.fc = torch.nn.Identity()
            return peft.PeftModel.from_pretrained(base, exported).eval()(self.inputs)
        base = type(self.encoder).from_pretrained(self.folder / "encoder")
        hidden = peft.PeftModel.from_pretrained(base, exported).eval()(
            input_ids=self.batch["input_ids"], attention_mask=self.batch["attention_mask"]
        )
        mask = self.batch["attention_mask"][..., None]
        return (hidden.last_hidden_state * mask).sum(1) / mask.sum(1)


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert", "resnet18", "resnet50"])
def original(request, tmp_path_factory):
    return Original(request.param, tmp_path_factory.mktemp(request.param))


def adapter_of(pathways, mask, seed=0):
    torch.manual_seed(seed)
    weights = {key: w + 0.05 * torch.randn_like(w) for key, w in pathways.start(0).items()}
    return Adapter(torch.tensor(mask, dtype=torch.bool), weights, 0.1, 20)


def masks_of(pathways):
    count = pathways.num_pathways
    draw = torch.Generator().manual_seed(0)
    return [[1] * count, [0] * count, [0] * (count - 1) + [1], *(torch.rand(2, count, generator=draw) < 0.4).int().tolist()]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_peft_and_the_original_model_answer_as_we_do(original, tmp_path):
    for number, mask in enumerate(masks_of(original.pathways)):
        adapter, folder = adapter_of(original.pathways, mask), tmp_path / str(number)
        export_peft(original.pathways, adapter, folder)
        classifier = load_file(folder / "classifier.safetensors")
        with torch.no_grad():
            logits = original.features(folder) @ classifier["weight"].T + classifier["bias"]
            stacked = {key: w[None] for key, w in adapter.weights.items()}
            ours = original.pathways.forward(original.inputs[None], stacked, adapter.gates[None])[0]
        scale = max(1.0, float(ours.abs().max()))
        torch.testing.assert_close(logits / scale, ours / scale, rtol=0, atol=1e-5)


def test_what_comes_back_is_what_went_out(original, tmp_path):
    for number, mask in enumerate(masks_of(original.pathways)):
        adapter, folder = adapter_of(original.pathways, mask), tmp_path / str(number)
        export_peft(original.pathways, adapter, folder)
        again = import_peft(original.pathways, folder)
        assert torch.equal(again.gates, adapter.gates)
        assert (again.cost_weight, again.labels) == (0.1, 20)
        for p in adapter.gates.nonzero()[:, 0].tolist():
            for key in original.pathways.keys[p]:
                torch.testing.assert_close(again.weights[key], adapter.weights[key], rtol=1e-6, atol=1e-6)


@pytest.fixture
def exported(tmp_path):
    original = Original("bert", tmp_path)
    export_peft(original.pathways, adapter_of(original.pathways, [1, 0, 1, 0, 1]), tmp_path / "out")
    return original, tmp_path / "out"


def test_only_layers_that_are_on_are_in_the_checkpoint(exported):
    original, folder = exported
    config = json.loads((folder / "adapter_config.json").read_text())
    inside = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    assert config["target_modules"] == [f"encoder.layer.{i}.{name}" for i, name in itertools.product(range(2), inside)]
    assert original.pathways.names[:4] == ("layer0.attention", "layer0.ffn", "layer1.attention", "layer1.ffn")


def test_a_folder_in_use_is_left_alone(exported):
    original, folder = exported
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="not empty"):
        export_peft(original.pathways, adapter_of(original.pathways, [1] * 5), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_placements_and_models_of_our_own_are_refused(tmp_path):
    model = small_resnet(3, widths=(4,), image_size=8)
    side, lora = (make_pathways(placement, model, 2) for placement in ("side", "lora"))
    with pytest.raises(ValueError, match=r"PEFT knows no SidePathways.*--placement lora"):
        export_peft(side, adapter_of(side, [1, 1, 1]), tmp_path / "a")
    with pytest.raises(ValueError, match="ResNetBackbone is of no other library"):
        export_peft(lora, adapter_of(lora, [1, 1, 1]), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_is_no_export_or_of_another_model_is_refused(exported, tmp_path):
    original, folder = exported
    with pytest.raises(ArtefactError, match="holds no exported adapter"):
        import_peft(original.pathways, tmp_path / "nowhere")
    other = LoraPathways(PopulationModel(original.model.backbone, torch.randn(3, 32), torch.randn(3)), 4)
    with pytest.raises(ArtefactError, match="of another model"):
        import_peft(other, folder)
    with pytest.raises(ArtefactError, match="no plain LoRA of rank 2"):
        import_peft(LoraPathways(original.model, 2), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    with pytest.raises(ArtefactError, match="lora_alpha equal"):
        import_peft(original.pathways, folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ArtefactError, match="holds no exported adapter"):
        import_peft(original.pathways, folder)


def test_the_readme_needs_nothing_of_ours(exported):
    readme = (exported[1] / "README.md").read_text()
    assert "PeftModel.from_pretrained" in readme
    assert not {"dsa", "backbones", "serving"} & set(readme.replace("(", " ").split())


def test_the_readme_prepares_pictures_as_training_did(exported):
    original, folder = exported
    if not original.kind.startswith("resnet"):
        pytest.skip("reads texts")
    pictures = [Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=numpy.uint8))]
    lines = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith(("pixels", "images"))]
    names = {"pictures": pictures, "numpy": numpy, "torch": torch}
    exec("\n".join(lines), names)
    torch.testing.assert_close(names["images"], original.model.backbone.prepare(pictures))


@pytest.mark.parametrize("algorithm", ["fomaml", "anil"])
def test_a_served_user_is_exported_as_they_are_answered(real_data, tmp_path, algorithm):
    scenario = worlds.scenario("dsa/PopquornBert-v0", placement="lora", algorithm=algorithm, shrink=False)
    data, user = scenario.data, scenario.data.population.train[0]
    texts = data.population.items.take(user.support.inputs.tolist())
    with Personaliser(scenario, BySign(), RULES, tmp_path / "users.db") as served:
        served.enroll("u", texts, user.support.labels, 0.0)
        served.export("u", tmp_path / "u")
        answers = served.predict(["u"] * len(texts), texts)
    again = import_peft(data.pathways, tmp_path / "u")
    weights = {key: w.expand(1, *w.shape) for key, w in again.weights.items()}
    with torch.no_grad():
        logits = data.pathways.forward(data.pathways.model.backbone.prepare(texts)[None], weights, again.gates[None])[0]
    torch.testing.assert_close(logits, answers, rtol=1e-4, atol=1e-4)
    assert again.gates.any()


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("adapter_config.json", {"bias": "lora_only"}, "no plain LoRA"),
        ("adapter_config.json", {"alpha_pattern": {"query": 8}}, "no plain LoRA"),
        ("adapter_config.json", {"r": None}, "no plain LoRA|does not say"),
        ("dsa.json", {"version": 9}, "another version"),
    ],
)
def test_checkpoints_that_mean_more_than_we_read_are_refused(exported, file, change, said):
    original, folder = exported
    found = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps({name: value for name, value in found.items() if value is not None}))
    with pytest.raises(ArtefactError, match=said):
        import_peft(original.pathways, folder)


def test_layers_that_were_added_later_are_refused(exported):
    original, folder = exported
    file = folder / "adapter_model.safetensors"
    file.write_bytes(save(load(file.read_bytes()) | {"base_model.model.pooler.dense.lora_A.weight": torch.zeros(4, 32)}))
    with pytest.raises(ArtefactError, match="has no place among these pathways"):
        import_peft(original.pathways, folder)


def test_a_model_of_our_own_is_not_exported_and_nobody_who_is_not_enrolled(tmp_path):
    scenario = worlds.digits("lora").scenario
    with Personaliser(scenario, BySign(), RULES, tmp_path / "users.db") as served:
        user = scenario.data.population.train[0]
        served.enroll("u", user.support.inputs, user.support.labels, 0.1)
        with pytest.raises(ValueError, match="of no other library"):  # the digits' ResNet is ours
            served.export("u", tmp_path / "u")
        with pytest.raises(UnknownUserError):
            served.export("v", tmp_path / "v")
