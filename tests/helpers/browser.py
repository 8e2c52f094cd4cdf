"""A real headless Chromium for tests of the page."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--force-device-scale-factor=1",
    ),
)


def skip_without_browser() -> None:
    pytest.importorskip("selenium", reason="selenium is not installed (pip install selenium)")
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed (apt install chromium chromium-driver)")


@contextlib.contextmanager
def opened(
    page: Path, *, width: int = 1280, height: int = 900, dark: bool = False, touch: bool = False
) -> Iterator[Any]:
    """The page, opened from disk, as a selenium driver; offline, so that whatever it would fetch fails."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            if touch:
                driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
            features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            driver.get(page.resolve().as_uri())
            WebDriverWait(driver, 60).until(
                lambda d: d.execute_script("return document.querySelectorAll('.plot .scatterlayer .trace').length > 0")
            )
            yield driver
        finally:
            driver.quit()


def problems(driver: Any) -> list[str]:
    """What the console says of errors and warnings."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
