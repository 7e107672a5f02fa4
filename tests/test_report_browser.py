"""The report in Chromium: no errors, self-contained, sortable, comparable, with a dark mode, narrow on a phone."""

from __future__ import annotations

import base64
import io
import json
import shutil

import pytest
import torch
from PIL import Image
from test_report import EVIL, ROWS

from stepdistill.evaluation.records import Book
from stepdistill.evaluation.report import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs Chromium and its driver")
COLOURS = torch.randint(0, 256, (len(ROWS), 2, 3, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The file:// address of a report in which every image has its own colour."""
    path = tmp_path_factory.mktemp("bench")
    book = Book(path, {"protocol_hash": "abc123", "protocol": "tiny"})
    book.prompts([EVIL, "a cat"])
    for each, colours in zip(ROWS, COLOURS, strict=True):
        book.grid(each, colours.expand(2, 3, 8, 8))
        book.add(each)
    return write_report(path).as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.get("about:blank")
    driver.get_log("performance")  # requests of Chromium's own first page
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, page):
    """The page, freshly opened at desktop width in the light scheme."""
    dress(chromium, 1280, "light")
    chromium.get(page)
    return chromium


def dress(driver, width: int, scheme: str) -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def column(browser, name: str) -> list[str]:
    """The first table's column, from top to bottom."""
    return browser.execute_script(
        """const table = document.querySelector("table");
        const at = [...table.tHead.rows[0].cells].findIndex(head => head.textContent.startsWith(arguments[0]));
        return [...table.tBodies[0].rows].map(row => row.cells[at].firstChild.textContent || row.cells[at].textContent);
        """,
        name,
    )


def pixel(browser, x: float, y: float) -> list[int]:
    """The colour on the screen at these fractions of the stage's width and height."""
    stage = browser.execute_script(
        """const stage = document.querySelector(".stage");
        stage.scrollIntoView({ block: "center" });
        const { left, top, width, height } = stage.getBoundingClientRect();
        return [left, top, width, height];"""
    )
    shot = Image.open(io.BytesIO(base64.b64decode(browser.get_screenshot_as_base64()))).convert("RGB")
    return list(shot.getpixel((round(stage[0] + x * stage[2]), round(stage[1] + y * stage[3]))))


def choose(browser, side: int, text: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(browser.find_elements("css selector", "#comparer select")[side]).select_by_visible_text(text)


def colour(row: int, picture: int) -> list[int]:
    return COLOURS[row, picture].flatten().tolist()


def test_nothing_is_asked_for_and_nothing_goes_wrong(browser, page):
    browser.execute_script("document.querySelectorAll('button, details > summary').forEach(each => each.click())")
    assert browser.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"}
    assert page in asked and all(url == page or url.startswith("data:") for url in asked)
    # a script injected by a prompt has not run, and would be blocked
    browser.execute_script("document.body.append(Object.assign(document.createElement('script'), {text: 'evil = 1'}))")
    assert browser.execute_script("return typeof evil") == "undefined"
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]


def test_columns_sort_by_click_and_by_key_and_say_so(browser):
    from selenium.webdriver.common.keys import Keys

    first = column(browser, "FD")
    assert first == ["2.0", "100.0", "20.0", "30.0", "25.0", "24.0"]
    head = browser.find_element("xpath", "//table[1]//th[starts-with(., 'FD')]")
    button = head.find_element("css selector", "button")
    button.click()
    assert column(browser, "FD") == ["2.0", "20.0", "24.0", "25.0", "30.0", "100.0"]
    assert head.get_attribute("aria-sort") == "ascending"
    button.send_keys(Keys.ENTER)
    assert column(browser, "FD") == ["100.0", "30.0", "25.0", "24.0", "20.0", "2.0"]
    assert head.get_attribute("aria-sort") == "descending"
    button.send_keys(Keys.SPACE)
    assert column(browser, "FD") == first and head.get_attribute("aria-sort") is None
    # for a score the best is the highest; the real images, whose time is unknown, come last either way
    browser.find_element("xpath", "//table[1]//th[starts-with(., 'CLIP')]/button").click()
    assert column(browser, "CLIP")[:2] == ["31.00", "30.50"]
    for _ in range(2):
        browser.find_element("xpath", "//table[1]//th[starts-with(., 'ms')]/button").click()
        assert column(browser, "ms")[-1] == "–"
    assert len(browser.find_elements("css selector", "table:first-of-type th[aria-sort]")) == 1


def test_the_comparer_shows_the_two_chosen_and_the_slider_moves_between_them(browser):
    # initially: the teacher at its most steps on the left, and the best student on the right
    assert pixel(browser, 0.25, 0.8) == colour(2, 0) and pixel(browser, 0.75, 0.8) == colour(5, 0)
    choose(browser, 0, "teacher, 1 step")
    choose(browser, 1, "student <i>, 4 steps")
    assert [tag.text for tag in browser.find_elements("css selector", ".tag")] == [
        "teacher, 1 step",
        "student <i>, 4 steps",
    ]
    assert pixel(browser, 0.25, 0.8) == colour(1, 0) and pixel(browser, 0.75, 0.8) == colour(4, 0)
    assert browser.find_element("css selector", "blockquote").text == " ".join(EVIL.split())
    browser.find_elements("css selector", ".thumbs button")[1].click()
    assert pixel(browser, 0.25, 0.8) == colour(1, 1) and pixel(browser, 0.75, 0.8) == colour(4, 1)
    assert browser.find_element("css selector", "blockquote").text == "a cat"
    slider = browser.find_element("css selector", ".stage input")
    for value, expected in ((100, [1, 1]), (0, [4, 4]), (40, [1, 4])):
        browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", slider, value
        )
        assert [pixel(browser, x, 0.8) for x in (0.25, 0.75)] == [colour(row, 1) for row in expected]
    browser.find_element("css selector", ".swap").click()
    assert pixel(browser, 0.25, 0.8) == colour(4, 1)


def test_a_picture_of_the_grids_comes_up_in_the_comparer(browser):
    from selenium.webdriver.common.action_chains import ActionChains

    second = browser.find_element("css selector", '.row img[alt="=1+1, 4 steps, 2"]')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", second)
    ActionChains(browser).move_to_element(second).click().perform()
    assert pixel(browser, 0.75, 0.8) == colour(5, 1)
    assert browser.find_element("css selector", "blockquote").text == "a cat"


def test_tabs_show_every_figure_and_the_csv_is_handed_over(browser):
    panels = browser.find_elements("css selector", ".panel")
    assert [panel.is_displayed() for panel in panels] == [True, False, False, False]
    browser.find_element("xpath", "//label[.='All metrics']").click()
    assert [panel.is_displayed() for panel in panels] == [False, True, False, False]
    assert "7 prompts" in panels[1].text and "KID" in panels[1].text
    browser.find_element("xpath", "//label[.='Latency']").click()
    assert [panel.is_displayed() for panel in panels] == [False, False, False, True]
    text = browser.execute_script(
        "return atob(document.querySelector('a[download=\"results.csv\"]').href.split('base64,')[1])"
    )
    assert text.count("\r\n") == 1 + len(ROWS)


def test_the_page_is_light_by_day_and_dark_by_night_and_so_are_its_curves(browser, page):
    def brightness() -> list[float]:
        return browser.execute_script(
            """const of = (element, property) => {
              const parts = getComputedStyle(element)[property].match(/[0-9.]+/g).slice(0, 3).map(Number);
              return parts.reduce((sum, part) => sum + part, 0) / 765;
            };
            const text = [...document.querySelectorAll("svg text")].find(each => each.textContent.includes("by steps"));
            return [of(document.body, "backgroundColor"), of(document.body, "color"), of(text, "fill"),
                    of(document.querySelector("tbody th"), "backgroundColor")];"""
        )

    paper, ink, title, cell = brightness()
    assert paper > 0.9 and cell > 0.9 and ink < 0.2 and title < 0.2
    dress(browser, 1280, "dark")
    paper, ink, title, cell = brightness()
    assert paper < 0.15 and cell < 0.15 and ink > 0.8 and title > 0.8


def test_on_a_phone_nothing_is_wider_than_the_screen(browser, page):
    dress(browser, 390, "light")
    browser.get(page)
    tables = "return [...document.querySelectorAll('.scroll')].every(each => each.getBoundingClientRect().right <= 390)"
    tabs = browser.execute_script("return document.querySelectorAll('.tabs input').length")
    assert tabs == len(browser.find_elements("css selector", ".panel")) == 4  # the last, Latency, is the widest
    for tab in range(tabs):
        browser.execute_script("document.querySelectorAll('.tabs input')[arguments[0]].click()", tab)
        shown = [panel.is_displayed() for panel in browser.find_elements("css selector", ".panel")]
        assert shown == [number == tab for number in range(tabs)]
        assert browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [390, 390], tab
        assert browser.execute_script(tables), tab


def test_on_a_phone_the_choices_are_whole_and_plots_can_be_read(browser, page):
    dress(browser, 390, "light")
    browser.get(page)
    lefts = "return [...document.querySelectorAll('.pair select')].map(each => each.getBoundingClientRect().left)"
    first, second = browser.execute_script(lefts)
    assert first == second  # one below the other
    sizes = """return [...document.querySelectorAll('section > .plots svg')].map(svg =>
        svg.getBoundingClientRect().width / svg.viewBox.baseVal.width *
        Math.min(...[...svg.querySelectorAll('text')].map(text => parseFloat(getComputedStyle(text).fontSize))))"""
    assert min(browser.execute_script(sizes)) > 10.5


def test_an_odd_last_card_takes_the_whole_row(browser):
    for cards in ("section > .plots", ".cards"):
        script = f"""const all = document.querySelector('{cards}');
            all.append(all.firstElementChild.cloneNode(true));
            return [all.children.length, all.lastElementChild.getBoundingClientRect().width, all.clientWidth]"""
        count, last, whole = browser.execute_script(script)
        assert count % 2 == 1 and last == whole


def test_without_a_script_the_grids_and_tables_remain(browser, page):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page)
        assert not browser.find_element("id", "comparer").is_displayed()
        assert browser.find_element("css selector", "table").is_displayed()
        pictures = browser.find_elements("css selector", ".row img")
        assert len(pictures) == 2 * len(ROWS) and all(picture.is_displayed() for picture in pictures)
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
