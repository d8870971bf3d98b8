"""A page in a real browser: it is drawn, it folds, and no name in it runs."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from lazy_orbax.inspection.html import html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
@pytest.mark.parametrize("policy", ["default-src 'none'", "default-src *"])
def test_a_browser_draws_the_page_and_runs_nothing(runs, tmp_path, policy):
    page = tmp_path / "page.html"
    # Even a script that somebody put into the page does not run, unless the page allows it.
    probe = "<script>document.title='ran'</script>"
    content = html(runs / "evil").replace("</body>", f"{probe}</body>")
    allowed = policy == "default-src *"
    if allowed:
        content = content.replace("default-src 'none'", "default-src * 'unsafe-inline'")
    page.write_text(content)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,800"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    title = "ran" if allowed else str(runs / "evil")
    assert f"<title>{title}</title>" in done.stdout
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in done.stdout
    assert done.stdout.count("<details") >= 2
