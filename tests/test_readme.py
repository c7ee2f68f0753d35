import re

import pytest

READMES = ("README.md", "fastvitc/README.md", "kernels/README.md", "bench/README.md", "CONTRIBUTING.md")


def text_of(request, name):
    return (request.config.rootpath / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "blocks"), [("README.md", 1), ("fastvitc/README.md", 3)])
def test_the_readmes_python_runs_and_gives_the_shapes_it_names(name, blocks, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"^```python\n(.*?)^```", text_of(request, name), re.DOTALL | re.MULTILINE)
    assert len(found) == blocks
    names, shapes = {}, {}
    for block in found:
        exec(block, names)
        for variable, shape in re.findall(r"^(\w+) = .*# (\(\d+(?:, \d+)*\))", block, re.MULTILINE):
            shapes[variable] = shape
            assert str(tuple(names[variable].shape)) == shape
    assert "logits" in shapes


def test_the_readmes_models_have_the_counts_it_prints(request):
    from fastvitc import complexity

    text = text_of(request, "fastvitc/README.md")
    rows = re.findall(r"`(vit\w+)` \| ([\d,]+) \| ([\d.]+) \| ([\d.]+)", text)
    assert len(rows) == 10
    for name, params, gflops, acts in rows:
        counts = complexity(name)
        printed = f"{counts.params:,}", f"{counts.flops / 1e9:.4f}", f"{counts.acts / 1e6:.3f}"
        assert printed == (params, gflops, acts)


@pytest.mark.parametrize("name", READMES)
def test_every_link_leads_somewhere(name, request):
    folder = (request.config.rootpath / name).parent
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text_of(request, name)):
        assert (folder / target).exists(), target


def test_the_two_commands_are_one_line_each(request):
    text = text_of(request, "README.md")
    for marker in ("train", "test"):
        block = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)```", text, re.DOTALL).group(1)
        assert len(block.splitlines()) == 1
