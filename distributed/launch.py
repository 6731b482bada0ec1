"""Starts the Flower app, shows its log, and exits with nonzero status unless the run completed.

    python distributed/launch.py demo rule=least_sensitive --federation-config "num-supernodes=4"
    python distributed/launch.py lite classes_per_client=5 --superlink cluster

A preset, fields of `Config` as for train.py, then options of `flwr run`. Without --superlink (a
name from Flower's config.toml) the simulation engine runs on this machine, in a SuperLink that ends
with the run; the option above, with client-resources-num-gpus=1, gives each worker a GPU.
"""
import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

HERE = Path(__file__).resolve().parent


def flower(*args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["flwr", *args], text=True, **options)


def prepend(variable: str, folder: Path):
    """Puts a folder in front of those that an environment variable lists."""
    old = os.environ.get(variable)
    folders = [str(folder)] + ([old] if old else [])
    os.environ[variable] = os.pathsep.join(folders)


def search_paths():
    """Flower's commands call each other by name, and the app imports utils.py."""
    prepend("PATH", Path(sys.executable).parent)
    prepend("PYTHONPATH", HERE.parent)


def check_installed(simulated: bool):
    """Exits with the package to install where Flower, or its simulation engine, is missing."""
    missing = [name for name in ("flwr", "flower-superlink") if shutil.which(name) is None]
    if simulated and importlib.util.find_spec("ray") is None:
        missing.append("ray")
    if missing:
        sys.exit(f"{' and '.join(missing)} cannot be found: pip install \"flwr[simulation]>=1.41\"")


@contextmanager
def superlink(*options: str):
    """A SuperLink on a free port of this machine, which Flower knows as "own" meanwhile."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as home:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        Path(home, "config.toml").write_text(
            f'[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', encoding="utf-8")
        os.environ["FLWR_HOME"] = home
        process = subprocess.Popen(
            ["flower-superlink", "--insecure", "--port", str(port),
             "--disable-runtime-dependency-installation", *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):  # nonzero: nobody listens
                if process.poll() is not None:
                    raise RuntimeError(f"flower-superlink exited with {process.returncode}")
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()
            process.wait()


def last_json(text: str):
    """The JSON object that Flower prints, after whatever it says before."""
    return json.loads(text[text.index("{\n"):])


def launch(link: str, name: str, changes: list[str], options: list[str]) -> str:
    """Flower's word on how the run ended; "finished:completed" is the only good one."""
    config = f"preset={json.dumps(name)} config={json.dumps(shlex.join(changes))}"
    started = flower("run", str(HERE), link, "--run-config", config, "--format", "json", *options,
                     stdout=subprocess.PIPE)
    answer = last_json(started.stdout)
    if not answer["success"]:
        sys.exit(answer["error-message"])
    run_id = answer["run-id"]
    status = ""
    while not status.startswith("finished"):  # the log may break off before the run does
        flower("log", run_id, link, "--stream")
        listed = flower("ls", link, "--run-id", run_id, "--format", "json", stdout=subprocess.PIPE)
        status = last_json(listed.stdout)["runs"][0]["status"]
        time.sleep(1)
    return status


def main(name: str, *args: str):
    args = list(args)
    link = None
    if "--superlink" in args:
        i = args.index("--superlink")
        link = args[i + 1]
        del args[i:i + 2]
    options = [i for i, word in enumerate(args) if word.startswith("-")]
    first = options[0] if options else len(args)

    search_paths()
    check_installed(simulated=link is None)
    with nullcontext() if link else superlink("--simulation"):
        status = launch(link or "own", name, args[:first], args[first:])
    if status != "finished:completed":
        sys.exit(f"The run ended as {status}.")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
