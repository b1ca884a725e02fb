"""The report's page in a real browser: it draws, asks the network for nothing, fits a phone, and is accessible."""

import json
import shutil
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from made_runs import make_plan, make_run
from playwright.sync_api import Browser, Page, sync_playwright

from fslora_jax.report.command import make_page, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
HOSTILE = "<script>window.broken = 1</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A study with every kind of figure: two tasks, two ratios, two seeds, one run not finished, one not begun."""
    folder = tmp_path_factory.mktemp("report")
    points = []
    for number, task in enumerate(("easy", HOSTILE)):
        for ratio in ("0.25", "1.0"):
            for seed in ("0", "1"):
                name = f"g/{number}_{ratio}_{seed}"
                points.append(
                    {"name": name, "grid": "g", "task": task, "federation.ratio": ratio, "seed": seed}
                )
                last = 0.6 + 0.1 * float(ratio) + 0.02 * int(seed)
                own = {"data.name": task, "federation.ratio": float(ratio), "seed": int(seed)}
                clock = {"clock/simulated_seconds": {1: 3.0, 2: 7.0}, "aggregation/error": {1: 0.2, 2: 0.1}}
                unfinished = 9 if number == 1 and ratio + seed == "1.01" else None
                run = make_run(
                    folder / "s" / name, (0.5, 0.6, last), rounds=unfinished, settings=own, **clock
                )
                held = (
                    {"client": c, "examples": 5, "k": 2, "accuracy": 0.1 * c, "loss": 0.5} for c in range(9)
                )
                (run / "clients.jsonl").write_text("".join(json.dumps(record) + "\n" for record in held))
    points.append({"name": "g/later", "grid": "g", "task": "easy", "federation.ratio": "2.0", "seed": "0"})
    page, _, _ = make_page([make_plan(folder / "s", points, question=f"Is {HOSTILE} worth it?")], None)
    write_page(folder / "report.html", page)
    return folder / "report.html"


@pytest.fixture
def open_page(browser, report):
    """Opens the report at a width; at the end nothing was complained of, and nothing but the file was asked for."""
    contexts, complaints, asked = [], [], []

    def opened(width: int = 1200, scheme: str = "light") -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        page.wait_for_selector("figure .panel svg")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert set(asked) == {report.as_uri()}


def test_every_figure_is_drawn_and_no_text_runs(open_page):
    page = open_page()
    figures = page.locator("figure[data-chart]")
    names = figures.evaluate_all("all => all.map(figure => figure.dataset.chart)")
    assert set(names) == {
        *("learning", "final", "differences", "by_ratio", "aggregation", "clients", "resources", "shares"),
    }
    for figure in figures.all():
        sizes = figure.locator(".view:not([hidden]) .plot svg").evaluate_all(
            "all => all.map(svg => [...svg.querySelectorAll('path, rect, line')].filter(x => {"
            "  const box = x.getBBox(); return box.width + box.height > 3; }).length)"
        )
        assert sizes and min(sizes) > 2, figure.get_attribute("id")
    assert page.evaluate("window.broken") is None
    assert page.locator("h1").inner_text() == f"Is {HOSTILE} worth it?"


def test_the_legend_hides_the_axis_changes_and_hovering_tells(open_page):
    page = open_page()
    figure = page.locator("#figure-learning")
    shown = figure.locator(".view:not([hidden])")
    panel = shown.locator(".panel").first
    curves = panel.locator("[data-part=line]:visible")
    assert (shown.count(), curves.count()) == (1, 2)
    button = shown.get_by_role("button", name="ratio 1.0")
    button.click()
    assert (curves.count(), button.get_attribute("aria-pressed")) == (1, "false")
    button.click()
    assert curves.count() == 2
    assert panel.locator("[data-part=x-label]").text_content() == "rounds"
    for text in ("simulated seconds", "MB uploaded, all clients"):
        figure.get_by_role("radio", name=text).check()
        assert shown.count() == 1
        assert panel.locator("[data-part=x-label]").text_content() == text
    figure.locator("select").select_option("train/loss")
    assert panel.locator("[data-part=y-label]").text_content() == "training loss"
    drawing = panel.locator("svg")
    drawing.focus()
    drawing.press("ArrowRight")
    tip = panel.locator(".tip")
    by_key = tip.text_content().split("\n")
    assert by_key[1:3] == ["training loss: 1 (1 to 1)", "MB uploaded, all clients: 1"]
    box, (x, y) = (
        drawing.bounding_box(),
        (float(drawing.locator(".spot").get_attribute(c)) for c in ("cx", "cy")),
    )
    scale = box["width"] / float(drawing.get_attribute("viewBox").split()[2])
    drawing.blur()
    assert tip.text_content() == ""
    page.mouse.move(box["x"] + scale * x, box["y"] + scale * y)
    assert tip.text_content().split("\n")[1:] == by_key[1:]  # of equal points whichever comes first


def test_a_table_sorts_by_its_columns_and_downloads(open_page):
    page = open_page()
    head = page.locator("#table-runs th", has_text="final")
    column = head.evaluate("th => th.cellIndex")

    def values() -> list[str]:
        return page.locator(f"#table-runs td:nth-child({column + 1})").all_inner_texts()

    head.locator("button").click()
    found = [float(text) for text in values() if text]
    assert (head.get_attribute("aria-sort"), found) == ("ascending", sorted(found))
    head.locator("button").press("Enter")
    assert [float(text) for text in values() if text] == sorted(found, reverse=True)
    assert values()[-1] == ""
    with page.expect_download() as download:
        page.get_by_role("link", name="Download runs as CSV").click()
    assert download.value.suggested_filename == "runs.csv"
    assert len(download.value.path().read_text().splitlines()) == 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_it_fits_and_is_accessible(open_page, width, scheme):
    page = open_page(width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found] == []


def test_print_is_light_and_without_controls(open_page):
    page = open_page(scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".controls").first.is_visible()
    assert page.locator("figure .panel svg").first.is_visible()
