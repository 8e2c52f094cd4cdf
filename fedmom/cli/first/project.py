"""The project that `fedmom new` writes: the files of template/, over nothing that is there."""

from pathlib import Path

from fedmom.config import schema
from fedmom.errors import InputError

_TEMPLATE = Path(__file__).parent / "template"
_SCHEMA = ".fedmom.schema.json"  # a copy beside the config: an editor need not find the package
_ABOUT = {
    "config.toml": "what runs: ten keys, each explained",
    "mine.py": "a data set and a model; put yours there",
    "README.md": "what comes next",
    ".gitignore": "keeps runs/ out of git",
    _SCHEMA: "by which an editor completes config.toml",
}


def write_project(folder: Path) -> dict[str, str]:
    """Make `folder` and write the project's files -> {name: what it is for}.

    Raises InputError where one of them exists already (then none is written), or where nothing can be written.
    """
    texts = {name: (_TEMPLATE / name).read_text(encoding="utf-8") for name in ("config.toml", "mine.py", "README.md")}
    texts[".gitignore"] = "runs/\n__pycache__/\n"
    texts[_SCHEMA] = schema.FILE.read_text(encoding="utf-8")
    texts["config.toml"] = f"#:schema ./{_SCHEMA}\n{texts['config.toml']}"
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; name a folder")
        taken = [name for name in texts if (folder / name).exists() or (folder / name).is_symlink()]
        if taken:
            raise InputError(f"{folder / taken[0]}: exists already, and nothing is written over; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with open(folder / name, "x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be written ({error.strerror})") from None
    return {name: _ABOUT[name] for name in texts}
