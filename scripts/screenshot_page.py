"""Takes the picture of a routing page that the docs show, with whichever Chromium is installed.

    raymoe eval out/demo --data examples/heldout.jsonl --limit 4 --html page.html
    python scripts/screenshot_page.py page.html                               # docs/routing-page.png
    python scripts/screenshot_page.py page.html --output dark.png --dark --size 1200x3400

The browser runs headless in a profile of its own that is deleted afterwards, and loads nothing but the page.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome", "microsoft-edge")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
)
LIMIT_BYTES = 400_000
TIMEOUT_S = 120


def find_browser() -> str:
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise SystemExit(f"no browser found (looked for {', '.join(BROWSERS)}); on Debian: apt-get install chromium")


def take(browser: str, page: Path, output: Path, size: str, *, dark: bool) -> None:
    """Write the top of the page, `size` is WIDTHxHEIGHT in pixels, as PNG."""
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        window = [f"--user-data-dir={profile}", f"--window-size={size.replace('x', ',')}"]
        command = [browser, *QUIET, *theme, *window, f"--screenshot={output.resolve()}", page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode or not output.exists():
        raise SystemExit(f"{browser} took no picture:\n{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="HTML file")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/routing-page.png")
    parser.add_argument("--size", default="1200x2400", help="WIDTHxHEIGHT in pixels, from the top of the page")
    parser.add_argument("--dark", action="store_true", help="as a reader with a dark theme sees it")
    arguments = parser.parse_args()
    if not arguments.page.is_file():
        raise SystemExit(f"{arguments.page}: there is no such file")
    arguments.output.unlink(missing_ok=True)
    take(find_browser(), arguments.page, arguments.output, arguments.size, dark=arguments.dark)
    size = arguments.output.stat().st_size
    print(f"{arguments.output}: {size / 1e3:.0f} kB")
    if size > LIMIT_BYTES:
        raise SystemExit(f"larger than {LIMIT_BYTES / 1e3:.0f} kB: choose a smaller --size")


if __name__ == "__main__":
    main()
