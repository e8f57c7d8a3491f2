"""Create the virtual environment of the project with nothing but the standard library.

Debian splits `ensurepip` off Python, so `python3 -m venv` may lack pip: then the machine's own pip installs into the
new environment, or, where there is none, one pinned pip wheel is fetched from the package index and its SHA-256 is
checked before use.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path
from urllib.parse import urljoin

PIP = "26.3"
PIP_SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"


def main() -> None:
    target = Path(sys.argv[1])
    if sys.version_info < (3, 11):  # noqa: UP036 (this file must be able to say so on an older Python)
        sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; set PYTHON=/path/to/python3.11")
    with_pip = importlib.util.find_spec("ensurepip") is not None
    venv.create(target, with_pip=with_pip, clear=True, symlinks=os.name != "nt")
    python = target / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if with_pip:
        return
    if importlib.util.find_spec("pip") is not None:
        subprocess.check_call([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", f"pip=={PIP}"])
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = _fetch_pip(Path(folder))
        subprocess.check_call([str(python), f"{wheel}/pip", "install", "-q", "--no-index", str(wheel)])


def _fetch_pip(folder: Path) -> Path:
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    request = urllib.request.Request(f"{index}/pip/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    name = f"pip-{PIP}-py3-none-any.whl"
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    url = next(urljoin(request.full_url, f["url"]) for f in files if f["filename"] == name)
    with urllib.request.urlopen(url, timeout=120) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != PIP_SHA256:
        sys.exit(f"{url} is not the pip {PIP} that this project pins: its SHA-256 differs")
    (folder / name).write_bytes(content)
    return folder / name


if __name__ == "__main__":
    main()
