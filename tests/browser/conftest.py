import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import SETTLED, required


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium."""
    chromium = required("Chromium", shutil.which("chromium") or shutil.which("chromium-browser"))
    driver = required("Chromium's driver", shutil.which("chromedriver"))
    try:
        from selenium import webdriver
    except ImportError:
        required("selenium", None)
        raise
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for switch in (*switches.split(), "disable-component-update", "disable-sync", "disable-dev-shm-usage"):
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture
def page(browser: Any, link: str) -> Any:
    """The browser of a user who has visited this server before."""
    browser.get(f"{link.partition('#')[0]}version")
    for key, value in SETTLED.items():
        browser.execute_script("localStorage.setItem(arguments[0], arguments[1])", key, value)
    return browser


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("RELORA_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
