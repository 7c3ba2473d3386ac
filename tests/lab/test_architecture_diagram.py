"""The SVG of a model: valid XML with the right boxes in the right order."""

import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")

from architectures import small

from lab import anatomy, architecture_diagram


@pytest.mark.parametrize("name", ["gpt2", "vaswani", "palm", "bloom", "glm130b"])
def test_the_diagram_is_valid_and_names_the_modules(name, architecture):
    config = architecture(name)
    stats = anatomy.module_stats(config, batch=2, tokens=8)
    root = ElementTree.fromstring(architecture_diagram.draw_svg(stats, config, 2, 8))
    texts = [element.text for element in root.iter() if element.text]
    assert {"attention", "MLP", "output layer", "token embedding", "2 layers"} <= set(texts)
    order = [text for text in texts if text in ("attention", "MLP", "norm")]
    assert order[0] == ("attention" if config.norm_place != "pre" and not config.embd_norm else "norm")


def test_ngrams_have_a_box():
    config = small(ngram_max=4, ngram_rows=500)
    stats = anatomy.module_stats(config, batch=2, tokens=8)
    texts = [element.text for element in ElementTree.fromstring(
        architecture_diagram.draw_svg(stats, config, 2, 8)
    ).iter()]  # fmt: skip
    assert "n-gram embeddings" in texts
    assert f"3 x 500 x {config.n_embd}, added: 2 to 4 tokens" in texts
