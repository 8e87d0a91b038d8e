"""Builds the images with buildah from the product's Dockerfiles and exports them as archives that containerd imports."""

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from images.parts import ROOT, Log, base_archive, cache_folder, digest, packages, run, wheels_folder

TOOLS = ("buildah", "mmdebstrap")


class UnsupportedMachine(RuntimeError):
    """The images can't be built here; the message says what is missing."""


@dataclass(frozen=True)
class Image:
    """A built image."""

    reference: str
    archive: Path


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
    sources=("crds/tunesmith_api", "operator/tunesmith_operator"),
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
    code = [part for path in recipe.files() for part in (str(path.relative_to(ROOT)), path.read_bytes())]
    tools = (Path(__file__).read_bytes(), Path(__file__).with_name("parts.py").read_bytes())
    key = digest([*lock_texts, *code, *tools])
    reference = f"localhost/{recipe.name}:{key}"
    archive = cache / f"{recipe.name}-{key}.tar"
    if archive.exists():
        return Image(reference, archive)
    base = _base_image(cache, log)
    folder = packages(cache, locks, log)
    log(f"building {recipe.name}")
    context = _context(recipe, cache)
    _buildah(
        cache, "build", "--isolation=chroot", "--pull-never", "--layers", "--timestamp=0", f"--build-arg=BASE_IMAGE={base}",
        f"--file={ROOT / recipe.dockerfile}", f"--build-context=packages={folder}",
        f"--tag={reference}", str(context),
    )  # fmt: skip
    shutil.rmtree(context)
    log(f"exporting {recipe.name}")
    scratch = archive.with_suffix(f".{os.getpid()}.part")
    _buildah(cache, "push", "--quiet", reference, f"docker-archive:{scratch}:{reference}")
    scratch.rename(archive)
    for old in sorted(cache.glob(f"{recipe.name}-*.tar"), key=lambda path: path.stat().st_mtime)[:-2]:
        old.unlink()
    return Image(reference, archive)


def _base_image(cache: Path, log: Log) -> str:
    tar = base_archive(cache, log)
    name = f"localhost/tunesmith-{tar.stem}:1"
    if name not in _buildah(cache, "images", "--format={{.Name}}:{{.Tag}}"):
        container = _buildah(cache, "from", "scratch").strip()
        _buildah(cache, "add", "--quiet", container, str(tar), "/")
        _buildah(cache, "commit", "--quiet", "--rm", container, name)
    return name


def _context(recipe: Recipe, cache: Path) -> Path:
    """A clean build context: the sources only, whatever lies in the checkout beside them."""
    context = cache / f"context-{recipe.name}-{os.getpid()}"
    shutil.rmtree(context, ignore_errors=True)
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
