"""A person at the panel: notebook 03 in JupyterLab, driven through a real browser (`make browser`).

Skipped where Chromium, Playwright or JupyterLab is missing; screenshots, in a wide and a narrow
window, are left in results/demo/browser to be looked at.
"""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path(os.environ.get("RESULTS_DIR") or ROOT / "results") / "demo"
SHOTS = DEMO / "browser"
WIDE, NARROW = dict(width=1280, height=1400), dict(width=560, height=1000)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]
SETTINGS = {  # no cell may leave the page when it scrolls out of view
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}'}
# The runs of the demo take seconds: while the file exists each step waits, so one can be stopped
SLOW = """
import os, time, torch
_step = torch.optim.SGD.step
def step(self, closure=None):
    time.sleep(0.8 if os.path.exists(os.environ["SLOW"]) else 0)
    return _step(self, closure)
torch.optim.SGD.step = step
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the project; gives its address and its folder."""
    home = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "weights"):
        shutil.copytree(ROOT / name, home / name)
    shutil.copy(ROOT / "utils.py", home)
    if DEMO.exists():  # after `make demo` Run all finds its runs
        shutil.copytree(DEMO, home / "results/demo", ignore=shutil.ignore_patterns("browser"))
    for name, text in SETTINGS.items():
        path = home / "config/lab/user-settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    startup = home / "ipython/profile_default/startup/slow.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(SLOW)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    env = os.environ | dict(PRESET="demo", SLOW=str(home / "slow"),
                            IPYTHONDIR=str(home / "ipython"),
                            JUPYTER_CONFIG_DIR=str(home / "config"),
                            RESULTS_DIR=str(home / "results"))
    env["DATA_DIR"] = str(Path(env.get("DATA_DIR") or ROOT / "data").absolute())
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
         "--IdentityProvider.token=", f"--ServerApp.root_dir={home}",
         f"--LabApp.workspaces_dir={home / 'workspaces'}"],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address, home
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(lab, tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, args=FLAGS,
            viewport=WIDE)
        page = browser.pages[0]
        page.set_default_timeout(240_000)  # of a busy machine
        yield page
        browser.close()


def shoot(page, name: str):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def cell(page, code: str):
    """The code cell whose source is exactly `code`."""
    return page.locator(".jp-CodeCell").filter(has=page.locator(
        ".jp-InputArea-editor .cm-content", has_text=re.compile(rf"^{re.escape(code)}$")))


def wait_idle(page, seconds: int):
    """Until every cell that was queued has run: none shows [*]."""
    page.wait_for_function(
        """() => ![...document.querySelectorAll('.jp-InputPrompt')]
                 .some(p => p.textContent.includes('*'))""", timeout=1000 * seconds)


def choose(page, label: str, option: str):
    """Changes a choice as one does without a mouse: by Tab from the first button, and Space."""
    row = page.locator(".widget-toggle-buttons").filter(has_text=label)
    row.get_by_role("button").first.focus()
    while page.evaluate("document.activeElement.textContent").strip() != option:
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    row.locator("button.mod-active").filter(has_text=re.compile(f"^{option}$")).wait_for()


def picture(page, name: str):
    """The picture of a run whose alternative text matches."""
    return page.get_by_role("img", name=re.compile(name)).first


def stored_config(home: Path, begins: str, rounds: int) -> dict:
    """The configuration of a stored run of so many rounds whose name begins so."""
    paths = sorted(home.glob(f"results/demo/{begins}*.json"))
    configs = [json.loads(path.read_text("utf-8"))["config"] for path in paths]
    return next(config for config in configs if config["num_rounds"] == rounds)


def test_a_person_at_the_panel(lab, page):
    try:
        sit_at_the_panel(page, *lab)
    except Exception:
        shoot(page, "failed")
        raise


def sit_at_the_panel(page, address: str, home: Path):
    page.goto(f"{address}/lab/tree/notebooks/03_noniid_grid.ipynb")
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
    page.get_by_text("Python 3", exact=False).first.wait_for()
    shoot(page, "1_opened")

    # Run all
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    run_cell = cell(page, "chosen_run.run()")
    page.get_by_role("status").filter(has_text="rounds stored").wait_for()
    wait_idle(page, 900)
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").filter(
        has_text="Traceback").count() == 0
    status = page.get_by_role("status").filter(has_text="rounds stored")
    rounds = int(re.search(r"(\d+) rounds stored", status.inner_text()).group(1))
    # other sections train for longer: the panel offers this many rounds
    skewed = stored_config(home, "fedavg_nc1_J4_dense", rounds)
    whole = f"{rounds} of {rounds} rounds stored"
    nothing = f"0 of {rounds} rounds stored, will run {rounds}"
    assert f"{whole}, nothing to run" in status.inner_text()
    status.scroll_into_view_if_needed()
    shoot(page, "2_run_all")

    # choose by keyboard: the line follows, nothing runs
    before = len(list(home.glob("results/**/*.json")))
    choose(page, "Classes a client, Nc", "1")
    status.filter(has_text=nothing).wait_for()
    choose(page, "Learning rate", f"{skewed['lr']:g}")
    status.filter(has_text=whole).wait_for()
    picture(page, rf"Validation accuracy of fedavg_nc1_J4\S* .*at round {rounds}$").wait_for()
    page.get_by_label("Seed").fill("7")
    page.keyboard.press("Tab")
    status.filter(has_text=nothing).wait_for()
    assert len(list(home.glob("results/**/*.json"))) == before
    status.scroll_into_view_if_needed()
    shoot(page, "3_chosen")

    # run: a picture grows; stop midway
    (home / "slow").touch()
    run_cell.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")
    picture(run_cell, "at round 1$").wait_for()
    shoot(page, "4_running")
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name="Interrupt Kernel").click()
    wait_idle(page, 240)
    assert "Run this again to go on from here" in run_cell.inner_text()
    assert "KeyboardInterrupt" not in run_cell.inner_text()
    stopped = status.inner_text()
    done = int(re.search(rf"(\d) of {rounds} rounds stored, will run", stopped).group(1))
    assert 1 <= done < rounds
    status.scroll_into_view_if_needed()
    shoot(page, "5_stopped")

    # run again: it goes on to the end
    (home / "slow").unlink()
    run_cell.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")
    status.filter(has_text=f"{whole}, nothing to run").wait_for()
    wait_idle(page, 240)
    picture(run_cell, f"at round {rounds}$").wait_for()
    status.scroll_into_view_if_needed()
    shoot(page, "6_continued")
    page.locator(".widget-vbox").first.screenshot(path=SHOTS / "panel.png")

    # a narrow window: nothing of the panel lies outside
    page.set_viewport_size(NARROW)
    page.keyboard.press("Control+b")  # hides the list of files
    status.scroll_into_view_if_needed()
    shoot(page, "7_narrow")
    panel = page.locator(".widget-vbox").first
    wide = panel.evaluate("p => [p.scrollWidth, p.clientWidth]")
    assert wide[0] <= wide[1] + 1
