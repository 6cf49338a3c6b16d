"""A real headless browser: an installed one, or the Chromium of the npm package @sparticuz/chromium, cached once."""

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

PACKAGE = "@sparticuz/chromium@147.0.0"
OPTIONS = ["--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader"]


def find_chromium() -> str:
    """Path of a browser. Skips the test if there is none and npm is missing too."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return shutil.which(name)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "transformers_unicode2"
    target = cache / PACKAGE.replace("/", "-")
    if not target.is_dir():
        if not shutil.which("npm"):
            pytest.skip("There is no Chromium here, and no npm to fetch one.")
        fetch_chromium(cache, target)
    return str(target / "chromium")


def fetch_chromium(cache: Path, target: Path) -> None:
    import brotli

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=work, check=True, capture_output=True)
        made = Path(work) / "made"
        made.mkdir()
        with tarfile.open(next(Path(work).glob("*.tgz"))) as package:
            for name in ("chromium", "swiftshader.tar"):
                content = brotli.decompress(package.extractfile(f"package/bin/{name}.br").read())
                if name.endswith(".tar"):
                    tarfile.open(fileobj=io.BytesIO(content)).extractall(made, filter="data")
                else:
                    (made / name).write_bytes(content)
                    (made / name).chmod(0o755)
        try:
            made.rename(target)
        except OSError:
            # Another process was faster.
            shutil.rmtree(made)


@contextmanager
def open_page(file: Path):
    """Opens a local file; yields the page with the lists of its errors and of the URLs that it requested."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=OPTIONS)
        page, errors, asked = browser.new_page(viewport={"width": 1200, "height": 1000}), [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        yield page, errors, asked
        browser.close()
