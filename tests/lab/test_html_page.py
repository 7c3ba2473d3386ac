"""The lab's pages in a browser: no errors in the console, the 3D view rotates, tooltips appear."""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("plotly", reason="the pages need plotly")
pytest.importorskip("sklearn", reason="t-SNE and PCA need scikit-learn")
pytest.importorskip("selenium", reason="a browser is driven by selenium")

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from support import TrainSettings, make_text, run_training

from configurator import command
from fradique.training import loss_plot, outputs
from lab import attention, curves, embeddings, html_page, report, sampling, tokens

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver"
    ),
    pytest.mark.xdist_group("browser"),  # one browser for all tests
]
ERROR_LEVELS = ("SEVERE", "ERROR")
TIMEOUT = 300  # seconds for what takes one or two on a machine that is not busy


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=700,600"):
        options.add_argument(f"--{flag}")
    for flag in ("use-angle=swiftshader", "enable-unsafe-swiftshader"):  # WebGL without a graphics card
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")  # no network
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(TIMEOUT)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, data_dir):
    """The folder of a small run with snapshots and samples, and the lab's pages of it."""
    folder = tmp_path_factory.mktemp("pages") / "run"
    settings = replace(
        TrainSettings(),
        **{"out_dir": str(folder), "data_dir": str(data_dir), "dataset": "tiny", "device": "cpu"},
        **{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "compile": False},
        **{"max_iters": 20, "eval_interval": 5, "eval_iters": 2, "gradient_accumulation_steps": 1},
        **{"warmup_iters": 2, "sample_interval": 10, "snapshot_interval": 10},
    )
    with pytest.MonkeyPatch.context() as patch:  # no pictures, and short animations
        patch.setattr(outputs, "draw_loss_plot", lambda t: None)
        patch.setattr(tokens, "write_temperature_gif", lambda logits, order, labels, path: path.touch())
        patch.setattr(report, "MOVIE_SECONDS", 0.5)
        run_training(settings)
        text = make_text(3)[:14]
        for module, cls, options in (
            (curves, curves.CurveSettings, []),
            (attention, attention.AttentionSettings, [f"--start={text}"]),
            (tokens, tokens.TokenSettings, [f"--start={text}"]),
            (sampling, sampling.SamplingSettings, [f"--start={text[:4]}", "--tokens=30"]),
            (embeddings, embeddings.EmbeddingSettings, []),
            (report, report.ReportSettings, []),
        ):
            assert command(module.main, cls, [f"--out_dir={folder}", *options]) == 0
    return folder


def open_page(browser, path: Path):
    """Open a page and wait until its figures are drawn in the colors of the page."""
    browser.get(path.as_uri())
    script = """
        const color = getComputedStyle(document.documentElement).getPropertyValue('--text').trim();
        const figures = [...document.querySelectorAll('.js-plotly-plot')];
        return figures.every(d => d._fullLayout && d._fullLayout.font.color == color)"""
    wait_until(browser, lambda: browser.execute_script(script))
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    return browser


def wait_until(browser, condition):
    WebDriverWait(browser, TIMEOUT, poll_frequency=0.05).until(lambda _: condition())


def console_errors(browser):
    return [line for line in browser.get_log("browser") if line["level"] in ERROR_LEVELS]


PAGES = ["loss", "attention", "attention-3d", "tokens", "sampling", "embeddings", "report"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_no_errors_and_follows_the_color_scheme(browser, pages, name, scheme):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    open_page(browser, pages / f"{name}.html")
    assert not console_errors(browser)
    style = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    text, background = browser.execute_script(style)
    brightness = [sum(map(int, color[4:-1].split(","))) for color in (text, background)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")
    font_colors = browser.execute_script(
        "return [...document.querySelectorAll('.js-plotly-plot')].map(d => d._fullLayout.font.color)"
    )
    expected = {"light": "#1b1b1b", "dark": "#ececec"}[scheme]
    assert set(font_colors) <= {expected}
    for figure in browser.find_elements(By.CSS_SELECTOR, ".js-plotly-plot"):
        wait_until(browser, lambda figure=figure: is_drawn(figure))
    width = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(width) <= 0  # no horizontal scrolling


def is_drawn(figure):
    """Whether a figure is not blank: less than 99.5% of its pixels have the same color."""
    picture = Image.open(io.BytesIO(figure.screenshot_as_png)).convert("RGB")
    n_pixels = picture.width * picture.height
    n_most_frequent = max(count for count, _ in picture.getcolors(n_pixels))
    return n_most_frequent < 0.995 * n_pixels


def camera_position(browser):
    return browser.execute_script(
        "const d = [...document.querySelectorAll('.js-plotly-plot')].find(d => d._fullLayout.scene);"
        "return d._fullLayout.scene._scene.getCamera().eye"
    )


def test_the_3d_view_rotates_with_the_mouse(browser, pages):
    open_page(browser, pages / "attention-3d.html")
    before = camera_position(browser)
    scene = browser.find_element(By.CSS_SELECTOR, ".js-plotly-plot canvas")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", scene)
    drag = ActionChains(browser).move_to_element(scene).click_and_hold()
    for _ in range(5):
        drag = drag.move_by_offset(30, 10)
    drag.release().perform()

    def camera_has_moved():
        after = camera_position(browser)
        return sum(abs(before[axis] - after[axis]) for axis in "xyz") > 0.1

    wait_until(browser, camera_has_moved)
    assert not console_errors(browser)


def test_hovering_over_a_heat_map_shows_the_weight(browser, pages):
    open_page(browser, pages / "attention.html")
    plot = browser.find_element(By.CSS_SELECTOR, ".js-plotly-plot .nsewdrag")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    size = plot.size
    # below the diagonal, where weights are not masked
    ActionChains(browser).move_to_element_with_offset(
        plot, -int(0.2 * size["height"]), int(0.2 * size["height"])
    ).perform()

    def tooltip_shows_the_weight():
        labels = browser.find_elements(By.CSS_SELECTOR, ".hoverlayer .hovertext")
        tooltip = " ".join(label.text for label in labels)
        return "reads" in tooltip and ": 0." in tooltip

    wait_until(browser, tooltip_shows_the_weight)


def test_the_menu_selects_another_head(browser, pages):
    open_page(browser, pages / "attention.html")
    script = "return JSON.stringify(document.querySelector('.js-plotly-plot')._fullData[0].z)"
    values_before = browser.execute_script(script)
    browser.find_element(By.CSS_SELECTOR, ".updatemenu-header").click()
    browser.find_elements(By.CSS_SELECTOR, ".updatemenu-dropdown-button")[3].click()
    wait_until(browser, lambda: browser.execute_script(script) != values_before)
    assert not console_errors(browser)


def test_each_token_has_a_tooltip_with_its_score(browser, pages):
    open_page(browser, pages / "tokens.html")
    titles = [span.get_attribute("title") for span in browser.find_elements(By.CSS_SELECTOR, ".token")]
    assert len(titles) == 14 and all("probability" in title and "rank" in title for title in titles[1:])


def test_plotly_draws_tags_and_entities_as_text(browser, tmp_path):
    labels = ["<b>", "&lt;", "$x_1$", "<br>", "<a href='x'>", "%{x}", "<extra>"]
    groups = np.array([f"{label} & name of a group" for label in labels])
    names = [f"_run {label}" for label in labels]
    losses = {"loss": np.ones(2), "step": np.arange(2.0)}
    evaluated = {"train": np.ones(0), "val": np.ones(0)}
    weights = np.full((1, 1, 7, 7), 1 / 7)
    parts = [
        attention.heatmap_html(weights, labels, [(0, 0)]),
        embeddings.tokens_html(np.random.default_rng(0).normal(size=(7, 2)), labels, groups, "title"),
        curves.curves_html([loss_plot.LossCurves(name, losses, evaluated) for name in names]),
    ]
    path = tmp_path / "page.html"
    html_page.write_page(path, "<i>", parts)
    open_page(browser, path)
    for selector, expected in (
        (".xtick text", labels),
        (".textpoint text", labels),
        (".legendtext", [*groups, *(f"{name}: training batches" for name in names)]),
    ):
        elements = browser.find_elements(By.CSS_SELECTOR, selector)
        assert {element.get_attribute("textContent") for element in elements} >= set(expected), selector
    show_tooltips = (
        "Plotly.Fx.hover(document.querySelectorAll('.js-plotly-plot')[arguments[0]], arguments[1])"
    )
    browser.execute_script(show_tooltips, 0, {"xval": 0, "yval": 1})
    browser.execute_script(
        show_tooltips, 1, [{"curveNumber": i, "pointNumber": 0} for i in range(len(labels))]
    )

    def tooltips_are_shown():
        elements = browser.find_elements(By.CSS_SELECTOR, ".hovertext .nums, .hovertext .name")
        tooltips = {element.get_attribute("textContent") for element in elements}
        return tooltips >= {"&lt; reads <b>: 0.143", *labels, *groups}

    wait_until(browser, tooltips_are_shown)
    assert not console_errors(browser)
