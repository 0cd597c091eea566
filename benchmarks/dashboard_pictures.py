"""Pictures of Ray's dashboard during a run, for docs/operations.md: jobs, one job with its data, metrics.

python benchmarks/dashboard_pictures.py --submission-id masks-1 --output docs/pictures

Needs Debian's `chromium`, a Prometheus that reads the head's metrics (docs/metrics.md), and the head's token, as
`ray get-auth-token` prints it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH = 1400  # pixels
SETTLED_MS = 8_000  # pages ask the server every few seconds
COLOURS = 128
DATA = "Ray Data Overview"
GRAPH = "graph?g0.expr=sum by (worker) (rate(ray_everymask_images_total[1m]))&g0.tab=0&g0.range_input=10m"
PAGES = {  # place and height in pixels
    "ray-jobs": ("{dashboard}/#/jobs", 670),
    "ray-job": ("{dashboard}/#/jobs/{job}", 1150),
    "ray-metrics": ("{dashboard}/#/metrics", 190),
    "prometheus": ("{prometheus}/" + GRAPH, 900),
}


def take(dashboard: str, prometheus: str, job: str, output: Path) -> None:
    """Write one PNG for each of PAGES, as it looks now.

    Args:
        dashboard: Its address.
        prometheus: The address of one that reads the head's metrics.
        job: Submission id of a job that has a run in work.
        output: An existing folder.
    """
    ray = Path(sys.executable).parent / "ray"
    token = subprocess.run([ray, "get-auth-token"], check=True, capture_output=True, text=True).stdout.strip()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        context = browser.new_context()
        context.add_cookies([{"name": "ray-authentication-token", "value": token, "url": dashboard}])
        for name, (place, height) in PAGES.items():
            page = context.new_page()
            page.set_viewport_size({"width": WIDTH, "height": height})
            page.goto(place.format(dashboard=dashboard, prometheus=prometheus, job=job))
            page.wait_for_timeout(SETTLED_MS)
            if page.get_by_text(DATA).count():
                page.get_by_text(DATA).click()
                page.wait_for_timeout(SETTLED_MS)
                page.locator("tbody svg").first.click()  # the dataset's operators
                page.wait_for_timeout(SETTLED_MS)
            path = output / f"{name}.png"
            page.screenshot(path=path)
            page.close()
            with Image.open(path) as picture:
                picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dashboard", default="http://127.0.0.1:8265", help="its address")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address")
    parser.add_argument("--submission-id", required=True, help="a job that has a run in work")
    parser.add_argument("--output", type=Path, required=True, help="an existing folder")
    given = parser.parse_args()
    take(given.dashboard, given.prometheus, given.submission_id, given.output)


if __name__ == "__main__":
    main()
