"""Notebooks driven from a test: in a kernel alone, or as a person does it, in a real JupyterLab in a real browser.

    with Lab(folder) as lab, lab.open("a.ipynb", "1 + 1") as page:
        page.run(0)
        page.text(0)  # "2"

Clicks are those of a mouse. Cells are run by JupyterLab's own command, which tells when it is done; a key that is pressed
while the page is still settling gets lost.
"""
from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60  # seconds that anything may take on a machine that is busy otherwise
SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # it would lie over pictures
            "apputils-extension/sessionDialogs": {"skipKernelRestartDialog": True},
            "docmanager-extension/plugin": {"autosave": False}}


def _outside() -> dict:
    "The environment of a kernel: the package that is tested, and no word of pytest, which would turn off what ipykernel captures."
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} | {"PYTHONPATH": str(ROOT)}


def notebook(*sources: str) -> list[str]:
    "The cheap level, without a browser: what these cells say in a real kernel, or their errors. They are kept as out.ipynb."
    code = """
import sys, warnings; warnings.simplefilter("ignore")
import nbformat, json
from nbclient import NotebookClient
nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in json.load(sys.stdin)])
NotebookClient(nb, timeout=60, kernel_name="python3", allow_errors=True, extra_arguments=["--IPKernelApp.log_level=40"]).execute()
nbformat.write(nb, "out.ipynb")"""
    subprocess.run([sys.executable, "-c", code], input=json.dumps(sources), text=True, check=True, env=_outside())
    found = []
    for cell in nbformat.read("out.ipynb", 4).cells:
        parts = [output.get("text") or output.get("data", {}).get("text/plain") or "\n".join(output.get("traceback", [])) for output in cell.outputs]
        found.append("".join(parts).strip())
    return found


def find_chromium() -> str:
    if path := shutil.which("chromium"): return path
    pytest.fail("chromium is not installed; on Debian: apt-get install chromium", pytrace=False)


class Lab:
    "A JupyterLab server on a folder, with nothing of this person's, and a browser that looks at it: its own, or that of another Lab."

    def __init__(self, folder: Path, beside: Lab | None = None):
        self.folder, self._own = Path(folder), Path(tempfile.mkdtemp(prefix="trainbook-lab-"))
        self._server = self._playwright = self.tab = None
        self.browser = beside and beside.browser  # Playwright runs once in a process
        try:
            self._start_server()
            if not self.browser: self._start_browser()
            self.tab = self.browser.new_page(viewport={"width": 1280, "height": 900})
            self.tab.set_default_timeout(PATIENCE * 1000)
            self._wait_for_server()
            self.tab.goto(f"{self.url}/lab")
            self.tab.wait_for_function("() => window.jupyterapp?.restored.then(() => true)")
        except BaseException:
            self.close()
            raise

    def _start_browser(self) -> None:
        chromium = find_chromium()
        from playwright.sync_api import sync_playwright
        self._playwright = sync_playwright().start()
        self.browser = self._playwright.chromium.launch(executable_path=chromium, args=["--disable-gpu", "--disable-quic", "--disable-sync"])

    def _start_server(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", self._own/"log"
        for name, values in SETTINGS.items():
            file = self._own/f"settings/@jupyterlab/{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython",
                  "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
        env = _outside() | {name: str(self._own/place) for name, place in places.items()}
        words = {"ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.port_retries": 0, "ServerApp.root_dir": self.folder,
                 "IdentityProvider.token": "", "LabApp.news_url": "", "LabApp.expose_app_in_browser": True}
        root = ["--allow-root"] if os.getuid() == 0 else []
        with open(self.log, "w") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab", "--no-browser", *root, *(f"--{key}={value}" for key, value in words.items())],
                env=env, stdout=log, stderr=log)

    def _wait_for_server(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try: return urllib.request.urlopen(self.url + "/api/status", timeout=1).close()
            except OSError: time.sleep(0.05)
            if self._server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"JupyterLab did not start: {self.log.read_text()[-3000:]}")

    def open(self, name: str, *cells: str) -> Page:
        "A notebook: a new one of these cells, or one that is there."
        if cells:
            book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
            book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
            nbformat.write(book, self.folder/name)
        return Page(self, name)

    def close(self) -> None:
        if self.tab: self.tab.close()
        if self._playwright:  # the browser is its own
            if self.browser: self.browser.close()
            self._playwright.stop()
        if self._server:
            self._server.terminate()  # it ends its kernels
            try: self._server.wait(20)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        shutil.rmtree(self._own, ignore_errors=True)

    def __enter__(self) -> Lab: return self
    def __exit__(self, *error) -> None: self.close()


class Page:
    "A notebook that is open in JupyterLab. Its cells are counted from 0."

    def __init__(self, lab: Lab, name: str):
        self.tab, self.file = lab.tab, lab.folder/name
        self.command("docmanager:open", path=name)
        self._ready()

    def _ready(self) -> None:
        "The kernel answers. What the page itself calls idle may be a kernel that is not started yet."
        self.tab.wait_for_function("""() => {
            const context = window.jupyterapp?.shell.currentWidget?.sessionContext, kernel = context?.session?.kernel;
            return context?.isReady && kernel?.connectionStatus === "connected" && kernel.status === "idle";
        }""")

    # --- what a person does -----------------------------------------------------------------------

    def command(self, name: str, **words) -> None:
        "One of JupyterLab's commands, to its end."
        self.tab.evaluate("([name, words]) => jupyterapp.commands.execute(name, words).then(() => null)", [name, words])

    def begin(self, cell: int | None = None) -> None:
        "Runs a cell, or all of them, and does not wait."
        self.tab.evaluate("""cell => {
            const command = cell === null ? "notebook:run-all-cells" : "notebook:run-cell";
            if (cell !== null) jupyterapp.shell.currentWidget.content.activeCellIndex = cell;
            window.busy = true;
            jupyterapp.commands.execute(command).finally(() => window.busy = false);
        }""", cell)

    def wait(self, seconds: float = PATIENCE) -> None:
        "Until what was begun has ended."
        self.tab.wait_for_function("() => !window.busy", timeout=seconds * 1000)

    def run(self, cell: int | None = None, seconds: float = PATIENCE) -> str:
        "Runs a cell, or all of them, to the end; the text that it shows."
        self.begin(cell)
        self.wait(seconds)
        return "" if cell is None else self.text(cell)

    def click(self, label: str) -> None: self.tab.locator(".jp-OutputArea button", has_text=label).click()

    def stop(self) -> None:
        "JupyterLab's stop button."
        self.tab.locator(".jp-NotebookPanel-toolbar [data-command='notebook:interrupt-kernel']").click()

    def restart_kernel(self) -> None:
        self.command("notebook:restart-kernel")
        self._ready()

    def save(self) -> None: self.command("docmanager:save")

    def reload(self) -> None:
        "The page anew, as with F5; the kernel lives on."
        self.tab.reload()
        self._ready()

    def theme(self, name: str) -> None:
        "light or dark."
        self.command("apputils:change-theme", theme=f"JupyterLab {name.title()}")
        self.tab.locator("#jupyterlab-splash").wait_for(state="detached")

    # --- what a person sees -----------------------------------------------------------------------

    def output(self, cell: int):
        "What a cell shows, as Playwright's Locator."
        return self.tab.locator(".jp-Notebook .jp-CodeCell").nth(cell).locator(".jp-Cell-outputArea")

    def bar(self, cell: int): return self.output(cell).locator("progress")

    def text(self, cell: int) -> str:
        "What a cell says."
        self.output(cell).scroll_into_view_if_needed()  # what is out of sight is not laid out, and has no text
        return "\n".join(self.output(cell).locator(".jp-OutputArea-output:visible").all_inner_texts()).strip()

    def until(self, cell: int, text: str, seconds: float = PATIENCE) -> None:
        "Waits until a cell says this."
        end = time.monotonic() + seconds
        while text not in (said := self.text(cell)):
            if time.monotonic() > end: raise AssertionError(f"after {seconds:g} s cell {cell} does not say {text!r}, but {said!r}")
            self.tab.wait_for_timeout(100)

    def picture(self, path: Path, cell: int | None = None) -> None:
        "A screenshot of the page, or of what a cell shows."
        (self.tab if cell is None else self.output(cell)).screenshot(path=path)

    def close(self) -> None:
        "The notebook and its kernel."
        self.tab.evaluate("async () => { const p = jupyterapp.shell.currentWidget; await p.sessionContext.shutdown(); p.dispose(); }")

    def __enter__(self) -> Page: return self
    def __exit__(self, *error) -> None: self.close()
