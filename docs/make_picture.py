"""Make `images/report.png`, the README's picture: the top of the quickstart's report.

make quickstart
make picture          # needs chromium (apt-get install chromium)
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent
WIDTH, HEIGHT = 1200, 1460  # the verdict and the plots
LIMIT = 300_000  # bytes


def main() -> None:
    """Take the picture of the report named on the command line, or of the quickstart's."""
    report = Path(sys.argv[1] if len(sys.argv) > 1 else FOLDER.parent / "runs/quickstart/report.html").resolve()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or not report.exists():
        raise SystemExit(f"needs chromium on the PATH, and {report} (make quickstart)")
    with tempfile.TemporaryDirectory() as scratch:
        shot = Path(scratch, "report.png")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}"]
        subprocess.run([browser, *options, report.as_uri()], check=True, capture_output=True)
        target = FOLDER / "images" / "report.png"
        target.parent.mkdir(exist_ok=True)
        Image.open(shot).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE).save(target, optimize=True)
    print(f"{target.relative_to(FOLDER.parent)}: {target.stat().st_size / 1000:.0f} KB")
    assert target.stat().st_size < LIMIT, "too large for the repository: fewer colours or a smaller window"


if __name__ == "__main__":
    main()
