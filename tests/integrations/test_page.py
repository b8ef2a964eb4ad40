"""The page of `miga serve` in a real browser: a video is started, seen, steered, downloaded and replayed."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import SECONDS, Client, serving

from miga_engine import Engine
from miga_engine.video.reading import read_video

DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    DRIVER is None, reason="the page is tested in a browser: apt-get install chromium chromium-driver"
)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--window-size=1240,1000")  # fmt: skip
METHOD = {"zigzag_width": 2, "stage2_steps": 2, "guidance_frames": 1, "stride": 6, "judge_step": 2}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """Of a server of `tiny` that takes few steps, and asks for a token."""
    engine = Engine.from_pretrained("tiny")
    preset = engine.preset
    sampling = dataclasses.replace(preset.sampling, num_inference_steps=8)
    engine.preset = dataclasses.replace(preset, sampling=sampling, miga=dataclasses.replace(preset.miga, **METHOD))
    with serving(engine, tmp_path / "jobs", token="sesame") as client:
        yield Client(client.address, authorization="Bearer sesame")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        behaviour = {"behavior": "allow", "downloadPath": str(tmp_path / "downloads")}
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
        yield browser
    finally:
        browser.quit()


def _until(is_so: Callable[[], Any], what: str) -> Any:
    until = time.monotonic() + SECONDS
    while not (found := is_so()):
        assert time.monotonic() < until, what
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_a_video_is_started_seen_steered_downloaded_and_replayed(browser: Any, client: Client, tmp_path: Path) -> None:
    def part(name: str) -> Any:
        return browser.find_element("id", name)

    def script(text: str) -> Any:
        return browser.execute_script(f"return {text}")

    def is_narrow_enough() -> bool:
        metrics = {"width": 360, "height": 900, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        widths = script("[document.documentElement.scrollWidth, innerWidth]")
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        return widths == [360, 360]

    browser.get(f"{client.address}/")
    _until(lambda: part("token-asked").is_displayed(), "the page asks for the token")
    part("token").send_keys("sesame\n")
    _until(lambda: "tiny" in part("about").text, "the page says what is served")
    assert is_narrow_enough()

    # Everything has a name for those who do not see it, and is reached by keys.
    assert not script("[...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length).map(e => e.id)")
    assert not script("[...document.querySelectorAll('button')].filter(e => !e.textContent.trim()).map(e => e.id)")
    script("document.activeElement.blur()")
    browser.switch_to.active_element.send_keys("n")
    assert browser.switch_to.active_element == part("prompt")
    browser.switch_to.active_element.send_keys("a red balloon over snowy hills at dawn")
    for name, value in (("width", "48"), ("height", "32")):
        part(name).send_keys(value)
    part("endless").click()
    part("track").send_keys("\ue014" * 3)  # the right arrow
    assert part("track").get_attribute("aria-valuenow") == "36"
    part("track").send_keys("\ue012\n")
    assert browser.switch_to.active_element == part("put-text")
    assert part("put-frame").get_attribute("value") == "24"
    assert script("getComputedStyle(document.activeElement).boxShadow") != "none"
    part("put-text").send_keys("a red balloon over snowy hills at dusk\n")
    part("start").click()

    name = _until(lambda: script("state.job && state.job.id"), "a video is begun")
    assert client.job(name)["prompt"] == {
        "0": "a red balloon over snowy hills at dawn",
        "24": "a red balloon over snowy hills at dusk",
    }
    first = _until(lambda: script("$('video').currentTime"), "the video plays")
    _until(lambda: script("$('video').currentTime") > first + 0.3, "it goes on playing")
    assert script("[$('video').videoWidth, $('video').videoHeight]") == [48, 32]
    _until(lambda: script("state.points.drift.length && state.points.score.length"), "there are curves")

    part("put-text").send_keys("a red balloon over snowy hills at night")
    part("put-now").click()
    _until(lambda: "at night” shows from frame" in part("said").text, "the new prompt is taken up")
    (change,) = client.changed(name)
    marks = script("[...document.querySelectorAll('.mark:not(.waits)')].map(mark => mark.textContent)")
    assert marks[-1] == "a red balloon over snowy hills at night"
    client.begun(name, change["frame"] + 24)

    # Without a player for the stream, frames come over a WebSocket.
    browser.get(f"{client.address}/?frames")
    _until(lambda: browser.find_elements("css selector", "#jobs button"), "the video is listed")[0].click()
    shown = _until(lambda: script("state.shown"), "there are frames")
    _until(lambda: script("state.shown") > shown, "more frames")
    assert part("frames").is_displayed()
    assert script("new Set($('frames').getContext('2d').getImageData(0, 0, 48, 32).data).size") > 10

    browser.get(f"{client.address}/")
    _until(lambda: browser.find_elements("css selector", "#jobs button"), "the video is listed")[0].click()
    part("stop").click()
    count = client.ended(name, "cancelled")["num_frames_out"]
    _until(lambda: part("stop").text == "Go on", "the page knows that it has ended")
    part("download").click()
    saved = tmp_path / "downloads" / f"{name}.mp4"
    _until(saved.exists, "the video is downloaded")
    assert saved.read_bytes() == client.get(f"/v1/videos/{name}/content").body
    part("sheet").click()
    _until(lambda: part("sheet-shown").is_displayed(), "there is a contact sheet")
    assert script("$('sheet-canvas').width") > 4 * 48
    browser.switch_to.active_element.send_keys("\ue00c")  # Escape
    part("replay").click()
    again = _until(lambda: script(f"state.job.id != '{name}' && state.job.id"), "a replay is begun")
    assert client.ended(again)["num_frames_out"] == count
    made = read_video(saved)
    assert np.array_equal(client.frames(again, tmp_path), made)
    assert len(made) == count

    assert is_narrow_enough()
    hosts = script("[...new Set(performance.getEntries().map(e => e.name).filter(e => /^[a-z]+:\\/\\//.test(e)))]")
    assert all(host.startswith((client.address, "blob:")) for host in hosts)
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry for entry in errors if "401" not in entry["message"]] == []
