"""The report in a browser: the viewer by keyboard, offline, on wide and on narrow screens."""

import base64
import io
import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from run_folders import NASTY_CASE, VALUES, make_run

from medmoco.report import write_report
from medmoco.report.run_folder import MODEL_FOLDERS
from medmoco.report.viewer import COLOURS, DIFFERENCES

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--proxy-server=127.0.0.1:9"),  # nobody listens there
)
MODELS = list(MODEL_FOLDERS)
REQUEST = "Network.requestWillBeSent"
# Colour and opacity in the middle of every pixel of the mask of panel arguments[0].
MIDDLES = """
const canvas = document.querySelectorAll(".panel canvas")[arguments[0]];
const [rows, columns] = arguments[1], step = canvas.height / rows;
const all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
return Array.from({length: rows * columns}, (_, i) => {
  const y = Math.floor(i / columns), x = i % columns;
  const at = 4 * (Math.floor((y + 0.5) * step) * canvas.width + Math.floor((x + 0.5) * step));
  return Array.from(all.slice(at, at + 4));
});
"""


def missing(reason: str) -> None:
    """Skips, or fails where MEDMOCO_REQUIRE_BROWSER=1 says that there is a browser."""
    if os.environ.get("MEDMOCO_REQUIRE_BROWSER") == "1":
        pytest.fail(f"MEDMOCO_REQUIRE_BROWSER=1, but {reason}")
    pytest.skip(f"no browser: {reason}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, driven by its own driver; nothing is downloaded."""
    try:
        from selenium import webdriver
    except ImportError:
        missing("selenium is not installed: pip install -e '.[test]'")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        missing("chromium and chromedriver are not on the PATH: apt install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / 'a <b>"&')


@pytest.fixture(scope="module")
def page(run_folder) -> Path:
    return write_report([run_folder], run_folder.parent / "one.html")


@pytest.fixture
def opened(browser, page):
    return open_page(browser, page)


def open_page(browser, page: Path, width: int = 1280):
    metrics = {"width": width, "height": 760, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())
    wait(browser, "return !document.getElementById('viewer-slice').disabled")
    return browser


def wait(browser, condition: str) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(condition))


def find(browser, name: str):
    return browser.find_element("id", f"viewer-{name}")


def press(element, *keys: str) -> None:
    from selenium.webdriver.common.keys import Keys

    element.send_keys(*(getattr(Keys, key) for key in keys))


def slice_of(browser) -> int:
    """From 0, as the words beside the slider tell it."""
    words = find(browser, "slice").get_attribute("aria-valuetext")
    assert words == find(browser, "place").text
    assert words.startswith("slice ") and words.endswith(" of 9")
    return int(words.split()[1]) - 1


def painted(browser, panel: int, colours, shape=(24, 20)) -> np.ndarray:
    """Which of the colours, from 1, every pixel of a mask has; 0 where it has none."""
    pixels = np.array(browser.execute_script(MIDDLES, panel, shape))
    palette = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours])
    away = np.abs(pixels[:, None, :3] - palette).sum(axis=2)
    assert away.min(axis=1)[pixels[:, 3] > 0].max(initial=0) < 12
    return np.where(pixels[:, 3] > 0, 1 + away.argmin(axis=1), 0).reshape(shape)


def stack_of(run_folder: Path, model: str, case: str) -> np.ndarray:
    """Class indices of an RAS+ label map: row 0 anterior, column 0 the patient's right."""
    file = nibabel.load(run_folder / "predictions" / MODEL_FOLDERS[model] / f"{case}.nii.gz")
    values = np.asarray(file.dataobj)[::-1, ::-1].transpose(2, 1, 0)
    return np.searchsorted(VALUES, values)


def kept(run_folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    with np.load(run_folder / "predictions" / "cases.npz", allow_pickle=False) as file:
        return {
            str(c): (file[f"image_{i}"], file[f"truth_{i}"]) for i, c in enumerate(file["case"])
        }


def test_the_worst_case_comes_first_at_its_fullest_slice(opened, run_folder):
    option = opened.find_element("css selector", "#viewer-case option")
    assert option.text == 'case <b>"x"\\n<script>alert(1)&\\u202e: Dice 0.062'
    group = opened.find_element("css selector", "#viewer-case optgroup")
    assert group.get_attribute("label") == "worst, fine-tuned"
    _, truth = kept(run_folder)[NASTY_CASE]
    assert slice_of(opened) == (truth > 0).sum(axis=(1, 2)).argmax()


def test_pictures_and_masks_are_those_of_the_slice(opened, run_folder):
    image, truth = kept(run_folder)[NASTY_CASE]
    press(find(opened, "slice"), "HOME")
    for number in range(5):
        assert slice_of(opened) == number
        source = opened.find_element("css selector", ".panel img").get_attribute("src")
        content = base64.b64decode(source.removeprefix("data:image/webp;base64,"))
        shown = np.asarray(Image.open(io.BytesIO(content)).convert("L"), int)
        assert np.abs(shown - image[number]).mean() < 6
        assert (painted(opened, 0, COLOURS) == truth[number]).all()
        for panel, model in enumerate(MODELS, start=1):
            expected = stack_of(run_folder, model, NASTY_CASE)[number]
            assert (painted(opened, panel, COLOURS) == expected).all()
        press(find(opened, "slice"), "ARROW_RIGHT")
    assert truth[4].any() and not truth[0].any()


def test_differences_are_missed_added_and_another_class(opened, run_folder):
    find(opened, "difference").click()
    number = slice_of(opened)
    truth = kept(run_folder)[NASTY_CASE][1][number]
    for panel, model in enumerate(MODELS, start=1):
        predicted = stack_of(run_folder, model, NASTY_CASE)[number]
        expected = np.where(predicted == 0, 1, np.where(truth == 0, 2, 3)) * (predicted != truth)
        assert (painted(opened, panel, DIFFERENCES.values()) == expected).all()
        words = opened.find_elements("css selector", ".panel canvas")[panel].accessible_name
        names = [name for kind, name in enumerate(DIFFERENCES, start=1) if (expected == kind).any()]
        assert words.endswith(f"of 9: {', '.join(names) or 'nothing'}")
    assert (painted(opened, 0, COLOURS) == truth).all(), "the truth is shown as it is"
    assert find(opened, "contrast").is_displayed()


def test_masks_and_single_classes_turn_off_by_keyboard(opened, run_folder):
    canvases = opened.find_elements("css selector", ".panel canvas")
    assert all(canvas.is_displayed() for canvas in canvases)
    press(find(opened, "masks"), "SPACE")
    assert not any(canvas.is_displayed() for canvas in canvases)
    press(find(opened, "masks"), "SPACE")
    truth = kept(run_folder)[NASTY_CASE][1][slice_of(opened)]
    box = opened.find_element("css selector", ".about-case:not([hidden]) input[value='2']")
    assert (truth == 2).any() and box.accessible_name == "spleen <left>"
    press(box, "SPACE")
    assert (painted(opened, 0, COLOURS) == np.where(truth == 2, 0, truth)).all()


def test_choosing_another_case_shows_it_and_its_dice(opened, run_folder):
    press(find(opened, "case"), "END")
    chosen = find(opened, "case").get_property("selectedOptions")[0].text.split(":")[0]
    wait(opened, "return !document.querySelectorAll('.about-case')[5].hidden")
    about = opened.find_elements("css selector", ".about-case")
    assert [box.is_displayed() for box in about] == [False] * 5 + [True]
    scores = json.loads((run_folder / "summary.json").read_text())["finetune"]["dice_per_volume"]
    row = about[5].find_element("css selector", "tbody tr").text
    assert row.startswith("liver ") and f"{scores[chosen]['liver']:.3f}" in row
    truth = kept(run_folder)[chosen][1][slice_of(opened)]
    assert (painted(opened, 0, COLOURS) == truth).all()


def test_every_control_has_a_name_and_shows_the_focus(opened):
    named = {"case": "Case", "slice": "Slice", "masks": "masks", "classes": "classes"}
    for name, words in (named | {"difference": "difference to the truth"}).items():
        assert find(opened, name).accessible_name == words
    assert find(opened, "slice").aria_role == "slider"
    press(find(opened, "case"), "TAB")
    focused = [opened.switch_to.active_element]
    press(focused[0], "TAB")
    focused.append(opened.switch_to.active_element)
    assert [box.get_attribute("id") for box in focused] == ["viewer-slice", "viewer-masks"]
    style = "return getComputedStyle(document.activeElement).outline"
    assert "solid 2px" in opened.execute_script(style)
    names = [c.accessible_name for c in opened.find_elements("css selector", ".panel canvas")]
    assert names[0].startswith('truth, case <b>"x"\\n<script>alert(1)&\\u202e, slice ')
    assert "spleen <left>" in names[0]


def test_nothing_leaves_the_page_and_nothing_goes_wrong(opened, page):
    press(find(opened, "slice"), "ARROW_LEFT")
    find(opened, "difference").click()
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == REQUEST]
    assert page.as_uri() in asked
    assert {address for address in asked if not address.startswith("data:")} == {page.as_uri()}
    assert opened.get_log("browser") == []


def test_the_policy_stops_what_does_not_belong_to_the_page(browser, page):
    """And so the test before this one would see it."""
    injected = (
        "<script>document.title = 'script'</script><img src='http://127.0.0.1:9/a.png'>"
        "<img src='data:,' onerror=\"document.title = 'handler'\"><p style='color: red' id='red'>"
    )
    changed = page.with_name("changed.html")
    changed.write_text(page.read_text("utf-8").replace("</main>", injected + "</main>"), "utf-8")
    open_page(browser, changed)
    assert browser.title.endswith("medmoco report")
    assert browser.find_element("id", "red").value_of_css_property("color") != "rgba(255, 0, 0, 1)"
    refused = [
        e["message"] for e in browser.get_log("browser") if "Security Policy" in e["message"]
    ]
    assert len(refused) == 4


@pytest.mark.parametrize("several", [False, True])
def test_a_narrow_window_does_not_scroll_sideways(browser, page, run_folder, several):
    if several:
        other = make_run(run_folder.parent / "other", seed=1)
        page = write_report([run_folder, other], run_folder.parent / "two.html")
    open_page(browser, page, width=360)
    for box in browser.find_elements("css selector", "details"):
        browser.execute_script("arguments[0].open = true", box)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    for box in browser.find_elements("css selector", "#viewer select, #viewer input, .panel"):
        where = box.rect
        assert where["x"] >= 0 and where["x"] + where["width"] <= 360
    panels = browser.find_elements("css selector", ".panel")
    assert len(panels) == (9 if several else 5) and all(p.is_displayed() for p in panels)
    press(find(browser, "slice"), "HOME", "ARROW_RIGHT")
    assert slice_of(browser) == 1
