"""The report in a browser: nothing overflows, nothing is asked for, everyone can read it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import adapter, low_rank_update
from hostile_names import NAMES, hostile_adapters
from planted_sweep import sweep  # noqa: F401  (a fixture)

from lora_analysis.adapter import Adapter
from lora_analysis.bases import open_base
from lora_analysis.report import write_report
from lora_analysis.studies import study
from lora_analysis.text import printable

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SIZES = {"desktop": (1280, 900), "phone": (360, 740)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install it")
    with driver.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(
    sweep: list[Adapter],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A report of everything, and one of two adapters that share nothing, with long names."""
    rng = np.random.default_rng(3)
    weights = {f"{name}.weight": rng.standard_normal((48, 40)) for name in sweep[0]}
    folder = tmp_path_factory.mktemp("pages")
    full = study(sweep, base=open_base(weights), draws=2)
    strangers = [
        Adapter(dict(adapter(rng, modules=1)), label="a" * 90),
        Adapter({"x.q": low_rank_update(rng, name="x.q")}, label="<b>"),
    ]
    command = "lora-analysis report " + "x" * 300
    return {
        "full": write_report(full, folder / "full", figures=()),
        "strangers": write_report(
            study(strangers), folder / "strangers", figures=(), command=command
        ),
    }


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
@pytest.mark.parametrize("name", ["full", "strangers"])
def test_a_report_fits_asks_for_nothing_and_can_be_read_by_everyone(
    browser: Any, pages: dict[str, Path], name: str, size: str, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    requests: list[str] = []
    messages: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) <= 0
    assert [url for url in requests if not url.startswith("data:")] == [pages[name].as_uri()]
    assert not messages
    found = axe.Axe().run(page)
    told = [f"{one['id']}: {one['nodes'][0]['html'][:120]}" for one in found.response["violations"]]
    assert not told
    page.close()


def test_a_printed_report_shows_its_tables_whole(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["full"].as_uri())
    page.emulate_media(media="print")
    style = "getComputedStyle(document.querySelector('.scroll')).overflowX"
    assert page.evaluate(style) == "visible"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.close()


def test_names_of_strangers_run_nothing_and_ask_for_nothing(browser: Any, tmp_path: Path) -> None:
    adapters = hostile_adapters(np.random.default_rng(5))
    title = "".join(NAMES)
    path = write_report(study(adapters), tmp_path, figures=("svg",), title=title, command=title)
    page = browser.new_page()
    told: list[str] = []
    page.on("request", lambda request: told.append(request.url))
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("dialog", lambda dialog: told.append(dialog.message))
    pictures = sorted((tmp_path / "figures").iterdir())
    for place in (path, *pictures):
        page.goto(place.as_uri())
        told = [one for one in told if one != place.as_uri() and not one.startswith("data:")]
        assert not told
        elements = (
            "document.querySelectorAll('script, img, iframe, [onload], [onerror], a[href^=j]')"
        )
        assert page.evaluate(f"{elements}.length") == 0
        assert page.title() != "owned"
    page.goto(path.as_uri())
    assert printable("".join(NAMES)) in page.inner_text("body")
    page.close()
