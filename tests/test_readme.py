"""What the README shows must run."""

import re
from pathlib import Path

import pytest

from backbones import BACKBONES, make_backbone
from backbones.pathways import make_pathways

PAGE = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = {block.split("\n")[0]: block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S)}
"""By first line."""
PROSE = re.sub(r"```.*?```", "", PAGE, flags=re.S)


def test_the_python_example_trains_a_policy(capsys):
    code = BLOCKS["import envs  # registers the ids"].replace("dsa/DigitsResNet-v0", "dsa/Planted-v0").replace("20_000", "512")
    exec(code, {})
    assert capsys.readouterr().out.startswith("[[")


def test_the_backbone_example_has_five_pathways():
    try:
        exec(next(block for block in BLOCKS.values() if "mixer" in block), {})
        assert make_pathways("inline", make_backbone("mixer", classes=3)).num_pathways == 5
    finally:
        if "mixer" in list(BACKBONES):
            BACKBONES.unregister("mixer")


@pytest.mark.parametrize("target", re.findall(r"`make ([a-z-]+)`", PAGE))
def test_the_make_targets_exist(target):
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert f"\n{target}:" in makefile


@pytest.mark.parametrize("link", [x for x in re.findall(r"\]\(([^)#]+)\)", PROSE) if "://" not in x])
def test_the_links_lead_somewhere(link):
    assert (Path(__file__).parent.parent / link).exists()
