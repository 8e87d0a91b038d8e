"""Builds the images with buildah from the product's Dockerfiles and exports them as archives that containerd imports."""

import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from images.layout import write_archive
from images.parts import ROOT, Log, base_archive, cache_folder, digest, packages, run, wheels_folder

TOOLS = ("buildah", "mmdebstrap")


class UnsupportedMachine(RuntimeError):
    """The images can't be built here; the message says what is missing."""


@dataclass(frozen=True)
class Image:
    """A built image: two archives, to be imported in this order. The first is large and changes with the locks only."""

    reference: str
    archives: tuple[Path, Path]


@dataclass(frozen=True)
class Images:
    """What a cluster needs to run Tunesmith."""

    operator: Image
    trainer: Image


@dataclass(frozen=True)
class Recipe:
    """One Dockerfile of the product and what goes into it."""

    name: str
    dockerfile: str
    locks: tuple[str, ...]
    sources: tuple[str, ...]

    def files(self) -> list[Path]:
        """Every file that the image is built from, byte code left out."""
        found = [ROOT / self.dockerfile]
        for folder in self.sources:
            found += [
                path
                for path in sorted((ROOT / folder).rglob("*"))
                if path.is_file() and "__pycache__" not in path.parts
            ]
        return found


OPERATOR = Recipe(
    name="tunesmith-operator",
    dockerfile="operator/Dockerfile",
    locks=("operator.txt",),
    sources=(
        "crds/tunesmith_api",
        "operator/tunesmith_operator",
        "trainer_image/tunesmith_store",
        "trainer_image/tunesmith_server/front",
        "trainer_image/tunesmith_server/activator",
    ),
)
TRAINER = Recipe(
    name="tunesmith-trainer",
    dockerfile="trainer_image/Dockerfile",
    locks=("trainer.txt",),
    sources=(
        "crds/tunesmith_api",
        "trainer_image/tunesmith_store",
        "trainer_image/tunesmith_trainer",
        "trainer_image/tunesmith_server",
    ),
)


def build_images(log: Log) -> Images:
    """Build both images, or take them from the cache.

    Raises:
        UnsupportedMachine: a tool or the right to use it is missing.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        raise UnsupportedMachine(f"building images needs root and {', '.join(TOOLS)}: run `sudo requirements/apt.sh`")
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Images(operator=_build(OPERATOR, cache, log), trainer=_build(TRAINER, cache, log))


def _build(recipe: Recipe, cache: Path, log: Log) -> Image:
    locks = recipe.locks if wheels_folder() or recipe is OPERATOR else (*recipe.locks, "cuda.txt")
    lock_texts = [(ROOT / "requirements" / lock).read_bytes() for lock in locks]
    tools = [Path(__file__).with_name(name).read_bytes() for name in ("build.py", "parts.py", "layout.py")]
    below_key = digest([*lock_texts, *tools])
    below, below_archive = (
        f"localhost/{recipe.name}-packages:{below_key}",
        cache / f"{recipe.name}-packages-{below_key}.tar",
    )
    if not below_archive.exists():
        _build_below(below, below_archive, locks, cache, log)
    code = [part for path in recipe.files() for part in (str(path.relative_to(ROOT)), path.read_bytes())]
    key = digest([below_key, *code])
    reference, archive = f"localhost/{recipe.name}:{key}", cache / f"{recipe.name}-{key}.tar"
    if not archive.exists():
        log(f"building {recipe.name}")
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            context = _context(recipe, Path(scratch))
            _buildah(
                cache, "build", "--isolation=chroot", "--pull-never", "--timestamp=0", f"--build-arg=BASE_IMAGE={below}",
                f"--file={ROOT / recipe.dockerfile}", f"--build-context=packages={context / 'stage'}", f"--tag={reference}",
                str(context),
            )  # fmt: skip
        _export(reference, archive, cache, without=below)
        for old in sorted(cache.glob(f"{recipe.name}-????????????????.tar"), key=lambda path: path.stat().st_mtime)[
            :-3
        ]:
            old.unlink()
    return Image(reference, (below_archive, archive))


def _build_below(name: str, archive: Path, locks: tuple[str, ...], cache: Path, log: Log) -> None:
    """What the code stands on: the Debian base and the Python packages, which the Dockerfile's first stage would make."""
    base = base_archive(cache, log)
    stage = packages(cache, locks, log)
    log(f"building {name}")
    container = _buildah(cache, "from", "scratch").strip()
    _buildah(cache, "add", "--quiet", container, str(base), "/")
    _buildah(cache, "add", "--quiet", container, str(stage / "packages"), "/opt/tunesmith/packages")
    _buildah(cache, "commit", "--quiet", "--rm", "--timestamp=0", container, name)
    log(f"exporting {name}")
    _export(name, archive, cache)


def _export(name: str, archive: Path, cache: Path, without: str | None = None) -> None:
    """Write an OCI archive; layers that the image `without` holds are left out, since a node has them by then."""
    layout = cache / "layout"
    _buildah(cache, "push", "--quiet", "--disable-compression", "--format=oci", name, f"oci:{layout}:{name}")
    scratch = archive.with_suffix(f".{os.getpid()}.part")
    write_archive(layout, name, scratch, without)
    scratch.rename(archive)


def _context(recipe: Recipe, scratch: Path) -> Path:
    """A clean build context: the sources only, whatever lies in the checkout beside them."""
    context = scratch / "context"
    (context / "stage" / "packages").mkdir(parents=True)  # the packages are in the image below
    for source in recipe.sources:
        (context / source).mkdir(parents=True)
    for path in recipe.files():
        target = context / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for lock in ("operator.txt", "trainer.txt", "cuda.txt"):
        target = context / "requirements" / lock
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "requirements" / lock, target)
    return context


def _buildah(cache: Path, *arguments: str) -> str:
    store = cache / "buildah"
    return run(
        ["buildah", f"--root={store / 'root'}", f"--runroot={store / 'run'}", "--storage-driver=overlay", *arguments]
    )
