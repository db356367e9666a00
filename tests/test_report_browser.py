"""The report in headless Chromium: what a reader does, and what then stands on the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from browser import CHROMIUM, Page, browser
from fake_run import write_pictures, write_prediction, write_run

from stexp.reporting.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def new_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Page]]:
    with browser(tmp_path_factory.mktemp("profile")) as new:
        yield new


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "x", names=(HOSTILE, 'a"b&c'))
    write_pictures(folder)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def truth(run: Path) -> ad.AnnData:
    predictions = ad.read_h5ad(run / "predictions.h5ad")
    return predictions[(predictions.obs["section"] == "B1").to_numpy()].copy()


@pytest.fixture
def page(new_page: Callable[[], Page], run: Path) -> Iterator[Page]:
    page = new_page()
    page.size(1400, 1000)
    page.open(run / "report.html")
    yield page
    assert page.said == [] and page.js("document.documentElement.dataset.error ?? ''") == ""
    page.close()


def text(page: Page, selector: str) -> str:
    return page.js(f"document.querySelector({selector!r}).textContent")


def drawn(page: Page, canvas: str) -> str:
    """What a canvas shows, once it shows it."""
    page.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.js(f"document.getElementById({canvas!r}).toDataURL()")


def place(page: Page, spot: int, canvas: str = "left") -> tuple[float, float]:
    """Where a spot lies on the screen."""
    x, y = page.middle(f"#{canvas}")
    away = f"state.section.xy[2 * {spot} + k] - state.view['xy'[k]]"
    dx, dy = page.js(f"[0, 1].map(k => ({away}) * state.view.zoom)")
    return x + dx, y + dy


def column(page: Page, number: int) -> list[str]:
    return page.js(f"[...$('table').tBodies[0].rows].map(row => row.cells[{number}].textContent)")


def test_it_opens_with_the_best_gene_that_varies_and_hostile_names_do_nothing(page: Page, truth: ad.AnnData) -> None:
    layers = [np.nan_to_num(truth.layers[key]) for key in ("observed", "predicted")]
    spread = [values.std(axis=0) for values in layers]
    varies = np.all([each >= np.median(each) for each in spread], axis=0)
    best = next(name for name in column(page, 0) if varies[truth.var_names.get_loc(name)])
    assert text(page, "#about-gene").startswith(f"{best} in section B1: Pearson ")
    assert len(column(page, 0)) == 120 and HOSTILE in column(page, 0)
    assert page.js("document.querySelectorAll('script').length") == 2 + page.js(
        "document.querySelectorAll('script[type=\"text/plain\"]').length"
    )


def test_only_the_script_of_the_report_may_run(new_page: Callable[[], Page], run: Path) -> None:
    page = new_page()
    page.open(run / "report.html")
    page.js(
        "{ const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s); }"
    )
    assert page.js("window.ran ?? 0") == 0
    assert any("Content Security Policy" in line for line in page.said)
    page.close()


def test_a_gene_that_is_searched_is_shown(page: Page, truth: ad.AnnData) -> None:
    before = drawn(page, "left"), drawn(page, "right")
    page.click(*page.middle("#gene"))
    page.type("gene77")
    page.key("Enter")
    page.wait("$('gene').value === 'GENE77'")
    assert text(page, "#about-gene").startswith("GENE77 in section B1: Pearson ")
    assert drawn(page, "left") != before[0] and drawn(page, "right") != before[1]
    for side, layer in (("left", "observed"), ("right", "predicted")):
        values = truth[:, "GENE77"].layers[layer]
        assert float(text(page, f"#{side}-low")) == pytest.approx(values.min(), abs=0.006)
    page.js("showGene('no such gene')")
    assert text(page, "#about-gene") == "no such gene is not among the 120 genes"


def test_a_spot_that_is_clicked_tells_of_itself(page: Page, truth: ad.AnnData) -> None:
    spot = 100
    page.click(*place(page, spot))
    page.wait("!$('spot').hidden")
    obs, gene = truth.obs.iloc[spot], page.js("$('gene').value")
    assert text(page, "#spot-name") == f"Spot {obs['spot']}"
    facts = dict(
        zip(
            page.js("[...$('spot-facts').querySelectorAll('dt')].map(e => e.textContent)"),
            page.js("[...$('spot-facts').querySelectorAll('dd')].map(e => e.textContent)"),
            strict=True,
        )
    )
    assert facts["Section"] == "B1 · patient B"
    words = facts[gene].replace(",", "").split()
    assert float(words[1]) == pytest.approx(float(truth[spot, gene].layers["observed"].item()), abs=0.03)
    assert float(words[3]) == pytest.approx(float(truth[spot, gene].layers["predicted"].item()), abs=0.03)

    names = truth.uns["references"].index[truth.obsm["neighbours"][spot]]
    shown = page.js("[...$('neighbours').querySelectorAll('b')].map(e => e.textContent)")
    assert shown == [name.replace(":", " ") for name in names]
    weight = truth.obsm["neighbour_weights"][spot, 0]
    assert f"{100 * weight:.1f}% of the weight" in text(page, "#neighbours li")

    predicted = truth.layers["predicted"]
    z = (predicted[spot] - predicted.mean(axis=0)) / predicted.std(axis=0)
    top = page.js("[...$('top').querySelectorAll('tbody button')].map(e => e.textContent)")
    assert set(top[:3]) <= set(truth.var_names[np.argsort(-z)[:6]])
    # the tile is the image around the spot: its colours are those of the image there
    page.wait("sheet instanceof ImageBitmap")
    drawn(page, "tile")
    mean = page.js(
        "(() => { const c = $('tile'), m = [0, 0, 0];"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "for (let i = 0; i < d.length; i++) if (i % 4 < 3) m[i % 4] += d[i] / (d.length / 4); return m; })()"
    )
    x, y = (truth.obsm["spatial"][spot] / 10).round().astype(int)
    around = truth.uns["spatial"]["B1"]["images"]["hires"][y - 11 : y + 11, x - 11 : x + 11]
    assert mean == pytest.approx(around.reshape(-1, 3).mean(axis=0), abs=10)


def test_the_table_sorts_and_filters(page: Page) -> None:
    page.click(*page.middle("#table th[data-key=gene] button"))
    names = column(page, 0)
    assert names == page.js(f"{names!r}.sort((a, b) => a.localeCompare(b))")
    page.click(*page.middle("#table th[data-key=spearman] button"))
    for direction in ("descending", "ascending"):
        assert page.js("document.querySelector('#table [aria-sort]').ariaSort") == direction
        shown = column(page, 2)
        assert shown[-1] == "–"  # no value: last, either way
        numbers = [float(value) for value in shown if value != "–"]
        assert numbers == sorted(numbers, reverse=direction == "descending") and len(numbers) == 119
        page.click(*page.middle("#table th[data-key=spearman] button"))
    page.click(*page.middle("#filter"))
    page.type("ene10")
    assert sorted(column(page, 0)) == ["GENE10", *(f"GENE10{i}" for i in range(10))]
    page.click(*page.middle("#table tbody tr:nth-child(2)"))
    page.wait("$('gene').value === $('table').tBodies[0].rows[1].dataset.gene")


def test_both_maps_zoom_and_finer_cells_come(page: Page) -> None:
    finest = "state.section.slide.levels.at(-1).cells.some(cell => cell.bitmap)"
    before, zoom = drawn(page, "right"), page.js("state.view.zoom")
    assert not page.js(finest)
    x, y = page.middle("#left")
    page.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=-1500)
    page.wait(f"state.view.zoom > 5 * {zoom}")
    page.wait(finest)
    assert drawn(page, "right") != before
    middle = page.js("state.view.x")
    page.drag(x, y, x + 60, y)
    assert page.js("state.view.x") == pytest.approx(middle - 60 / page.js("state.view.zoom"), rel=1e-6)
    assert page.js("state.chosen") == -1  # a drag is no click


def test_keys_are_enough(page: Page, truth: ad.AnnData) -> None:
    page.js("$('left').focus()")
    zoom = page.js("state.view.zoom")
    page.key("+")
    assert page.js("state.view.zoom") == pytest.approx(1.3 * zoom)
    page.key("0")
    assert page.js("state.view.zoom") == pytest.approx(zoom)
    page.key("Enter")
    first = page.js("state.chosen")
    page.key("ArrowRight", shift=True)
    page.key("ArrowDown", shift=True)
    moved = truth.obs[["array_x", "array_y"]].to_numpy()[[first, page.js("state.chosen")]]
    assert (moved[1] - moved[0]).tolist() == [1, 1]
    page.key("Escape")
    assert page.js("$('spot').hidden")


def test_scales_are_what_they_say(page: Page) -> None:
    def limits() -> list[str]:
        page.js("choose()")
        return [text(page, f"#{side}-{end}") for side in ("left", "right") for end in ("low", "high")]

    page.js("showGene('GENE9')")
    own = limits()
    assert own[:2] != own[2:]
    page.js("$('scale').value = 'same'")
    assert limits()[:2] == limits()[2:]
    page.js("$('scale').value = 'all'")
    first = limits()
    page.js("showSection(1)")
    assert limits() == first
    page.js("$('scale').value = 'fixed'; $('from').value = 1; $('to').value = 2")
    assert limits() == ["1.00", "≥ 2.00"] * 2


def test_the_uncertain_fade_but_not_what_was_observed(page: Page) -> None:
    before = {side: drawn(page, side) for side in ("left", "right")}
    page.click(*page.middle("#fade"))
    assert drawn(page, "left") == before["left"] and drawn(page, "right") != before["right"]


@pytest.mark.parametrize("width", [420, 800])
def test_nothing_reaches_beyond_a_narrow_screen(page: Page, width: int) -> None:
    page.size(width, 900)
    page.js("chooseSpot(3)")
    assert page.js("document.documentElement.scrollWidth") <= width


LUMINANCE = """(() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const inks = [...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill)
    .concat([...document.querySelectorAll('h1, p, td, th, dt, dd, a, small, label')]
      .map(e => getComputedStyle(e).color));
  return [paper, Math.min(...inks.map(colour => ratio(light(colour), paper)))];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_labels_are_readable_in_light_and_dark(page: Page, run: Path, scheme: str) -> None:
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.js("chooseSpot(3)")
    paper, contrast = page.js(LUMINANCE)
    assert (paper > 0.9) if scheme == "light" else (paper < 0.02)
    assert contrast >= 4.5  # WCAG 2.2, level AA
    inks = page.js("['soft', 'line', 'method', 'zero'].map(ink)")
    assert len(set(inks)) == 4 and all(colour.startswith("#") for colour in inks)


def test_a_run_without_pictures_or_neighbours_opens(new_page: Callable[[], Page], tmp_path: Path) -> None:
    page = new_page()
    page.open(write_report(write_run(tmp_path / "x", spots=40, genes=5, retrieval=False)))
    page.js("showSection(1).then(() => chooseSpot(3))")
    assert page.js("$('neighbours').hidden && !$('spot').hidden && $('fade') === null")
    assert page.said == []
    page.close()


def test_a_prediction_shows_what_it_is_not_sure_of(new_page: Callable[[], Page], tmp_path: Path) -> None:
    page, folder = new_page(), write_prediction(tmp_path / "slide", genes=30)
    page.size(1400, 1000)
    page.open(write_report(folder))
    assert page.js("[$('left-shows').value, $('right-shows').value]") == ["predicted", "uncertainty"]
    predictions = ad.read_h5ad(folder / "predictions.h5ad")
    spread = predictions.layers["predicted"].std(axis=0)
    best = predictions.var["expected_pearson"][spread >= np.median(spread)].idxmax()
    assert text(page, "#about-gene").startswith(f"{best}: Pearson to expect 0.")
    page.click(*place(page, 100))
    page.wait("!$('spot').hidden")
    assert page.js("$('scatter-figure').hidden && !$('spot-facts').textContent.includes('observed')")
    page.click(*page.middle("#table th[data-key=sd] button"))
    deviations = [float(value) for value in column(page, 7)]
    assert deviations == sorted(deviations, reverse=True)
    assert page.said == []
    page.close()
