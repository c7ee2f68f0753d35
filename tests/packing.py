"""Tar shards, made for the tests."""

import io
import json
import tarfile


def pack(path, members, **options):
    """A tar file of {name: bytes}, whole: with its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pack_folder(data_dir, target, how, shards=3):
    """The images of a data folder as shards in `target`, dealt out in turn: backwards, as a shuffle might be.

    how: `"cls"`, `"json"` (a sample has a file with its label), or `"folders"`.
    """
    classes = sorted(p.name for p in (data_dir / "train").iterdir())
    for split in ("train", "val"):
        images = sorted((data_dir / split).glob("*/*"), reverse=True)
        for shard in range(shards):
            members = {}
            for path in images[shard::shards]:
                label = classes.index(path.parent.name)
                name = f"{path.parent.name}/{path.stem}"
                members[f"{name}{path.suffix}"] = path.read_bytes()
                if how == "cls":
                    members[f"{name}.cls"] = str(label).encode()
                elif how == "json":
                    members[f"{name}.json"] = json.dumps({"label": label, "width": 32}).encode()
            pack(target / split / f"{shard:03d}.tar", members)
    if how != "folders":
        (target / "classes.txt").write_text("\n".join(classes) + "\n")
    return target
