"""Build the wheel, install it with its core dependencies in a fresh environment, and use it as new users do:

    python tools/check_wheel.py [--keep FOLDER]

Runs README's Python examples in their order, the help of every command, which needs no PyTorch, and the
commands `evaluate demo`, `encode`, `info`, `decode`, `tokenize`, `verify`, `train` and `run train`, outside
the repository, and streams the tokens. Needs 8 GB and some minutes.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "evaluate": ("evaluate", "demo"),
    "encode": ("encode", "cat.png", "cat-file.bits"),
    "info": ("info", "cat-file.bits"),
    "decode": ("decode", "cat-file.bits", "decoded.png", "--scales", "6"),
    "tokenize": ("tokenize", "demo", "--images", "held-out", "--folder", "tokens/", "--size", "128"),
    "verify": ("verify", "tokens/"),
    "train": ("train", "smoke", "--folder", "runs/smoke"),
    "run": ("run", "train", "--set", "folder=runs/notebook"),
    "run evaluate": ("run", "evaluate", "--set", "codec_rates=[]", "--set", "resolutions=[64]"),
}
WRITTEN = ("cat-file.bits", "decoded.png", "tokens/manifest.json", "runs/smoke/tokenizer/config.json",
           "runs/notebook/train.ipynb", "runs/evaluate/evaluate.ipynb")
HELP = """
import sys
from contextlib import redirect_stdout, suppress
from io import StringIO

from bitvae.cli import COMMANDS, main

for name in COMMANDS:
    with redirect_stdout(StringIO()) as printed, suppress(SystemExit):
        main([name, "--help"])
    assert printed.getvalue().startswith(f"usage: bitvae {name} "), name
assert "torch" not in sys.modules, "help imports PyTorch"
"""
STREAM = """
from bitvae.token_dataset import TokenDataset
from bitvae.token_streaming import ShardOrder

tokens = TokenDataset("tokens/")
assert sorted(ShardOrder(tokens)) == [*range(len(tokens))]
"""


def run(*command: str | Path, **options) -> None:
    start = time.monotonic()
    print("$", *command, flush=True)
    subprocess.run([*map(str, command)], check=True, **options)
    print(f"# {time.monotonic() - start:.0f} s", flush=True)


def readme_examples() -> list[str]:
    "Return README's Python examples, without those of the section about optional packages."
    text = re.sub(r"(?ms)^## With other libraries.*?(?=^## )", "", (ROOT / "README.md").read_text())
    return re.findall(r"(?ms)^```python\n(.*?)^```", text)


def install(folder: Path) -> Path:
    "Build the wheel and install it in a fresh environment; return the folder of its commands."
    copy = folder / "source"  # a build writes into its source folder
    skipped = (".git", ".venv", "runs", "_docs", "_proc", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*skipped))
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    pip = python, "-m", "pip", "--quiet", "--disable-pip-version-check"
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder / "wheels", copy)
    run(*pip, "install", *(folder / "wheels").glob("bitvae-*.whl"))
    run(python, "-m", "pip", "--disable-pip-version-check", "check")
    return python.parent


def use(bin_folder: Path, work: Path) -> None:
    "Run the examples and the commands in an empty folder."
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    options = {"cwd": work, "env": env | {"MPLBACKEND": "agg"}}
    work.mkdir(exist_ok=True)
    cat = "from bitvae.images import held_out_photographs as f; import shutil; shutil.copy(f()[1], 'cat.png')"
    run(bin_folder / "python", "-c", cat, **options)
    run(bin_folder / "python", "-c", HELP, **options)
    for name, arguments in COMMANDS.items():
        print(f"## {name}")
        run(bin_folder / "bitvae", *arguments, **options)
    if missing := [file for file in WRITTEN if not (work / file).exists()]:
        sys.exit(f"not written: {', '.join(missing)}")
    run(bin_folder / "python", "-c", STREAM, **options)
    examples = "\n".join(readme_examples())
    main = "\n".join(f"    {line}" for line in examples.splitlines())
    (work / "readme.py").write_text(f"if __name__ == '__main__':  # loaders start processes\n{main}\n")
    run(bin_folder / "python", "readme.py", **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].rstrip(":"))
    parser.add_argument("--keep", type=Path, help="folder of the environment; kept, and used again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        commands = folder / "venv" / "bin"
        use(commands if (commands / "bitvae").exists() else install(folder), folder / "work")
    print("the wheel serves a new user")


if __name__ == "__main__":
    main()
