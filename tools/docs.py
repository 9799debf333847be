"""Write the documentation site: notebooks as they are, an API page for each module, glossary, gallery.

    python tools/docs.py [--out _docs]      # or: make docs

Runs no notebook: the pages show the outputs that the notebooks hold.
"""
import argparse
import ast
import base64
import html
import importlib
import inspect
import json
import logging
import os
import re
import shutil
import sys
import textwrap
import tokenize
from configparser import ConfigParser
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parent.parent
PAGES = {  # file of the repository: page
    "README.md": "overview.md",
    "nbs/index.ipynb": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/demo-tokenizer/README.md": "demo.md",
    "bitvae/assets/photographs/ATTRIBUTION.md": "photographs.md",
    "bitvae/assets/held_out/ATTRIBUTION.md": "held-out.md",
}
GALLERY = [  # notebook, number of its picture, what it shows
    ("41_gallery", 0, "A picture from the first scale to all of them, with its bits"),
    ("41_gallery", 1, "Bits, residual and reconstruction, scale by scale"),
    ("41_gallery", 2, "Binary spherical quantization: a vector and its code"),
    ("41_gallery", 3, "VQ, LFQ, FSQ and BSQ on the same latents"),
    ("41_gallery", 6, "Flipped bits, with and without correction by later scales"),
    ("41_gallery", 7, "Coarse scales of one image, fine scales of another"),
    ("41_gallery", 5, "One scale: its bits, and what it adds to the image"),
    ("41_gallery", 8, "How much the image changes when one bit flips"),
    ("41_gallery", 9, "Rate and distortion, with JPEG and WebP beside"),
    ("01_schedules", 2, "Scale schedules: any aspect ratio, coarse to fine"),
    ("16_teacher_forcing", 1, "What an autoregressive model sees: true, flipped, self-corrected"),
    ("viewer/24_app", 3, "The viewer: a click flips a bit"),
]
CSS = """
.md-typeset .gallery { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); }
.md-typeset .gallery > a { border: 1px solid var(--md-default-fg-color--lightest); border-radius: .3rem;
  padding: .6rem; color: inherit; display: flex; flex-direction: column; justify-content: space-between; }
.md-typeset .gallery > a:hover { border-color: var(--md-accent-fg-color); }
.md-typeset .gallery img { background: white; max-height: 12rem; margin: auto; object-fit: contain; }
.md-typeset .gallery span { display: block; margin-top: .5rem; font-size: .7rem; }
.md-typeset img { background: white; }
.md-typeset .math { overflow-x: auto; margin: 1em 0; }
.md-typeset pre > code { overflow-x: auto; }
.md-typeset .output > pre, .md-typeset .output .highlight > pre { margin-top: -.6em; }
.md-typeset .output code { background: none; border-left: .15rem solid var(--md-default-fg-color--lightest); }
.md-typeset .definition { scroll-margin-top: 4rem; }
.md-typeset table:not([class]) th { min-width: 3rem; }
.md-typeset td code { word-break: normal; }
.md-typeset math { font-family: "Latin Modern Math", "STIX Two Math", "Cambria Math", math; }
"""
CODE = re.compile(r"(^```.*?^```[ ]*$|^(?: {4}[^\n]*(?:\n|\Z))+|`[^`\n]+`)", flags=re.M | re.S)


def settings() -> dict[str, str]:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


CONFIG = settings()


def source(cell: dict) -> str:
    return "".join(cell["source"]).replace("GIT_URL", CONFIG["git_url"])  # as in tools/readme.py


def flags(cell: dict) -> set[str]:
    "Return a code cell's directives, such as export, hide or echo: false."
    return {re.sub(r"\s+", " ", flag) for flag in re.findall(r"^#\|\s*(.*?)\s*$", source(cell), flags=re.M)}


def page_of(file: str) -> str | None:
    "Return the page of a file of the repository, or None."
    if file in PAGES:
        return PAGES[file]
    if file.startswith("nbs/") and file.endswith(".ipynb") and (ROOT / file).exists():
        return "notebooks/" + file.removeprefix("nbs/").removesuffix(".ipynb") + ".md"
    return None


def relative(target: str, page: str) -> str:
    "Return the link from one page to another."
    return os.path.relpath(target, PurePosixPath(page).parent)


def resolve(link: str, file: str, page: str) -> str:
    "Return a link in a file of the repository as it is on the page made of that file."
    target, _, anchor = link.partition("#")
    if re.match(r"[a-z]+:", link):
        return link
    anchor = f"#{anchor.lower()}" if anchor else ""
    if not target:
        return anchor
    path = os.path.normpath(PurePosixPath(file).parent / target)
    if not (ROOT / path).exists():  # README's links, written from the root, in index.ipynb
        path = os.path.normpath(target)
    if made := page_of(path):
        return relative(made, page) + anchor
    if Path(path).suffix in (".png", ".jpg") and (ROOT / path).exists():
        return relative(f"files/{path}", page)
    return f"{CONFIG['git_url']}/blob/{CONFIG['branch']}/{path}"


def mathml(text: str) -> str:
    "Return Markdown with formulas as MathML, which browsers draw without a script."
    block = '\n<div class="math">{}</div>\n'
    text = re.sub(r"(?s)\$\$(.+?)\$\$", lambda m: block.format(convert(m[1].rstrip(",. "), "block")), text)
    return re.sub(r"\$(?! )([^$\n]+?)(?<! )\$(?!\d)", lambda m: convert(m[1]), text)


def markdown(text: str, file: str, page: str) -> str:
    "Return the Markdown of a file as Markdown of its page: links, formulas, tables and lists."
    picture = r'<img src="([^"]+)" width="(\d+)" alt="([^"]*)">'  # as tools/readme.py writes them
    text = re.sub(picture, r"![\3](\1){ width=\2 }", text)
    parts = CODE.split(text)
    for i in range(0, len(parts), 2):
        parts[i] = mathml(parts[i])
        parts[i] = re.sub(r"(?<=\]\()([^)\s]+)(?=\))", lambda m: resolve(m[1], file, page), parts[i])
    for i in range(1, len(parts), 2):
        target = names().get(parts[i].strip("`"))
        in_link = parts[i - 1].endswith("[") or parts[i + 1].startswith("](")
        if target and parts[i].startswith("`") and not in_link:
            parts[i] = f"[{parts[i]}]({relative(target, page)})"
    text = "".join(parts)
    for start in (r"\|", r"- ", r"\d+\. "):  # a table or list needs an empty line before it
        text = re.sub(rf"(?m)^((?!{start}|\s|>).+)\n(?={start})", r"\1\n\n", text)
    text = re.sub(r"(?m)^(#.*)\n(?=[^\n])", r"\1\n\n", text)
    return re.sub(r"(?m)^> (.*)$", r"*\1*{ .sentence }", text, count=1) if file.endswith(".ipynb") else text


@cache
def names() -> dict[str, str]:
    "Return the place on the API pages of every module, public function and class."
    found = {}
    for file in sorted((ROOT / "nbs").rglob("*.ipynb")):
        name = exported_to(json.loads(file.read_text())["cells"])
        if ".ipynb_checkpoints" in file.parts or not name:
            continue
        found[name] = f"api/{name}.md"
        module = importlib.import_module(name)
        for public in module.__all__:
            if callable(getattr(module, public)):
                found[public] = "" if public in found else f"api/{name}.md#{public}"
    return {name: place for name, place in found.items() if place}  # without names that occur twice


def exported_to(cells: list[dict]) -> str | None:
    "Return the module that the cells of a notebook are exported to."
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(map(source, cells)), flags=re.M)
    return found and f"bitvae.{found[1]}"


def fence(text: str, language: str = "text") -> str:
    ticks = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}\n"


class Notebook:
    "A notebook as a page, and the pictures of its outputs."

    def __init__(self, file: Path):
        self.file = file.relative_to(ROOT).as_posix()
        self.page = page_of(self.file)
        self.name = self.file.removeprefix("nbs/").removesuffix(".ipynb")
        self.cells = json.loads(file.read_text())["cells"]
        self.pictures: dict[str, bytes] = {}
        self.module = exported_to(self.cells)

    def output(self, out: dict, cell: dict) -> str:
        data = out.get("data", {})
        for mime in ("image/png", "image/jpeg"):
            if mime in data:
                ending = mime.partition("/")[2]
                path = f"files/{self.name}/{len(self.pictures)}.{ending}"
                self.pictures[path] = base64.b64decode("".join(data[mime]))
                width = out.get("metadata", {}).get(mime, {}).get("width")
                size = f" width={width}" if width else ""
                return f"![output]({relative(path, self.page)}){{ loading=lazy{size} }}\n"
        if "text/html" in data:
            return f"<div>{''.join(data['text/html'])}</div>\n"
        if "text/markdown" in data:
            return markdown("".join(data["text/markdown"]), "README.md", self.page) + "\n"
        text = "".join(out.get("text", data.get("text/plain", "")))
        return fence(re.sub(r"\x1b\[[0-9;]*m", "", text)) if text.strip() else ""

    def code(self, cell: dict) -> str:
        "Return a code cell and its outputs, without hidden parts."
        directives, text = flags(cell), re.sub(r"^#\|.*\n?", "", source(cell), flags=re.M).strip()
        if any(d.startswith("default_exp") for d in directives):
            return ""
        if "hide" in directives:
            title = "Imports of the examples" if "import " in text else "Hidden cell"
            return f"<details markdown><summary>{title}</summary>\n\n{fence(text, 'python')}\n</details>\n"
        anchors = ""
        if "export" in directives:
            names = re.findall(r"^(?:def|class) (\w+)|^([A-Z]\w*)(?:: .*)? = ", text, flags=re.M)
            anchors = "".join(f'<a class="definition" id="{a or b}"></a>' for a, b in names)
        parts = [anchors + "\n\n" if anchors else ""]
        if "echo: false" not in directives and text:
            parts.append(fence(text, "python"))
        outputs = [self.output(out, cell) for out in cell["outputs"]]
        if any(outputs):
            parts.append('<div class="output" markdown>\n\n' + "\n".join(outputs) + "\n</div>\n")
        return "\n".join(parts)

    def text(self) -> str:
        cells = [markdown(source(c), self.file, self.page) if c["cell_type"] == "markdown" else
                 self.code(c) if c["cell_type"] == "code" else "" for c in self.cells]
        title, _, rest = cells[0].partition("\n")
        links = [f"[source]({CONFIG['git_url']}/blob/{CONFIG['branch']}/{self.file})"]
        if self.module:
            links.insert(0, f"[API of `{self.module}`]({relative(f'api/{self.module}.md', self.page)})")
        return "\n\n".join([title, rest, " · ".join(links), *filter(None, cells[1:])]) + "\n"

    def title(self) -> str:
        return self.name.rpartition("/")[2]


def signature(obj: object, name: str) -> str:
    "Return `name(parameters) -> type` on one line, or on one per parameter if that is long."
    try:
        found = inspect.signature(obj)
    except (TypeError, ValueError):
        return name
    parameters = [p.replace(annotation=p.empty, default=p.empty) for p in found.parameters.values()]
    shown = []
    for bare, p in zip(parameters, found.parameters.values(), strict=True):
        default = "" if p.default is p.empty else f"={shorten(repr(p.default))}"
        shown.append(f"{bare}{default}" if p.name != "self" else "")
    shown = [s for s in shown if s]
    line = f"{name}({', '.join(shown)})"
    return line if len(line) < 90 else f"{name}(\n    " + ",\n    ".join(shown) + ")"


def shorten(text: str, limit: int = 60) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(text.split()))
    text = re.sub(r"/\S*/(?=bitvae/)", "", text)
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def comments(obj: object) -> dict[tuple[str, ...], str]:
    """Return the comments beside the parameters, or fields, and the result of a function or class.

    A comment describes all names on its line; the result's name is `return`.
    """
    text = textwrap.dedent(inspect.getsource(obj))
    tree = ast.parse(text).body[0]
    ends = {}  # name: its last line
    if isinstance(tree, ast.ClassDef):
        ends = {n.target.id: n.end_lineno for n in tree.body if isinstance(n, ast.AnnAssign)}
        tree = next((n for n in tree.body if getattr(n, "name", "") == "__init__"), None)
    if isinstance(tree, ast.FunctionDef):
        a = tree.args
        parameters = filter(None, (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg))
        ends |= {p.arg: p.end_lineno for p in parameters}
        last = tree.returns.end_lineno if tree.returns else tree.body[0].lineno - 1
        ends = {name: end for name, end in ends.items() if end < last} | {"return": last}
    tokens = tokenize.generate_tokens(StringIO(text).readline)
    found = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    lines = {end: tuple(n for n in ends if ends[n] == end and n != "self") for end in ends.values()}
    return {names: found[end] for end, names in lines.items()
            if names and not found.get(end, "fmt: ").startswith("fmt: ")}


def type_name(annotation: object) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)  # torch.Tensor -> Tensor


def parameter_table(obj: object) -> str:
    "Return the documented parameters and the result as a table, or an empty string."
    try:
        found, documented = inspect.signature(obj), comments(inspect.unwrap(obj))
    except (OSError, TypeError, ValueError):  # of objects without source, such as a C function
        return ""
    kinds = {p.name: p.annotation for p in found.parameters.values()} | {"return": found.return_annotation}
    rows = []
    for names, text in documented.items():
        types = [type_name(kinds.get(name, inspect.Parameter.empty)) for name in names]
        types = ", ".join(f"<code>{html.escape(kind)}</code>" for kind in dict.fromkeys(types) if kind)
        label = "*returns*" if "return" in names else ", ".join(f"`{name}`" for name in names)
        rows.append("| " + " | ".join(c.replace("|", "&#124;") for c in (label, types, text)) + " |")
    return "\n".join(["| parameter | type | meaning |", "| --- | --- | --- |", *rows, ""]) if rows else ""


def entry(obj: object, name: str, level: int, anchor: str, title: str) -> str:
    doc = inspect.getdoc(obj) or ""
    parts = [f"{'#' * level} {title} {{ #{anchor} }}", fence(signature(obj, name), "python"), doc,
             parameter_table(obj)]
    return "\n\n".join(filter(None, parts)) + "\n\n"


def api_page(notebook: Notebook) -> str:
    "Return the API page of a notebook's module."
    module, page = importlib.import_module(notebook.module), f"api/{notebook.module}.md"
    link = relative(notebook.page, page)
    parts = [f"# {notebook.module}\n", f"{inspect.getdoc(module) or ''}\n",
             f"Explained in [{notebook.name}]({link}).\n\n"]
    for name in module.__all__:
        obj = getattr(module, name)
        if inspect.isclass(obj):
            parts.append(entry(obj, name, 2, name, name))
            for method, value in vars(obj).items():
                kind = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
                if method.startswith("_") or not inspect.isfunction(kind) or not inspect.getdoc(kind):
                    continue
                shown = f"{name}.{method}"
                if isinstance(value, property):
                    parts.append(f"### {shown} {{ #{shown} }}\n\n{inspect.getdoc(kind)}\n\n")
                else:
                    parts.append(entry(kind, shown, 3, shown, shown))
        elif inspect.isroutine(inspect.unwrap(obj)) and inspect.getdoc(obj):
            parts.append(entry(obj, name, 2, name, name))
        else:
            value = fence(f"{name} = {shorten(repr(obj), 300)}", "python")
            parts.append(f"## {name} {{ #{name} }}\n\n{value}")
    return "".join(parts)


def commands_page() -> str:
    "Return a page with the help of every command."
    from bitvae.cli import COMMANDS

    lines = [*map(str.split, COMMANDS), ["train", "quick"]]
    about = "The help of every command; `bitvae train RECIPE --help` lists the values of a recipe."
    parts = [f"# Command line\n\n{about}\n\n{fence(command_help([]))}"]
    parts += [f"## bitvae {' '.join(words)}\n\n{fence(command_help(words))}" for words in lines]
    return "\n".join(parts)


def command_help(words: list[str]) -> str:
    from bitvae.cli import main

    with redirect_stdout(StringIO()) as printed, suppress(SystemExit):
        main([*words, "--help"])
    return printed.getvalue()


def gallery(notebooks: dict[str, Notebook]) -> str:
    "Return the first page: what the package does, in pictures that link to their notebooks."
    lines = ["# bitvae", "",
             "The bitwise visual tokenizer: an image into bits, coarse to fine, and back.", "",
             "![Photographs and their reconstructions](files/index_files/index_1_0.jpg)", "",
             "Two held-out photographs and their reconstructions from the first scale to all ten. "
             "[Overview](overview.md) installs the package and shows the most important commands; every "
             "picture below links to the notebook that makes it.", "", '<div class="gallery">']
    for name, number, what in GALLERY:
        notebook = notebooks[name]
        picture = [*notebook.pictures][number]
        target = notebook.page.removesuffix(".md") + ".html"
        text = f"<span>{html.escape(what)}: <b>{notebook.title()}</b></span>"
        lines.append(f'<a href="{target}"><img src="{picture}" alt="" loading="lazy">{text}</a>')
    return "\n".join([*lines, "</div>", ""])


def reading_order(file: Path) -> tuple[int, Path]:
    "Return the sort key of a notebook: its place in README's table, then its name."
    table = (ROOT / "README.md").read_text().partition("| notebook |")[2]
    place = table.find(f"(nbs/{file.relative_to(ROOT / 'nbs')})")
    return len(table) if place < 0 else place, file


def write_pages(out: Path) -> list:
    "Write all pages into a folder; return the navigation."
    notebooks = {n.name: n for n in map(Notebook, sorted((ROOT / "nbs").rglob("*.ipynb"), key=reading_order))
                 if n.name != "index" and ".ipynb_checkpoints" not in n.name}
    pages = {n.page: n.text() for n in notebooks.values()}
    with_module = [n for n in notebooks.values() if n.module]
    pages |= {f"api/{n.module}.md": api_page(n) for n in with_module}
    index = "".join(f"| [`{n.module}`]({n.module}.md) | {inspect.getdoc(sys.modules[n.module])} |\n"
                    for n in with_module)
    pages["commands.md"] = commands_page()
    pages["api/index.md"] = f"# API\n\n| module | contents |\n| --- | --- |\n{index}"
    for file, page in PAGES.items():
        if file.endswith(".md"):
            pages[page] = markdown((ROOT / file).read_text(), file, page)
    before, _, words = pages["contributing.md"].partition("## Glossary")
    pages["contributing.md"] = before + "See also the [glossary](glossary.md).\n"
    pages["glossary.md"] = "# Glossary\n" + words
    pages["index.md"] = "---\nhide: [navigation, toc]\n---\n\n" + gallery(notebooks)
    shutil.rmtree(out, ignore_errors=True)
    files = {path: data for n in notebooks.values() for path, data in n.pictures.items()}
    for folder in ("index_files", "benchmarks/demo-tokenizer"):
        files |= {f"files/{p.relative_to(ROOT)}": p.read_bytes() for p in (ROOT / folder).glob("*.[pj][np]g")}
    files |= {page: text.encode() for page, text in pages.items()} | {"site.css": CSS.encode()}
    for path, data in files.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(data)
    parts = {"Notebooks": [], "Experiments": [], "Viewer": []}
    for n in notebooks.values():
        part = {"experiments": "Experiments", "viewer": "Viewer"}.get(n.name.partition("/")[0], "Notebooks")
        parts[part].append({n.title(): n.page})
    parts["Notebooks"] += [{"Viewer": parts.pop("Viewer")}]
    return [{"Gallery": "index.md"}, {"Overview": "overview.md"}, *({k: v} for k, v in parts.items()),
            {"Commands": "commands.md"},
            {"API": ["api/index.md", *({n.module: f"api/{n.module}.md"} for n in with_module)]},
            {"Glossary": "glossary.md"},
            {"Project": [{"Contributing": "contributing.md"}, {"Changelog": "changelog.md"},
                         {"The tokenizer demo": "demo.md"}, {"Photographs for training": "photographs.md"},
                         {"Photographs held out": "held-out.md"}]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / CONFIG["doc_path"], help="folder of the site")
    args = parser.parse_args()
    os.environ["COLUMNS"] = "84"  # of the commands' help
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    pages = args.out.absolute().with_name(args.out.name + "_pages")
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(pages), site_dir=str(args.out.absolute()),
                             nav=write_pages(pages), strict=True,
                             site_url=f"{CONFIG['doc_host']}{CONFIG['doc_baseurl']}/")
        build(config)
    finally:
        shutil.rmtree(pages, ignore_errors=True)
    print(f"written: {args.out / 'index.html'}")


if __name__ == "__main__":
    main()
